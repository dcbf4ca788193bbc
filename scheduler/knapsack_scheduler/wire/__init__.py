"""Protobuf to core and back: nothing else knows both.

A request is checked whole before anything is made of it. What is stored in the journal
are the calls themselves, request and answer; ``fact_of`` reads them back.
"""

from knapsack_scheduler.wire.answers import (
    allocation_id,
    allocation_message,
    run_message,
    stats_message,
)
from knapsack_scheduler.wire.config import config_message, parse_config
from knapsack_scheduler.wire.entries import digest_of, fact_of, payload_of
from knapsack_scheduler.wire.imports import ImportStream
from knapsack_scheduler.wire.requests import (
    bounds_of,
    budget_of,
    check_allocate,
    check_bounds,
    check_extend,
    check_policy,
    check_report,
    check_tokens,
)

__all__ = [
    "ImportStream",
    "allocation_id",
    "allocation_message",
    "bounds_of",
    "budget_of",
    "check_allocate",
    "check_bounds",
    "check_extend",
    "check_policy",
    "check_report",
    "check_tokens",
    "config_message",
    "digest_of",
    "fact_of",
    "parse_config",
    "payload_of",
    "run_message",
    "stats_message",
]

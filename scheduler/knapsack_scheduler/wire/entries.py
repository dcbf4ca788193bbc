"""Calls as the journal stores them, request and answer, and what they say happened."""

from __future__ import annotations

import hashlib

import numpy as np
from google.protobuf.message import Message

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation
from knapsack_scheduler.facts import (
    ALWAYS,
    AllocationExtended,
    AllocationMade,
    Fact,
    OutcomesReported,
    Rewound,
)
from knapsack_scheduler.journal.records import Entry
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.state import RunState
from knapsack_scheduler.wire.imports import imported_of
from knapsack_scheduler.wire.requests import bounds_of, budget_of, rewards_of

_STORED = Limits(prompts=validation.LARGEST_INT32)
"""What was taken once is read whatever the limits are now."""


def payload_of(request: Message) -> bytes:
    """Return the bytes of a request as the journal stores them: equal for equal requests."""
    return request.SerializeToString(deterministic=True)


def digest_of(data: bytes) -> bytes:
    """Return the 16-byte hash that tells a repeated call from another."""
    return hashlib.blake2b(data, digest_size=16).digest()


def fact_of(entry: Entry, state: RunState) -> Fact:
    """Return what a journal entry says happened.

    Args:
        entry: of the run.
        state: of the run before the entry.
    """
    match entry.kind:
        case "allocate":
            request = pb.AllocateRequest.FromString(entry.payload)
            answer = pb.Allocation.FromString(entry.answer)
            return AllocationMade(
                answer.allocation_id,
                request.step,
                tuple(request.prompt_ids),
                bounds_of(request, state.config),
                budget_of(request),
                np.asarray(answer.num_rollouts, np.int64),
            )
        case "extend":
            answer = pb.Allocation.FromString(entry.answer)
            return AllocationExtended(
                answer.allocation_id,
                answer.step,
                np.asarray(answer.num_rollouts, np.int64),
                pb.ExtendRequest.FromString(entry.payload).keep_outstanding,
            )
        case "report":
            report = pb.ReportRequest.FromString(entry.payload)
            allocation = state.allocations.get(report.allocation_id)
            positions = len(report.prompt_ids)
            if report.allocation_id:
                positions = allocation.rows.size if allocation else validation.LARGEST_INT32
            return OutcomesReported(
                report.allocation_id,
                entry.step,
                tuple(report.prompt_ids),
                report.policy_version,
                rewards_of(report, positions),
                # Not told by the answer: a late report may hold no rollout.
                ignored=entry.step == ALWAYS,
            )
        case "import":
            return imported_of(entry.payload, _STORED)
        case "rewind":
            return Rewound(entry.step)
    raise ValueError(f"journal entry {entry.seq} is of an unknown kind: {entry.kind!r}")

"""The runbook names metrics that there are, and the bound on memory is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from knapsack_scheduler.limits import Limits
from knapsack_scheduler.metrics import Metrics

SCHEDULER = Path(__file__).resolve().parents[2] / "scheduler"
MIB = 2**20


def test_every_metric_of_the_runbook_exists() -> None:
    """Each is written K_NAME."""
    registry = CollectorRegistry()
    Metrics(registry)
    names = {
        name.removeprefix("knapsack_scheduler_") + suffix
        for name in (family.name for family in registry.collect())
        for suffix in ("", "_total")
    }
    named = set(re.findall(r"\bK_(\w+)", (SCHEDULER / "RUNBOOK.md").read_text()))
    assert len(named) >= 10
    assert named <= names


def test_the_stated_bound_on_memory_is_that_of_the_limits() -> None:
    """Formula and figure of OPERATIONS.md."""
    text = " ".join((SCHEDULER / "OPERATIONS.md").read_text().split())
    found = re.search(
        r"`max_inflight_bytes \+ (\d+) x max_message_bytes \+ (\d+) MiB`, ([\d.]+) GiB", text
    )
    assert found is not None
    factor, rest, default = found.groups()
    for limits in (Limits(), Limits(message_bytes=16 * MIB, inflight_bytes=64 * MIB)):
        stated = limits.inflight_bytes + int(factor) * limits.message_bytes + int(rest) * MIB
        assert limits.memory_bytes == stated
    assert round(Limits().memory_bytes / 2**30, 1) == float(default)

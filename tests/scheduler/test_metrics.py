"""What events become in Prometheus' text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.bulk_histogram import BulkHistogram
from knapsack_scheduler.core.calibration import Calibration
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.events import (
    BudgetDivided,
    CallHandled,
    OutcomesCounted,
    Prompts,
    RunRemoved,
)
from knapsack_scheduler.metrics import Metrics


def samples(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    """Return every sample by name, run and bucket."""
    text = generate_latest(registry).decode()
    return {
        (s.name, s.labels.get("run_id", ""), s.labels.get("le", "")): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if not s.name.endswith("_created")
    }


def test_many_observations_are_what_single_ones_are() -> None:
    """Bounds belong to the bucket below; counts are cumulative; the sum is exact."""
    bounds = (0, 1, 2, 4, 8)
    numbers = [np.array([0, 1, 2, 3, 4, 5, 8, 9, 100]), np.array([], np.int64), np.array([7, 1])]
    one, many = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("size", "Sizes.", ["run_id"], buckets=bounds, registry=one)
    bulk = BulkHistogram("size", "Sizes.", "run_id", bounds, many)
    for part in numbers:
        bulk.observe("a", part)
        for number in part.tolist():
            plain.labels("a").observe(number)
    bulk.observe("b", np.array([3]))
    plain.labels("b").observe(3)
    assert samples(many) == samples(one)
    bulk.remove("a")
    bulk.remove("never seen")
    assert {run for _, run, _ in samples(many)} == {"b"}


def test_judged_groups_are_counted_and_forgotten_with_the_run() -> None:
    """Three counters say how predictions compare; a deleted run leaves no series."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    chances = np.array([0.25, 0.25, 0.75], np.float32)
    judged = Calibration.of_groups(chances, np.array([2, 2, 4]), np.array([True, False, False]))
    metrics(OutcomesCounted("run", 4, 2, Counted(accepted=8, judged=judged), Prompts(7, (0,) * 6)))

    def of(name: str, chance: str) -> float | None:
        labels = {"run_id": "run", "chance": chance}
        return registry.get_sample_value(f"knapsack_scheduler_judged_{name}_total", labels)

    assert [of("groups", c) for c in ("0.2-0.3", "0.7-0.8", "0-0.1")] == [2, 1, 0]
    assert [of("effective_groups", c) for c in ("0.2-0.3", "0.7-0.8")] == [1, 0]
    predicted = [of("predicted_effective_groups", c) for c in ("0.2-0.3", "0.7-0.8")]
    assert predicted == pytest.approx([0.5, 0.75])
    metrics(RunRemoved("run"))
    assert not [key for key in samples(registry) if key[1] == "run"]


async def test_rollouts_that_come_after_all_fail_no_extension(calls: Any) -> None:
    """Given up, given anew, and then both came: more than the bounds hold."""
    async with open_service("sqlite://", auto_create_runs=True) as service:
        first = await service.allocate(
            calls.allocate(list("abcd"), 32, 1, min_rollouts=[8], max_rollouts=[8])
        )

        def half(size: int, name: str) -> pb.ReportRequest:
            return pb.ReportRequest(
                run_id="run", allocation_id=first.allocation_id, report_id=name,
                prompt_indices=range(4), num_rewards=[size] * 4,
                rewards=[1.0, *[0.0] * (size - 1)] * 4,
            )  # fmt: skip

        await service.report(half(4, "first"))
        again = await service.extend(calls.extend(first.allocation_id, "again"))
        assert list(again.num_rollouts) == [4, 4, 4, 4]
        await service.report(half(8, "both"))
        last = await service.extend(calls.extend(first.allocation_id, "last"))
        assert list(last.num_rollouts) == [0, 0, 0, 0]


async def test_a_budget_is_predicted_once_however_often_it_is_extended(calls: Any) -> None:
    """Extensions that give nothing, or give anew what was lost, are of the same budget."""
    async with open_service("sqlite://", auto_create_runs=True) as service:
        divided: list[BudgetDivided] = []
        service.events.listen(lambda e: divided.append(e) if isinstance(e, BudgetDivided) else None)
        first = await service.allocate(calls.allocate(list("abcd"), 32, 1))
        await service.report(
            pb.ReportRequest(
                run_id="run",
                allocation_id=first.allocation_id,
                report_id="one",
                prompt_indices=[0],
                num_rewards=[1],
                rewards=[1.0],
            )
        )
        for k in range(3):
            await service.extend(
                calls.extend(first.allocation_id, f"kept-{k}", keep_outstanding=True)
            )
        await service.extend(calls.extend(first.allocation_id, "lost"))
        await service.settled()
        assert sum(e.outlook.rollouts for e in divided if e.outlook) == 32


def test_a_call_that_deletes_a_run_does_not_begin_its_series_again() -> None:
    """Though the caller tells how many reports wait, as with every call."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for k in range(3):
        metrics(RunRemoved(f"gone-{k}"))
        metrics(CallHandled("DeleteRun", "OK", 0.01, f"gone-{k}", "", "", "x", 0))
    assert "gone-" not in generate_latest(registry).decode()


@pytest.mark.parametrize(("loaded_bytes", "reads"), [(1, 8), (2**30, 0)])
async def test_calls_that_read_their_run_are_counted(loaded_bytes: int, reads: int) -> None:
    """Two runs that do not fit into memory together are read by every call; a new run is not."""
    registry = CollectorRegistry()
    async with open_service("sqlite://", loaded_bytes=loaded_bytes) as service:
        for name in ("one", "other"):
            await service.create_run(pb.CreateRunRequest(run_id=name))
        service.events.listen(Metrics(registry))
        for number in range(4):
            for name in ("one", "other"):
                await service.report(
                    pb.ReportRequest(
                        run_id=name, report_id=f"{number}", step=number, prompt_ids=["a"],
                        prompt_indices=[0], num_rewards=[1], rewards=[1.0],
                    )
                )  # fmt: skip
                await service.settled()
    assert registry.get_sample_value("knapsack_scheduler_run_reads_total") == reads


async def test_a_transaction_that_the_store_refuses_is_counted_as_failed(
    tmp_path: Path, calls: Any
) -> None:
    """And as nothing else."""
    registry, file = CollectorRegistry(), tmp_path / "stats.db"
    async with open_service(f"sqlite:///{file}") as service:
        service.events.listen(Metrics(registry))
        await service.report(calls.own_report(["a"], [[1.0]]))
        file.rename(tmp_path / "elsewhere.db")
        with pytest.raises(StoreUnavailable):
            await service.report(calls.own_report(["a"], [[1.0]]))
    counted = [registry.get_sample_value(f"knapsack_scheduler_store_{name}_total")
               for name in ("failures", "busy")]  # fmt: skip
    assert counted == [1, 0]

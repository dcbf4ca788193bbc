"""One huge step or policy version, sent by mistake, does no lasting harm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.logs import log_event
from knapsack_scheduler.metrics import Metrics
from knapsack_scheduler.service import SchedulerService

BOGUS = 2**40
ANY_JUMP = Limits(jump=2**53)
PROMPTS = [f"p{i}" for i in range(12)]


async def train(service: SchedulerService, calls: Any, first: int, last: int) -> list[Any]:
    """Allocate and report some steps; returns what was allocated, ids apart."""
    answers = []
    for step in range(first, last):
        ids = [PROMPTS[(5 * step + i) % len(PROMPTS)] for i in range(5)]
        made = await service.allocate(calls.allocate(ids, 30, step, f"a{step}"))
        rewards = [
            [float((step + position + k) % (2 + position) == 0) for k in range(n)]
            for position, n in enumerate(made.num_rollouts)
        ]
        await service.report(
            calls.report(made.allocation_id, rewards, f"r{step}", policy_version=step)
        )
        await settle(service)
        answers.append((list(made.num_rollouts), made.summary))
    return answers


async def settle(service: SchedulerService) -> None:
    """Wait until all that was answered is folded, and for the snapshot under way."""
    await service.settled()
    service._runs._snapshots._thread.submit(lambda: None).result(60)


async def bogus(service: SchedulerService, calls: Any, what: str) -> None:
    """Send a step, or the policy version of a report, that is a mistake."""
    step, version = (BOGUS, 12) if what == "step" else (12, BOGUS)
    made = await service.allocate(calls.allocate(PROMPTS, 60, step, "bogus"))
    report = calls.report(made.allocation_id, [[1.0]] * 12, "bogus", policy_version=version)
    await service.report(report)
    own = calls.own_report(PROMPTS, [[1.0, 0.0]] * 12, step, policy_version=version)
    await service.report(own)
    await settle(service)


async def everything(service: SchedulerService) -> tuple[Any, Any]:
    """Return all that is known of the run's prompts, and the run."""
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    run.ClearField("create_time")
    return page, run


@pytest.mark.parametrize(
    ("database", "what"),
    [("sqlite", "step"), ("sqlite", "policy_version"), ("postgresql", "step")],
)
async def test_a_rewind_takes_it_back_completely(
    database: str, what: str, tmp_path: Path, calls: Any, request: pytest.FixtureRequest
) -> None:
    """Every later allocation is that of a run that never saw it, also after a restart."""
    if database == "sqlite":
        stores = [f"sqlite:///{tmp_path / name}.db" for name in ("hit", "spared")]
    else:
        server = request.getfixturevalue("postgres")
        stores = [server.new_store(), server.new_store()]
    seen = []
    for store, is_hit in zip(stores, (True, False), strict=True):
        retention = Retention(horizon=6, snapshot_calls=3)
        async with open_service(store, limits=ANY_JUMP, retention=retention) as service:
            before = await train(service, calls, 0, 12)
            if is_hit:
                await bogus(service, calls, what)
            poisoned = await train(service, calls, 12, 15)
            row = service._journal.find_run("run")
            assert row is not None
            # The journal is compacted all the same, and no report of these days is old.
            assert 0 < row.floor_step <= 9
            assert row.closed_step <= 9
            await service.rewind_run(calls.rewind(9))
            after = await train(service, calls, 10, 20)
            seen.append((before, after, await everything(service)))
        async with open_service(store, limits=ANY_JUMP, retention=retention) as service:
            assert await everything(service) == seen[-1][2]
            seen[-1] += (await train(service, calls, 20, 22),)
        assert is_hit == (poisoned != after[2:5])
    assert seen[0] == seen[1]


async def test_it_is_refused(service: SchedulerService, calls: Any) -> None:
    """Field, value and what is allowed are named, and nothing is taken of it."""
    own = calls.own_report(["a"], [[1.0]], 7, policy_version=10**9)
    await service.report(own)  # The first of a run may be any.
    before = await everything(service)
    far = Limits().jump
    for call, message in (
        (service.allocate(calls.allocate(["a"], 4, 8 + far)), f"step = {8 + far}"),
        (service.report(calls.own_report(["a"], [[1.0]], BOGUS)), f"at most {7 + far}: the run's"),
        (
            service.report(calls.own_report(["a"], [[1.0]], 8, policy_version=10**9 + far + 1)),
            f"policy_version = {10**9 + far + 1}",
        ),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await call
        assert message in str(refused.value)
    assert await everything(service) == before
    assert (await service.allocate(calls.allocate(["a"], 4, 7 + far))).step == 7 + far
    assert (await service.report(own)).accepted_rollouts == 1


async def test_a_jump_that_is_taken_is_told_of(
    service: SchedulerService, calls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log with what it was before, and as a metric; ordinary steps are not."""
    registry = CollectorRegistry()
    for listener in (Metrics(registry), log_event):
        service.events.listen(listener)
    name, labels = "knapsack_scheduler_jumps_total", {"run_id": "run"}
    await train(service, calls, 5000, 5003)
    assert registry.get_sample_value(name, labels) == 0
    with caplog.at_level(logging.WARNING):
        await service.allocate(calls.allocate(["a"], 4, 9000))
        await service.report(calls.own_report(["a"], [[1.0]], 11_000, policy_version=7000))
        await service.settled()
    assert registry.get_sample_value(name, labels) == 3
    told = [record.fields for record in caplog.records if "far beyond" in record.message]
    assert [(each["field"], each["value"], each["newest_before"]) for each in told] == [
        ("step", 9000, 5002),
        ("step", 11_000, 9000),
        ("policy_version", 7000, 5002),
    ]

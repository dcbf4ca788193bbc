"""After whatever went wrong, a run in memory is what its journal comes to."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import FailedPrecondition, StoreUnavailable
from knapsack_scheduler.journal import compaction
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.statements import driver_of
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.service import SchedulerService


def journal_of(service: SchedulerService, run_id: str = "run") -> LoadedRun:
    """Return the run as a process that starts now would have it."""
    with service._journal.reading(run_id) as reading:
        return LoadedRun.load(reading)


async def run_of(service: SchedulerService) -> pb.Run:
    """Return the run as it is in memory."""
    return await service.get_run(pb.GetRunRequest(run_id="run"))


async def imported(prompt_ids: list[str], rewards: int) -> AsyncIterator[pb.ImportOutcomesRequest]:
    """Yield an import of so many successes of each prompt."""
    yield pb.ImportOutcomesRequest(
        run_id="run",
        request_id="import",
        prompt_ids=prompt_ids,
        num_rewards=[rewards] * len(prompt_ids),
        rewards=[1.0] * (rewards * len(prompt_ids)),
    )


async def settled(service: SchedulerService, held: threading.Event | None = None) -> None:
    """Wait until no snapshot is under way, or the one that is has come to where it is held.

    And before that until all that was answered is folded.
    """
    await service.settled()
    busy = service._runs._snapshots._busy

    def wait() -> None:
        while not (held and held.is_set()):
            if busy.acquire(timeout=0.01):
                busy.release()
                return

    await asyncio.to_thread(wait)


async def steps(service: SchedulerService, calls: Any, first: int, last: int) -> None:
    """Allocate and report the steps from first to last."""
    for step in range(first, last + 1):
        made = await service.allocate(calls.allocate(["a", "b"], 8, step))
        rewards = [[1.0] * made.num_rollouts[0], [0.0] * made.num_rollouts[1]]
        await service.report(calls.report(made.allocation_id, rewards))
        await settled(service)


async def test_what_was_not_stored_is_not_taken_for_what_comes_next(calls) -> None:
    """A report whose commit fails, then an import: each counts once, in memory as on disk."""
    async with open_service("sqlite://") as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        report = calls.own_report(["a", "b"], [[1.0, 0.0], [0.0, 0.0]])
        failing = [True]

        def refuse(action: int, operation: str | None, *_: object) -> int:
            if (
                action == sqlite3.SQLITE_TRANSACTION
                and operation == "COMMIT"
                and failing
                and failing.pop()
            ):
                return sqlite3.SQLITE_DENY
            return sqlite3.SQLITE_OK

        with service._journal._engine.connect() as connection:
            driver_of(connection).set_authorizer(refuse)

        with pytest.raises(StoreUnavailable):
            await service.report(report)
        await service.import_outcomes(imported(["c"], 3))
        found = await run_of(service)
        assert (found.known_prompts, found.total_rollouts, found.total_successes) == (1, 3, 3)
        await service.report(report)
        found = await run_of(service)
        state = journal_of(service).state
        assert (found.total_rollouts, found.total_successes) == (7, 4)
        assert (state.total_rollouts, state.total_successes) == (7, 4)


async def test_a_rewind_while_the_journal_is_compacted_keeps_what_it_needs(
    tmp_path: Path, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the plan and the moving of the floor: the floor stays, and a restart finds it all."""
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    reached, go = threading.Event(), threading.Event()
    held: list[bool] = []
    original = compaction.is_whole

    def slow(*arguments: Any) -> Any:
        result = original(*arguments)
        if held and held.pop():
            reached.set()
            assert go.wait(60)
        return result

    monkeypatch.setattr(compaction, "is_whole", slow)
    retention = Retention(horizon=10, snapshot_calls=10)
    async with open_service(store, retention=retention) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        await steps(service, calls, 0, 39)
        held.append(True)
        step = 40
        while not reached.is_set():
            made = await service.allocate(calls.allocate(["a", "b"], 8, step))
            rewards = [[1.0] * made.num_rollouts[0], [0.0] * made.num_rollouts[1]]
            await service.report(calls.report(made.allocation_id, rewards))
            await settled(service, reached)
            step += 1
            assert step < 200
        floor = service._journal.find_run("run")
        assert floor is not None
        rewound = await service.rewind_run(calls.rewind(floor.floor_step))
        go.set()
        await settled(service)
        after = service._journal.find_run("run")
        assert after is not None
        assert after.floor_seq == floor.floor_seq
        following = calls.own_report(["a"], [[1.0]], rewound.last_step + 1)
        assert (await service.report(following)).accepted_rollouts == 1
        before = await run_of(service)
    async with open_service(store, retention=retention) as service:
        assert await run_of(service) == before


async def test_a_snapshot_below_the_floor_is_not_gone_back_to(
    tmp_path: Path, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the floor moved and before old snapshots went: a rewind below is refused."""
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    retention = Retention(horizon=20, snapshot_calls=10)

    def interrupted(*_arguments: Any) -> None:
        raise StoreUnavailable("killed here")

    async with open_service(store, retention=retention) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        floors, step = {0}, 0
        while len(floors) < 4:
            if len(floors) == 3:
                monkeypatch.setattr(compaction, "_drop_snapshot", interrupted)
            await steps(service, calls, step, step)
            row = service._journal.find_run("run")
            assert row is not None
            floors.add(row.floor_seq)
            step += 1
            assert step < 200
        with service._journal.reading("run") as reading:
            below = [mark for mark in reading.snapshots() if mark.seq < row.floor_seq]
        assert below
    async with open_service(store, retention=retention) as service:
        before = await run_of(service)
        with pytest.raises(FailedPrecondition, match=f"to step {row.floor_step} or a later one"):
            await service.rewind_run(calls.rewind(row.floor_step - 1))
        assert await run_of(service) == before


async def test_old_rewinds_are_recognised_after_a_new_beginning(calls) -> None:
    """A rewind of a compacted step that is repeated is answered, and rewinds nothing."""
    retention = Retention(horizon=5, snapshot_calls=10)
    async with open_service("sqlite://", retention=retention) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        await steps(service, calls, 0, 5)
        await service.rewind_run(calls.rewind(3, "resume"))
        await steps(service, calls, 10, 40)
        await service.rewind_run(calls.rewind(-1, "anew"))
        await steps(service, calls, 0, 4)
        assert (await service.rewind_run(calls.rewind(3, "resume"))).rewinds == 1
        assert (await run_of(service)).last_step == 4


async def test_what_was_taken_is_read_under_any_limits() -> None:
    """An import larger than the default limit allows is folded again after a restart."""
    ids = [f"p{k}" for k in range(Limits().prompts + 1)]
    journal = Journal("sqlite://")
    journal.open()
    service = SchedulerService(journal, limits=Limits(prompts=300_000))
    try:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        await service.import_outcomes(imported(ids, 1))
        assert (await run_of(service)).known_prompts == len(ids)
        assert journal_of(service).state.known_prompts == len(ids)
    finally:
        service.close()
        journal.close()


@pytest.mark.parametrize(
    "why", [StoreUnavailable("none of its snapshots can be read"), ValueError("no config")]
)
async def test_one_run_that_cannot_be_read_hides_no_other(
    calls, monkeypatch: pytest.MonkeyPatch, why: Exception
) -> None:
    """It is listed by its name alone."""
    async with open_service("sqlite://") as service:
        await service.create_run(pb.CreateRunRequest(run_id="broken"))
        await service.create_run(pb.CreateRunRequest(run_id="whole"))
        original = service.get_run

        async def get_run(request: pb.GetRunRequest) -> pb.Run:
            if request.run_id == "broken":
                raise why
            return await original(request)

        monkeypatch.setattr(service, "get_run", get_run)
        listed = (await service.list_runs(pb.ListRunsRequest())).runs
        assert [run.run_id for run in listed] == ["broken", "whole"]
        assert not listed[0].HasField("config")
        assert listed[1].HasField("config")

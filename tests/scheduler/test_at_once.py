"""A small call on a run in memory is done at once, and is done also when its caller goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import service as service_module
from knapsack_scheduler import transactions
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import InvalidArgument, RunNotFound, StoreUnavailable
from knapsack_scheduler.events import Committed, Event
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.service import SchedulerService
from knapsack_scheduler.state import RunState

from gates import Gate, soon


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[SchedulerService]:
    """A service with the run "run" in memory."""
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}") as opened:
        await opened.create_run(pb.CreateRunRequest(run_id="run"))
        yield opened


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How the journal is written to, as it goes."""
    how: list[str] = []

    def noting(name: str, real: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            how.append(name)
            return real(*arguments)

        return noted

    for name in ("append", "writing"):
        monkeypatch.setattr(Journal, name, noting(name, getattr(Journal, name)))
    return how


async def rollouts(service: SchedulerService) -> int:
    """Return the rollouts that the run has counted."""
    return (await soon(service.get_run(pb.GetRunRequest(run_id="run")))).total_rollouts


async def test_the_run_is_not_read_before_it_is_written(
    service: SchedulerService, calls: Any, opened: list[str]
) -> None:
    """Whatever the call, as long as nothing but calls has changed its row."""
    made = await service.allocate(calls.allocate(["a", "b"], 16, wave_fraction=0.5))
    await service.report(
        calls.report(made.allocation_id, [[1.0, *[0.0] * (n - 1)] for n in made.num_rollouts])
    )
    await service.extend(calls.extend(made.allocation_id))
    await service.report(calls.own_report(["a"], [[1.0]]))
    assert opened == ["append"] * 4
    assert (await service.get_run(pb.GetRunRequest(run_id="run"))).total_rollouts == 9


async def test_a_run_that_got_a_snapshot_is_read_once(
    tmp_path: Path, calls: Any, opened: list[str]
) -> None:
    """Which changes its row, as a compaction does; then it is as before."""
    retention = Retention(horizon=1, snapshot_calls=3)
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}", retention=retention) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        for step in range(12):
            await service.report(calls.own_report(["a"], [[1.0]], step))
            await service.settled()
            snapshots = service._runs._snapshots
            await asyncio.to_thread(snapshots._thread.submit(lambda: None).result)
        assert opened.count("writing") == 3
        assert opened.count("append") == 12
        assert await rollouts(service) == 12


async def test_a_wrong_request_opens_no_transaction(
    service: SchedulerService, calls: Any, opened: list[str]
) -> None:
    """It is refused before, of a run in memory and of one that nobody knows, and not timed."""
    told: list[Event] = []
    service.events.listen(told.append)
    for calls.run_id in ("run", "unknown"):
        wrong = calls.own_report(["a"], [[1.0]])
        wrong.num_rewards[0] = 2
        with pytest.raises(InvalidArgument, match="num_rewards"):
            await service.report(wrong)
        with pytest.raises(InvalidArgument, match="prompt_ids"):
            await service.allocate(calls.allocate([]))
    assert opened == []
    calls.run_id = "run"
    await service.report(calls.own_report(["a"], [[1.0]]))
    assert await rollouts(service) == 1
    assert len([event for event in told if isinstance(event, Committed)]) == 1


async def test_the_caller_s_own_time_is_not_the_store_s(
    service: SchedulerService, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they do before they wait for anything again is not counted."""
    told: list[Event] = []
    service.events.listen(told.append)
    seconds = [1.0]
    monkeypatch.setattr(transactions, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    await service.report(calls.own_report(["a"], [[1.0]]))
    seconds[0] = 8.0
    await service.settled()
    assert [event.seconds for event in told if isinstance(event, Committed)] == [0.0]


async def test_a_wrong_request_waits_for_no_thread(
    service: SchedulerService, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While all that write are busy with other runs, it is refused as what it is."""
    writers = service._runs._writers
    held = [
        asyncio.ensure_future(writers.run(gate.before(lambda: None, lambda: True)))
        for _ in range(4)
    ]
    await gate.reached(4)
    with pytest.raises(InvalidArgument, match="prompt_ids"):
        await soon(service.allocate(calls.allocate([])))
    waiting = asyncio.ensure_future(service.report(calls.own_report(["a"], [[1.0]])))
    gate.open()
    await asyncio.gather(*held, waiting)
    assert await rollouts(service) == 1


async def stalled(
    service: SchedulerService, call: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin a call and leave it while its transaction waits at the gate."""
    journal = service._journal
    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", gate.before(journal.append, lambda *_: True))
        caller = asyncio.ensure_future(call)
        await gate.reached()
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()


async def test_a_call_whose_caller_has_gone_is_stored_and_folded(
    service: SchedulerService, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call of the run waits for it, and a retry finds its answer."""
    report = calls.own_report(["a"], [[1.0, 0.0]], report_id="once")
    await stalled(service, service.report(report), gate, monkeypatch)
    asked = asyncio.ensure_future(rollouts(service))
    gate.open()
    assert await asked == 2
    assert (await soon(service.report(report))).accepted_rollouts == 2
    assert await rollouts(service) == 2


async def test_a_service_ends_after_a_call_whose_caller_has_gone(
    tmp_path: Path, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had begun is stored before the store is closed."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        report = calls.own_report(["a"], [[1.0, 0.0]])
        await stalled(service, service.report(report), gate, monkeypatch)
        asyncio.get_running_loop().call_soon(gate.open)
    async with open_service(url) as service:
        assert await rollouts(service) == 2


async def test_a_caller_who_leaves_while_the_fold_is_awaited(
    service: SchedulerService, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a report so large that it is folded before its answer: it is stored already."""
    monkeypatch.setattr(service_module, "_MANY", 1)
    fold = gate.before(RunState.fold, lambda *_: True)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "fold", fold)
        caller = asyncio.ensure_future(service.report(calls.own_report(["a"], [[1.0, 0.0]])))
        await gate.reached()
    caller.cancel()
    await asyncio.wait([caller])
    gate.open()
    assert await rollouts(service) == 2


async def test_a_caller_who_leaves_a_run_that_has_to_be_read_anew(
    postgres: Any, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Another replica has rewound it meanwhile: nothing is stored, and it goes on."""
    store = postgres.new_store()
    async with open_service(store) as one, open_service(store) as two:
        await one.report(calls.own_report(["a"], [[1.0]], 1))
        await one.settled()
        journal = one._journal
        with monkeypatch.context() as patch:
            patch.setattr(journal, "writing", gate.before(journal.writing, lambda *_: True))
            caller = asyncio.ensure_future(one.report(calls.own_report(["a"], [[1.0]], 2)))
            await gate.reached()
        await soon(two.rewind_run(calls.rewind(0)))
        caller.cancel()
        await asyncio.wait([caller])
        gate.open()
        await one.ended()
        assert await rollouts(one) == 0
        await soon(one.report(calls.own_report(["a"], [[1.0]], 1)))
        assert await rollouts(one) == await rollouts(two) == 1
    assert caplog.text == ""


@pytest.mark.parametrize("error", [ZeroDivisionError("broken"), StoreUnavailable("broken")])
async def test_an_error_that_nobody_waits_for(
    service: SchedulerService, calls: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, error: Exception,
) -> None:  # fmt: skip
    """It is logged unless it concerned the caller alone, and the run goes on."""

    def failing(*_arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(service._journal, "append", failing)
        await stalled(service, service.report(calls.own_report(["a"], [[1.0]])), gate, patch)
        gate.open()
        await service.ended()
    assert ("broken" in caplog.text) == isinstance(error, ZeroDivisionError)
    await soon(service.report(calls.own_report(["a"], [[1.0]])))
    assert await rollouts(service) == 1


async def test_a_run_that_was_deleted_meanwhile_is_not_written_to(
    service: SchedulerService, calls: Any
) -> None:
    """By another process, behind the back of the one that has it in memory."""
    made = await service.allocate(calls.allocate(["a"], 2))
    await service.settled()
    await asyncio.to_thread(service._journal.delete_run, "run")
    with pytest.raises(RunNotFound):
        await soon(service.report(calls.report(made.allocation_id, [[1.0, 0.0]])))
    # Which creates it anew.
    await soon(service.report(calls.own_report(["a"], [[1.0]])))
    assert await rollouts(service) == 1

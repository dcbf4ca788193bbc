"""A call is answered once it is stored; what it changes is there for whoever asks next."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import service as service_module
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.events import Event, OutcomesCounted
from knapsack_scheduler.state import RunState


async def rollouts(service: Any) -> int:
    """Return the rollouts that the run has counted."""
    return (await service.get_run(pb.GetRunRequest(run_id="run"))).total_rollouts


async def test_an_answer_waits_for_the_store_and_not_for_the_fold(
    tmp_path: Path, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the fold stands still the report is answered and stored; who asks next finds it."""
    go = asyncio.Event()
    loop = asyncio.get_running_loop()
    fold = RunState.fold

    def standing(state: RunState, fact: Any) -> Any:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(30)
        return fold(state, fact)

    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        monkeypatch.setattr(RunState, "fold", standing)
        await asyncio.wait_for(service.report(calls.own_report(["a"], [[1.0]])), 30)
        with service._journal.reading("run") as reading:
            assert reading.run.last_seq == 1
        asked = asyncio.ensure_future(rollouts(service))
        go.set()
        assert await asked == 1


async def test_a_large_call_is_folded_before_its_answer(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory counts for as long as its caller waits."""
    monkeypatch.setattr(service_module, "_MANY", 1)
    told: list[Event] = []
    async with open_service("sqlite://") as service:
        service.events.listen(told.append)
        await service.report(calls.own_report(["a"], [[1.0, 0.0]]))
        assert [e.counted.accepted for e in told if isinstance(e, OutcomesCounted)] == [2]


async def test_a_fold_that_fails_after_the_answer_costs_no_rollout(
    calls: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was answered is stored: the run is read anew from the journal, and the log says so."""
    async with open_service("sqlite://") as service:
        await service.report(calls.own_report(["a"], [[1.0]], report_id="one"))
        await service.settled()
        with monkeypatch.context() as patch:
            patch.setattr(RunState, "fold", lambda *_: 1 // 0)
            await service.report(calls.own_report(["a", "b"], [[0.0], [1.0]], report_id="two"))
            await service.settled()
        assert "run 'run': could not be folded, to be read anew" in caplog.text
        assert await rollouts(service) == 3


async def test_a_service_is_closed_after_what_it_answered_is_told_of(calls: Any) -> None:
    """The last report before the end is in the log and in the metrics as any other."""
    told: list[Event] = []
    async with open_service("sqlite://") as service:
        service.events.listen(told.append)
        await service.report(calls.own_report(["a"], [[1.0, 0.0]]))
    assert [e.counted.accepted for e in told if isinstance(e, OutcomesCounted)] == [2]

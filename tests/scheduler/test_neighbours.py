"""What takes long for one run is not waited for by the others, and by nobody for ever."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import loaded
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import Busy, FailedPrecondition
from knapsack_scheduler.idorder import IdOrder
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LoadedRuns
from knapsack_scheduler.metrics import Metrics
from knapsack_scheduler.service import SchedulerService

from gates import Gate, soon


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[SchedulerService]:
    """A service on a file, so that reading does not wait for writing."""
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}") as opened:
        yield opened


def stalls_rewinds(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Let folding what a rewind leaves wait at a gate."""
    load = LoadedRun.load
    gated = gate.before(load, lambda _reading, step=None, **_: step is not None)
    monkeypatch.setattr(LoadedRun, "load", gated)


async def steps_with_a_rewind(
    service: SchedulerService, calls: Any, gate: Gate | None
) -> list[Any]:
    """Make calls before, during and after a rewind to step 2, and return the last answers.

    Those that come during the rewind come before it where there is no gate.
    """

    async def step(number: int, name: str) -> Any:
        ids = ["a", "b", f"c{number}"]
        made = await soon(service.allocate(calls.allocate(ids, 12, number, f"a{name}")))
        rewards = [[float((i + number) % 2)] * n for i, n in enumerate(made.num_rollouts)]
        await soon(service.report(calls.report(made.allocation_id, rewards, f"r{name}")))
        return made

    request = calls.rewind(2, "rewind")
    before = [await step(number, f"{number}") for number in range(6)]
    if gate:
        rewinding = [asyncio.ensure_future(service.rewind_run(request)) for _ in range(3)]
        await gate.reached()
    # Of a step that stays, and of one that goes.
    await step(2, "late")
    await step(5, "abandoned")
    if gate:
        gate.open()
        answers = [await soon(call) for call in rewinding]
        assert answers[1:] == answers[:1] * 2
    else:
        answers = [await service.rewind_run(request)]
    forgotten = calls.report(before[4].allocation_id, [[1.0]] * 3, "forgotten")
    ignored = await soon(service.report(forgotten))
    assert ignored.ignored_rollouts == 3
    after = await step(3, "3-anew")
    stats = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id=calls.run_id))
    run = await service.get_run(pb.GetRunRequest(run_id=calls.run_id))
    for message in (answers[0], run):
        message.ClearField("create_time")
    answers[0].run_id = run.run_id = after.run_id = after.allocation_id = ""
    return [answers[0], after, stats, run]


@pytest.mark.parametrize("longest", [500, 3])
async def test_a_rewind_is_folded_while_calls_go_on(
    service: SchedulerService, calls: Any, monkeypatch: Any, gate: Gate, longest: int
) -> None:
    """Of its run too, few or many; they count as if they had come before it. Retries wait."""
    calls.run_id = "plain"
    expected = await steps_with_a_rewind(service, calls, None)
    calls.run_id = "gated"
    monkeypatch.setattr(loaded, "_LONG_TAIL", longest)
    stalls_rewinds(monkeypatch, gate)
    assert await steps_with_a_rewind(service, calls, gate) == expected


async def test_a_rewind_to_what_is_compacted_meanwhile_is_refused(
    tmp_path: Path, calls: Any, monkeypatch: Any, gate: Gate
) -> None:
    """Else the run could never be loaded again."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"

    async def step(service: SchedulerService, number: int) -> None:
        await soon(service.report(calls.own_report(["a"], [[1.0]], number)))
        await service.settled()
        await asyncio.to_thread(service._runs._snapshots._thread.submit(lambda: None).result)

    async with open_service(url, retention=Retention(4, 10**9, 2)) as service:
        for number in range(6):
            await step(service, number)
        stalls_rewinds(monkeypatch, gate)
        rewinding = asyncio.ensure_future(service.rewind_run(calls.rewind(2)))
        await gate.reached()
        for number in range(6, 20):
            await step(service, number)
        gate.open()
        with pytest.raises(FailedPrecondition, match="can be rewound to step 1"):
            await soon(rewinding)
    async with open_service(url) as service:
        assert (await service.get_run(pb.GetRunRequest(run_id="run"))).last_step == 19


async def test_loading_runs_keeps_no_thread_from_the_others(
    tmp_path: Path, calls: Any, monkeypatch: Any, gate: Gate
) -> None:
    """Six runs that take long to load, and one that is in memory: it is answered."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    names = [f"slow-{number}" for number in range(6)]
    async with open_service(url) as service:
        for calls.run_id in (*names, "quick"):
            await service.allocate(calls.allocate())
    async with open_service(url) as service:
        await service.allocate(calls.allocate(step=1))
        load = LoadedRun.load
        slow = gate.before(load, lambda reading, *_: reading.run.run_id.startswith("slow"))
        monkeypatch.setattr(LoadedRun, "load", slow)
        loading = [
            asyncio.ensure_future(service.get_run(pb.GetRunRequest(run_id=name))) for name in names
        ]
        await gate.reached(2)
        for step in range(2, 5):
            await soon(service.allocate(calls.allocate(step=step)))
            await soon(service.get_run(pb.GetRunRequest(run_id="quick")))
        assert not any(call.done() for call in loading)
        gate.open()
        assert [(await call).run_id for call in loading] == names


async def test_sorting_many_prompts_for_a_list_does_not_hold_the_run(
    service: SchedulerService, calls: Any, monkeypatch: Any, gate: Gate
) -> None:
    """Whoever looks at the statistics of a million prompts costs the trainer no step."""
    ids = [f"prompt-{number * 7919 % 6007:04}" for number in range(6007)]
    await service.report(calls.own_report(ids, [[1.0]] * len(ids)))
    slow = gate.before(IdOrder.extended, lambda order, _ids: order.rows.size == 0)
    monkeypatch.setattr(IdOrder, "extended", slow)
    request = pb.ListPromptStatsRequest(run_id="run", page_size=5)
    listing = asyncio.ensure_future(service.list_prompt_stats(request))
    await gate.reached()
    made = await soon(service.allocate(calls.allocate(["prompt-0000-a", "b"], step=1)))
    await soon(service.report(calls.report(made.allocation_id, [[1.0], [0.0]])))
    gate.open()
    page = await soon(listing)
    assert page.prompt_ids == sorted([*ids, "prompt-0000-a", "b"])[:5]


async def test_a_store_that_stalls_is_read_and_refuses_what_it_cannot_write(
    service: SchedulerService, calls: Any, monkeypatch: Any, gate: Gate
) -> None:
    """Writes of many runs hang: reads are answered, further writes are told to try again.

    That is no failure of the store, and is not counted as one.
    """
    registry = CollectorRegistry()
    service.events.listen(Metrics(registry))
    names = [f"run-{number}" for number in range(8)]
    for calls.run_id in names:
        await service.allocate(calls.allocate())
    for name in ("append", "writing"):
        stalled = gate.before(getattr(Journal, name), lambda *_: True)
        monkeypatch.setattr(Journal, name, stalled)
    monkeypatch.setattr(service._runs._writers, "_patience", 0.05)
    monkeypatch.setattr(service._runs._turns, "_patience", 0.05)
    hanging, requests = [], []
    for calls.run_id in names[:4]:
        requests.append(calls.allocate(step=1))
        hanging.append(asyncio.ensure_future(service.allocate(requests[-1])))
    await gate.reached(4)
    for name in names[4:]:
        assert (await soon(service.get_run(pb.GetRunRequest(run_id=name)))).run_id == name
        await soon(service.list_prompt_stats(pb.ListPromptStatsRequest(run_id=name)))
    calls.run_id = names[7]
    refused = calls.allocate(step=1)
    with pytest.raises(Busy, match="threads for writes of runs were busy"):
        await soon(service.allocate(refused))
    with pytest.raises(Busy, match="calls of run 'run-0' before this one took longer"):
        await soon(service.allocate(requests[0]))
    gate.open()
    answers = [await soon(call) for call in hanging]
    # What hung was done once, and what was refused not at all.
    assert [await soon(service.allocate(request)) for request in requests] == answers
    await soon(service.allocate(refused))
    totals = [(await service.get_run(pb.GetRunRequest(run_id=name))).last_step for name in names]
    assert totals == [1, 1, 1, 1, 0, 0, 0, 1]
    counted = {name: registry.get_sample_value(f"knapsack_scheduler_store_{name}_total")
               for name in ("busy", "failures")}  # fmt: skip
    assert counted == {"busy": 1, "failures": 0}


async def test_listing_loads_no_run_that_has_not_changed(tmp_path: Path, calls: Any) -> None:
    """Else each look at the list would drive runs in use out of memory."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url) as service:
        for calls.run_id in ("a", "b", "c"):
            await service.report(calls.own_report(["x"], [[1.0]]))
    async with open_service(url, loaded_bytes=1) as service:
        loads = counted_loads(service)
        listed = await service.list_runs(pb.ListRunsRequest())
        assert await service.list_runs(pb.ListRunsRequest()) == listed
        assert loads == ["a", "b", "c"]
        calls.run_id = "b"
        await service.report(calls.own_report(["x"], [[1.0]]))
        await service.delete_run(pb.DeleteRunRequest(run_id="c"))
        await service.create_run(pb.CreateRunRequest(run_id="c"))
        runs = (await service.list_runs(pb.ListRunsRequest())).runs
        assert [(run.run_id, run.total_rollouts) for run in runs] == [("a", 1), ("b", 2), ("c", 0)]
        assert runs[0] == listed.runs[0]
        assert "a" not in loads[3:]


def counted_loads(service: SchedulerService) -> list[str]:
    """Return the names of the runs that are loaded from now on, as they are."""
    fetch, loads = service._runs._fetch, []

    def counted(run_id: str) -> LoadedRun:
        run = fetch(run_id)
        loads.append(run_id)
        return run

    service._runs._fetch = counted
    return loads


async def answers_of_many_runs(calls: Any, **more: Any) -> tuple[list[Any], int, int]:
    """Return what steps of 80 runs in turn are answered, the loads, and the most bytes."""
    most, answers = 0, []
    async with open_service("sqlite://", **more) as service:
        loads = counted_loads(service)
        for step in range(2):
            for number in range(80):
                calls.run_id = f"run-{number}"
                made = await service.allocate(
                    calls.allocate(["a", f"b{number}"], 8, step, f"{step}")
                )
                await service.report(calls.report(made.allocation_id, [[1.0], [0.0]], f"{step}"))
                answers.append(list(made.num_rollouts))
                most = max(most, service.loaded_bytes)
    return answers, len(loads), most


async def test_runs_in_memory_are_bounded_by_their_bytes(calls: Any) -> None:
    """More runs than fit are read again, to the same answers; those that fit never are."""
    answers, loads, most = await answers_of_many_runs(calls)
    # The first call of each created it.
    assert loads == 80
    bound = most // 4
    fewer, loads, less = await answers_of_many_runs(calls, loaded_bytes=bound)
    assert (fewer, less <= bound) == (answers, True)
    assert loads > 120


def test_what_is_let_go_of_is_what_was_unused_for_longest() -> None:
    """The run that was used last stays, also when it alone is more than the bound."""

    class Sized:
        def __init__(self, size: int) -> None:
            self.bytes = size

    runs = LoadedRuns(100)
    for name, size in (("a", 40), ("b", 40)):
        runs.keep(name, Sized(size))
    runs.keep("a", runs.take("a"))
    runs.keep("c", Sized(40))
    assert (list(runs), runs.bytes) == (["a", "c"], 80)
    runs.keep("large", Sized(500))
    assert (list(runs), runs.bytes) == (["large"], 500)
    runs.keep("a", Sized(1))
    assert (list(runs), runs.bytes) == (["a"], 1)


async def test_a_run_takes_about_the_memory_that_is_counted_for_it(calls: Any) -> None:
    """Many prompts, many calls and large allocations, each as the interpreter measures it."""
    ids = [f"dataset/prompt-{number:06}" for number in range(20_000)]
    async with open_service("sqlite://") as service:
        await service.report(calls.own_report(["warm"], [[1.0]]))
        tracemalloc.start()
        try:
            for step, rewards in ((0, [1.0, 0.0]), (1, [0.0])):
                await service.report(calls.own_report(ids, [rewards] * len(ids), step))
            for step in range(2, 22):
                made = await service.allocate(calls.allocate(ids[:2000], 4000, step))
                await service.report(calls.report(made.allocation_id, [[1.0]] * 2000))
            del made
            await service._runs.settled()
            gc.collect()
            used, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert 0.6 < used / service.loaded_bytes < 1.3

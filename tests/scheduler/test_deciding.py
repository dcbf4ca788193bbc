"""A call is decided outside its transaction, and what it is answered is true at its commit."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import allocating
from knapsack_scheduler import service as service_module
from knapsack_scheduler.calls import Call
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import (
    AlreadyExists,
    Busy,
    InvalidArgument,
    NotFound,
    StoreInterrupted,
)
from knapsack_scheduler.journal.compaction import Retention, compact
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.transaction import Writing
from knapsack_scheduler.service import SchedulerService
from knapsack_scheduler.workers import Workers

from gates import Gate, soon

IDS = [f"prompt-{number}" for number in range(8)]


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is decided as a large one is."""
    monkeypatch.setattr(service_module, "_FEW", 0)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'stats.db'}"
    return str(request.getfixturevalue("postgres").new_store())


@pytest.fixture
async def replicas(postgres: Any) -> AsyncIterator[tuple[SchedulerService, SchedulerService]]:
    """Two services on one database, with a run."""
    async with two_services(postgres.new_store()) as both:
        yield both


@asynccontextmanager
async def two_services(store: str) -> AsyncIterator[tuple[SchedulerService, SchedulerService]]:
    """Yield two services that have both loaded the run "run"."""
    async with open_service(store) as one, open_service(store) as two:
        for service in (one, two):
            await service.create_run(pb.CreateRunRequest(run_id="run"))
        yield one, two


def stalls_writing(service: SchedulerService, gate: Gate) -> None:
    """Let the transactions of one service wait at a gate before they begin."""
    journal = service._journal
    for name in ("writing", "append"):
        setattr(journal, name, gate.before(getattr(journal, name), lambda *_: True))


def entries_of(service: SchedulerService) -> list[tuple[str, str]]:
    """Return kind and id of the recorded calls, in their order."""
    with service._journal.reading("run") as reading:
        return [(entry.kind, entry.key) for entry in reading.outline()]


def is_held(service: SchedulerService) -> bool:
    """Return whether somebody holds the run's row on PostgreSQL."""
    free = "SELECT 1 FROM runs WHERE run_id = 'run' FOR UPDATE SKIP LOCKED"
    with service._journal.transaction() as connection:
        return connection.execute(sa.text(free)).first() is None


def rewards_for(made: pb.Allocation) -> list[list[float]]:
    """Return a success and failures for each position."""
    return [[1.0, *[0.0] * (n - 1)] for n in made.num_rollouts]


def stalls_decisions(monkeypatch: pytest.MonkeyPatch, gate: Gate, total_rollouts: int) -> list[int]:
    """Let allocations of this budget wait at a gate while they are decided.

    Returns a list that grows by one with each.
    """
    plan = allocating.plan_allocation
    decided: list[int] = []

    def is_gated(*arguments: Any) -> bool:
        if arguments[4].total_rollouts != total_rollouts:
            return False
        decided.append(total_rollouts)
        return True

    monkeypatch.setattr(allocating, "plan_allocation", gate.before(plan, is_gated))
    return decided


async def run_and_stats(service: SchedulerService) -> tuple[bytes, bytes]:
    """Return what a service knows of the run."""
    run = await soon(service.get_run(pb.GetRunRequest(run_id="run")))
    page = await soon(service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run")))
    return run.SerializeToString(), page.SerializeToString()


@pytest.mark.parametrize("few", [4, 8])
async def test_a_long_decision_holds_up_no_other_run(
    store: str, calls: Any, monkeypatch: pytest.MonkeyPatch, gate: Gate, few: int
) -> None:
    """Of a large batch or a small one: other runs are reported to, allocated for and made."""
    monkeypatch.setattr(service_module, "_FEW", few)
    async with open_service(store) as service:
        for calls.run_id in ("slow-0", "slow-1", "quick"):
            await service.report(calls.own_report(IDS, [[1.0, 0.0]] * 8))
        stalls_decisions(monkeypatch, gate, 77)
        held = []
        for calls.run_id in ("slow-0", "slow-1"):
            held.append(asyncio.ensure_future(service.allocate(calls.allocate(IDS, 77, 1))))
        await gate.reached(2)
        for calls.run_id in ("quick", "new"):
            await soon(service.report(calls.own_report(IDS, [[1.0]] * 8)))
            made = await soon(service.allocate(calls.allocate(IDS[:4], 32, 1)))
            report = calls.report(made.allocation_id, rewards_for(made))
            assert (await soon(service.report(report))).accepted_rollouts == 32
        assert not any(call.done() for call in held)
        gate.open()
        assert [(await soon(call)).allocated_rollouts for call in held] == [77, 77]


async def test_a_small_call_is_handed_to_one_thread(
    tmp_path: Path, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which decides and stores it; a large one is checked, decided and stored by one each."""
    kinds: list[str] = []
    run = Workers.run

    async def noted(workers: Workers, *work: Any) -> Any:
        kinds.append(workers._kind)
        return await run(workers, *work)

    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}") as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        monkeypatch.setattr(Workers, "run", noted)
        for few, expected in ((8, ["writes"]), (7, ["reads", "decisions", "writes"])):
            monkeypatch.setattr(service_module, "_FEW", few)
            await service.allocate(calls.allocate(IDS, 32))
            await service.settled()
            # The last one folds.
            assert kinds == [*expected, "reads"]
            kinds.clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Call]]]:
    """Calls as they are made, while nothing collects circles of references."""
    calls_made: list[weakref.ref[Call]] = []
    init = Call.__init__

    def noted(call: Call, *arguments: Any) -> None:
        init(call, *arguments)
        calls_made.append(weakref.ref(call))

    monkeypatch.setattr(Call, "__init__", noted)
    gc.collect()
    gc.disable()
    yield calls_made
    gc.enable()


@pytest.mark.parametrize("few", [4, 8])
async def test_a_refused_call_is_let_go_of_at_once(
    calls: Any, monkeypatch: pytest.MonkeyPatch, made: list[weakref.ref[Call]], few: int
) -> None:
    """Its error holds no circle of references, in which a request of many megabytes would stay."""
    monkeypatch.setattr(service_module, "_FEW", few)
    # At its end no thread is left that could be about to let go.
    async with open_service("sqlite://") as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        with suppress(InvalidArgument):
            await service.allocate(calls.allocate(IDS, 1))
    assert [call() for call in made] == [None]


@pytest.mark.parametrize("waits_for", ["_writers", "_turns"])
async def test_a_call_whose_wait_was_in_vain_is_let_go_of_at_once(
    calls: Any,
    monkeypatch: pytest.MonkeyPatch,
    made: list[weakref.ref[Call]],
    gate: Gate,
    waits_for: str,
) -> None:
    """For a thread, or for a call of its run that came before."""
    async with open_service("sqlite://") as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        runs = service._runs
        monkeypatch.setattr(getattr(runs, waits_for), "_patience", 0.0)
        stalled = gate.before(lambda: None, lambda: True)
        held = [asyncio.ensure_future(runs._writers.run(stalled)) for _ in range(4)]
        await gate.reached(4)
        if waits_for == "_turns":
            await runs._turns.take("run")
        with suppress(Busy):
            await service.allocate(calls.allocate(IDS, 64))
        if waits_for == "_turns":
            runs._turns.end("run")
        gate.open()
        await asyncio.gather(*held)
    assert [call() for call in made] == [None]


async def test_a_decision_that_another_replica_overtakes_is_made_anew(
    postgres: Any, calls: Any, all_large: None, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Its run goes on meanwhile through others, and the answer is that of the last in line."""
    warm = calls.own_report(IDS, [[1.0, 0.0, 0.0]] * 8)
    between = calls.own_report(IDS[:4], [[1.0] * 6] * 4, step=1)
    request = calls.allocate(IDS, 77, 2, "held")
    async with two_services(postgres.new_store()) as (one, two):
        for call in (warm, between):
            await two.report(call)
        expected = await one.allocate(request)
    async with two_services(postgres.new_store()) as (one, two):
        await one.report(warm)
        decided = stalls_decisions(monkeypatch, gate, 77)
        held = asyncio.ensure_future(one.allocate(request))
        await gate.reached()
        await soon(two.report(between))
        made = await soon(two.allocate(calls.allocate(IDS, 32, 1)))
        assert made.allocated_rollouts == 32
        assert not held.done()
        gate.open()
        assert list((await soon(held)).num_rollouts) == list(expected.num_rollouts)
        assert len(decided) == 2
        assert [kind for kind, _ in entries_of(one)] == ["report", "report", "allocate", "allocate"]
        assert await run_and_stats(one) == await run_and_stats(two)


async def test_a_decision_that_is_always_overtaken_comes_to_an_end(
    replicas: tuple[SchedulerService, SchedulerService],
    calls: Any,
    all_large: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After three attempts it is made with the run held, when nobody can overtake it."""
    one, two = replicas
    loop = asyncio.get_running_loop()
    plan = allocating.plan_allocation
    held: list[bool] = []

    def overtaken(*arguments: Any) -> Any:
        held.append(is_held(two))
        if not held[-1]:
            report = two.report(calls.own_report(IDS, [[1.0, 0.0]] * 8, step=len(held)))
            asyncio.run_coroutine_threadsafe(report, loop).result(30)
        return plan(*arguments)

    monkeypatch.setattr(allocating, "plan_allocation", overtaken)
    answer = await soon(one.allocate(calls.allocate(IDS, 77, 4)))
    assert held == [False, False, False, True]
    assert answer.summary.unseen_prompts == 0
    assert [kind for kind, _ in entries_of(two)] == ["report"] * 3 + ["allocate"]


@pytest.mark.parametrize("budgets", [(77, 77), (77, 78)])
async def test_one_id_decided_by_two_replicas_at_once_is_one_call(
    replicas: tuple[SchedulerService, SchedulerService],
    calls: Any,
    all_large: None,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    budgets: tuple[int, int],
) -> None:
    """The same content gets the same answer of both, and other content is refused by one."""
    for total_rollouts in set(budgets):
        stalls_decisions(monkeypatch, gate, total_rollouts)
    requests = [calls.allocate(IDS, total_rollouts, 1, "once") for total_rollouts in budgets]
    both = [
        asyncio.ensure_future(service.allocate(request))
        for service, request in zip(replicas, requests, strict=True)
    ]
    await gate.reached(2)
    gate.open()
    answers = await asyncio.gather(*both, return_exceptions=True)
    assert entries_of(replicas[0]) == [("allocate", "once")]
    if budgets[0] == budgets[1]:
        assert answers[0] == answers[1]
    else:
        assert sorted(type(answer) for answer in answers if isinstance(answer, Exception)) == [
            AlreadyExists
        ]
    for service in replicas:
        assert (await soon(service.get_run(pb.GetRunRequest(run_id="run")))).last_step == 1


async def test_what_was_refused_of_a_run_that_moved_on_is_decided_anew(
    replicas: tuple[SchedulerService, SchedulerService], calls: Any, all_large: None, gate: Gate
) -> None:
    """An Extend before the report it needs has come, which another replica stores meanwhile."""
    one, two = replicas
    made = await one.allocate(calls.allocate(IDS, 64, wave_fraction=0.5))
    await one.settled()
    stalls_writing(one, gate)
    held = asyncio.ensure_future(one.extend(calls.extend(made.allocation_id)))
    await gate.reached()
    await soon(two.report(calls.report(made.allocation_id, rewards_for(made))))
    gate.open()
    extended = await soon(held)
    assert (extended.wave, made.allocated_rollouts + extended.allocated_rollouts) == (2, 64)


async def test_a_rewind_by_another_replica_overtakes_a_decision(
    replicas: tuple[SchedulerService, SchedulerService], calls: Any, all_large: None, gate: Gate
) -> None:
    """What was given out of an allocation that is forgotten by then is not found."""
    one, two = replicas
    made = await one.allocate(calls.allocate(IDS, 64, 1, wave_fraction=0.5))
    await one.report(calls.report(made.allocation_id, rewards_for(made)))
    await one.settled()
    stalls_writing(one, gate)
    held = asyncio.ensure_future(one.extend(calls.extend(made.allocation_id)))
    await gate.reached()
    await soon(two.rewind_run(calls.rewind(0)))
    gate.open()
    with pytest.raises(NotFound, match="was forgotten by a rewind"):
        await soon(held)
    assert [kind for kind, _ in entries_of(one)] == ["allocate", "report", "rewind"]
    assert await run_and_stats(one) == await run_and_stats(two)


async def test_a_report_of_what_is_compacted_meanwhile_is_refused(
    tmp_path: Path, calls: Any, gate: Gate
) -> None:
    """It was decided of a run in which its allocation was open still; on SQLite too."""
    retention = Retention(horizon=100, snapshot_calls=2)
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}", retention=retention) as service:
        first = await service.allocate(calls.allocate(IDS, 32))
        for step in range(1, 10):
            await service.report(calls.own_report(IDS, [[1.0]] * 8, step))
            await service.settled()
            await asyncio.to_thread(service._runs._snapshots._thread.submit(lambda: None).result)
        before = await run_and_stats(service)
        stalls_writing(service, gate)
        report = calls.report(first.allocation_id, rewards_for(first))
        held = asyncio.ensure_future(service.report(report))
        await gate.reached()
        plan = await asyncio.to_thread(
            compact, service._journal, "run", Retention(horizon=100, max_calls=1)
        )
        assert plan.floor is not None
        gate.open()
        with pytest.raises(NotFound, match="long since closed"):
            await soon(held)
        assert await run_and_stats(service) == before


async def test_a_run_made_anew_by_another_replica_is_another_run(
    replicas: tuple[SchedulerService, SchedulerService],
    calls: Any,
    all_large: None,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
) -> None:
    """As empty as the one that was decided of, and with a config of its own."""
    one, two = replicas
    stalls_decisions(monkeypatch, gate, 77)
    held = asyncio.ensure_future(one.allocate(calls.allocate(IDS, 77)))
    await gate.reached()
    await soon(two.delete_run(pb.DeleteRunRequest(run_id="run")))
    config = pb.RunConfig(policy="uniform")
    await soon(two.create_run(pb.CreateRunRequest(run_id="run", config=config)))
    gate.open()
    made = await soon(held)
    assert made.summary.policy == "uniform"
    await soon(two.report(calls.report(made.allocation_id, rewards_for(made))))


async def test_a_large_decision_whose_commit_was_cut_off_is_stored_once(
    postgres: Any, calls: Any, all_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost after the commit: the next attempt finds the answer it stored."""
    async with two_services(postgres.new_store()) as (one, two):
        journal, cut = one._journal, [True]

        @contextmanager
        def lost_once(run_id: str) -> Iterator[Writing]:
            with Journal.writing(journal, run_id) as writing:
                yield writing
            if cut and cut.pop():
                raise StoreInterrupted("the connection was lost")

        monkeypatch.setattr(journal, "writing", lost_once)
        request = calls.allocate(IDS, 77, 1, "cut-off")
        answer = await soon(one.allocate(request))
        assert cut == []
        assert entries_of(one) == [("allocate", "cut-off")]
        assert await soon(two.allocate(request)) == answer
        assert await run_and_stats(one) == await run_and_stats(two)

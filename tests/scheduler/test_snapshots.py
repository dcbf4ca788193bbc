"""A run made of a snapshot and a tail is the run made of everything, to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import FailedPrecondition, NotFound, SchedulerError, StoreUnavailable
from knapsack_scheduler.idorder import IdOrder
from knapsack_scheduler.inspection import StoreReport, check_run
from knapsack_scheduler.journal.columns import (
    ColumnsDamaged,
    decode,
    decode_text,
    encode,
    encode_text,
    text_column,
)
from knapsack_scheduler.journal.compaction import Retention, plan_compaction
from knapsack_scheduler.journal.recordedsteps import RecordedSteps
from knapsack_scheduler.journal.records import Outline, RunRow, SnapshotMark
from knapsack_scheduler.journal.snapshots import usable
from knapsack_scheduler.service import SchedulerService
from knapsack_scheduler.state import RunState

NEVER = 10**9
KEPT_ALWAYS = ("rewind_run", "import_outcomes")


def differences(a: object, b: object, path: str = "state") -> list[str]:
    """Return where two objects differ, field by field, whatever fields they have."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, np.ndarray):
        same = a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        return [] if same else [f"{path}: {a.dtype}{a.shape} and {b.dtype}{b.shape}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{path}: other keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}[{key!r}]")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    if type(a).__module__.startswith("knapsack_scheduler"):
        both = ((name, getattr(a, name), getattr(b, name)) for name in _fields(a))
        return [d for name, x, y in both for d in differences(x, y, f"{path}.{name}")]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]


def _fields(thing: object) -> list[str]:
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    return list(getattr(type(thing), "__slots__", ())) + list(getattr(thing, "__dict__", ()))


def trimmed(state: RunState) -> RunState:
    """Return the state without the room that its columns keep for more, nor its caches."""
    same = RunState(state.config)
    same.__dict__.update(state.__dict__)
    size = len(state.prompt_ids)
    same._keys = same._keys[:size]
    same._sums = same._sums[:, :size]
    same._bands = same._bands[:size]
    # Of these only what they answer counts, not how much more they remember.
    for name in ("_visited", "_revisited"):
        setattr(same, name, getattr(state, name).newest(state._visits, state._keys))
    rows = np.arange(-1, size)
    same.__dict__["_evidence"] = state._evidence.of(rows, state._visits, state.discounts)
    same._prior = same._drift = None
    same._order = IdOrder()
    # How ids are found depends on the order in which they came, and on the process.
    same._places = (state.prompt_ids, state._places.find(state.prompt_ids))
    same._looked_up = ((), 0, np.zeros(0, np.int64))
    return same


def loaded(service: SchedulerService) -> Any:
    """Return the run "run" as the service has it in memory."""
    return service._runs._loaded["run"]


async def settle(service: SchedulerService) -> None:
    """Wait until all that was answered is folded, and for the snapshot under way."""
    await service.settled()
    service._runs._snapshots._thread.submit(lambda: None).result(60)


async def lived(service: SchedulerService, calls: Any, steps: int) -> None:
    """Bring a run through some steps of everything there is."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        ids = [f"prompt-{i}-é" for i in rng.choice(40, 8)]
        answer = await service.allocate(
            calls.allocate(
                ids, 60, step, wave_fraction=0.5, max_rollouts=list(range(10, 18)),
            )
        )  # fmt: skip
        rewards = [[float(rng.integers(-1, 3)) for _ in range(n)] for n in answer.num_rollouts]
        report = calls.report(answer.allocation_id, rewards, policy_version=step)
        report.completion_tokens.extend(range(len(report.rewards)))
        await service.report(report)
        if step % 3:
            await service.extend(calls.extend(answer.allocation_id))
        await service.report(calls.own_report([f"own-{step}"], [[1.0, 0.0]], step))
    late = await service.allocate(calls.allocate(["lost"], 4, steps))
    await service.rewind_run(calls.rewind(steps - 1))
    await service.report(calls.report(late.allocation_id, [[1.0]]))
    await service.settled()


async def test_a_state_from_columns_is_the_state(calls) -> None:
    """Field by field, through the bytes of a snapshot; a field that is forgotten differs."""
    async with open_service("sqlite://") as service:
        await lived(service, calls, 7)
        state = loaded(service).state
        frozen = state.frozen()
        again = RunState.from_columns(state.config, decode(encode(frozen())))
        assert differences(trimmed(state), trimmed(again)) == []
        # None is as it is in a new run, where its loss would not be seen.
        fresh = RunState(state.config)
        same = [
            name
            for name in _fields(fresh)
            if not differences(getattr(fresh, name), getattr(again, name))
        ]
        assert same == ["config", "discounts", "_looked_up", "_order"]
        # What is frozen does not change with the state.
        await lived(service, calls, 9)
        await service.report(calls.own_report(["prompt-1-é", "new"], [[1.0], [0.0]], 20))
        await service.settled()
        late = RunState.from_columns(state.config, decode(encode(frozen())))
        assert differences(trimmed(late), trimmed(again)) == []
        assert differences(trimmed(state), trimmed(again)) != []


async def test_a_snapshot_from_before_the_histogram_prior_is_the_state(calls) -> None:
    """It lacks who was visited last, has sums of no use any more, and is read all the same."""
    async with open_service("sqlite://") as service:
        await lived(service, calls, 7)
        state = loaded(service).state
        columns = state.columns()
        scalars = json.loads(columns["scalars"].tobytes())
        scalars["_prior_statistics"] = {"prompts": 40}
        columns["scalars"] = text_column(json.dumps(scalars))
        older = {name: c for name, c in columns.items() if not name.startswith("visited.")}
        again = RunState.from_columns(state.config, decode(encode(older)))
        assert differences(trimmed(state), trimmed(again)) == []
        assert again.prior() == state.prior()


COLUMNS = st.dictionaries(
    st.text(max_size=5),
    hnp.arrays(
        st.sampled_from(["<i8", "<i4", "<u8", "|u1", "<f4", "<f8", "|b1"]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(columns=COLUMNS, texts=st.lists(st.text(max_size=8), max_size=8))
def test_columns_come_back_as_they_went(columns: Any, texts: list[str]) -> None:
    """Every type, shape and number, not-a-numbers and empty ones among them."""
    back = decode(encode(columns))
    assert list(back) == list(columns)
    for name, column in columns.items():
        assert back[name].dtype == column.dtype
        np.testing.assert_array_equal(back[name], column)
    assert decode_text(*encode_text(texts)) == texts


def test_large_columns_are_cut_into_parts() -> None:
    """So that nobody has to wait for one commit of them all; and narrow ones stay small."""
    noise = np.random.default_rng(0).integers(0, 2**62, 3 * 2**20)
    parts = list(encode({"noise": noise, "small": np.arange(2**20) % 100}))
    assert len(parts) > 4
    assert max(map(len, parts)) < 2**24
    assert sum(map(len, parts)) < noise.nbytes + 2**21
    back = decode(parts)
    assert np.array_equal(back["noise"], noise)
    for wrong in (parts[:-1], parts[1:], [*parts, b"more"], [parts[0], *parts[2:]], []):
        with pytest.raises(ColumnsDamaged):
            decode(wrong)


async def _stream(messages: list[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


class Twins:
    """The same calls to a run that is compacted as soon as may be and to one that never is."""

    def __init__(self, small: SchedulerService, whole: SchedulerService, horizon: int) -> None:
        self.services = (small, whole)
        self.horizon = horizon
        self.step = self.peak = 0
        self.made: list[tuple[str, Any, int]] = []
        self.open: dict[str, tuple[int, int]] = {}
        self.lost: dict[str, int] = {}
        self._numbers = itertools.count()

    def next_id(self) -> str:
        """Return a new id."""
        return f"id-{next(self._numbers)}"

    async def call(self, method: str, request: Any, step: int) -> Any:
        """Make a call on both; they must answer the same."""
        answers = []
        for service in self.services:
            try:
                asked = _stream(request) if method == "import_outcomes" else request
                answer = await getattr(service, method)(asked)
                if isinstance(answer, pb.Run):
                    answer.ClearField("create_time")
                answers.append(answer)
            except SchedulerError as error:
                answers.append((type(error), str(error)))
            await settle(service)
        assert answers[0] == answers[1], (method, request)
        self.made.append((method, request, step))
        return answers[0]

    def recent(self) -> list[str]:
        """Return the allocations that both must know, or know to be forgotten."""
        after = self.peak - self.horizon
        known = [name for name, (step, _) in self.open.items() if step > after]
        return known + [name for name, kept in self.lost.items() if kept > after]

    async def allocate(self, forward: int, first: int, wave: float) -> None:
        """Go on by some steps and allocate."""
        self.step += forward
        self.peak = max(self.peak, self.step)
        ids = [f"p{(first + i) % 7}" for i in range(3)]
        request = pb.AllocateRequest(
            run_id="run", step=self.step, request_id=self.next_id(), prompt_ids=ids,
            total_rollouts=12, wave_fraction=wave,
        )  # fmt: skip
        answer = await self.call("allocate", request, self.step)
        self.open[answer.allocation_id] = (self.step, 3)

    async def report(self, which: int, rewards: int) -> None:
        """Report a part of an allocation, forgotten or not."""
        names = self.recent()
        if not names:
            return
        request = pb.ReportRequest(
            run_id="run", allocation_id=names[which % len(names)], report_id=self.next_id(),
            policy_version=self.step, prompt_indices=[which % 3], num_rewards=[1 + rewards % 2],
            rewards=[float(rewards & 1), float(rewards & 2)][: 1 + rewards % 2],
        )  # fmt: skip
        await self.call("report", request, self.open.get(names[which % len(names)], (-1,))[0])

    async def own(self, back: int, rewards: int) -> None:
        """Report what was not allocated, of a step back."""
        step = max(self.step - back, 0, self.peak - self.horizon + 1)
        request = pb.ReportRequest(
            run_id="run", report_id=self.next_id(), step=step, policy_version=step,
            prompt_ids=[f"p{rewards}"], prompt_indices=[0], num_rewards=[2],
            rewards=[float(rewards & 1), 1.0], completion_tokens=[rewards, 5],
        )  # fmt: skip
        self.step = max(self.step, step)
        self.peak = max(self.peak, step)
        await self.call("report", request, step)

    async def extend(self, which: int, running: bool) -> None:
        """Ask for a further wave."""
        names = self.recent()
        if not names:
            return
        request = pb.ExtendRequest(
            run_id="run", allocation_id=names[which % len(names)], request_id=self.next_id(),
            keep_outstanding=running,
        )  # fmt: skip
        await self.call("extend", request, self.open.get(names[which % len(names)], (-1,))[0])

    async def rewind(self, back: int) -> None:
        """Go back some steps."""
        step = max(self.step - back, self.peak - self.horizon, -1)
        request = pb.RewindRunRequest(run_id="run", step=step, request_id=self.next_id())
        await self.call("rewind_run", request, step)
        for name, (made, _) in list(self.open.items()):
            if made > step:
                del self.open[name]
                self.lost[name] = step
        self.lost = {name: min(kept, step) for name, kept in self.lost.items()}
        self.made = [call for call in self.made if call[2] <= step]
        self.step = max(step, 0)

    async def anew(self) -> None:
        """Go back to before all steps."""
        known = self.recent()
        request = pb.RewindRunRequest(run_id="run", step=-1, request_id=self.next_id())
        await self.call("rewind_run", request, -1)
        self.open, self.lost = {}, dict.fromkeys(known, -1)
        self.made = [call for call in self.made if call[2] < 0]
        self.step = self.peak = 0

    async def earlier(self, first: int) -> None:
        """Import outcomes of an earlier run, which no rewind forgets."""
        message = pb.ImportOutcomesRequest(
            run_id="run", request_id=self.next_id(), prompt_ids=[f"p{first}"], num_rewards=[2],
            rewards=[0.0, float(first % 3)], step=first,
        )  # fmt: skip
        await self.call("import_outcomes", [message], -1)

    async def repeat(self, back: int) -> None:
        """Make a call again."""
        known = [c for c in self.made if c[2] > self.peak - self.horizon or c[0] in KEPT_ALWAYS]
        if known:
            await self.call(*known[-1 - back % len(known)])

    async def restart(self) -> None:
        """Forget what is in memory."""
        for service in self.services:
            await settle(service)
            service._runs._loaded.clear()

    async def compare(self) -> None:
        """Everything that can be asked, and everything that is in memory."""
        for name in ("list_prompt_stats", "get_run"):
            kind = pb.ListPromptStatsRequest if name == "list_prompt_stats" else pb.GetRunRequest
            await self.call(name, kind(run_id="run"), 0)
        small, whole = (trimmed(loaded(service).state) for service in self.services)
        assert set(small.allocations) <= set(whole.allocations)
        assert set(small.allocations) >= set(self.recent()) - set(self.lost)
        whole.allocations = {name: whole.allocations[name] for name in small.allocations}
        assert differences(small, whole) == []
        for service in self.services:
            report = StoreReport()
            check_run(service._journal, "run", report)
            assert report.faults == []


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("allocate"), st.integers(0, 2), st.integers(0, 6), st.sampled_from([0, 0.5])
        ),
        st.tuples(st.just("report"), st.integers(0, 9), st.integers(0, 3)),
        st.tuples(st.just("own"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("extend"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("rewind"), st.integers(0, 3)),
        st.tuples(st.just("repeat"), st.integers(0, 9)),
        st.tuples(st.just("restart")),
        st.tuples(st.just("anew")),
        st.tuples(st.just("earlier"), st.integers(0, 6)),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(operations=OPERATIONS, horizon=st.integers(1, 4), every=st.integers(1, 3))
async def test_a_compacted_run_answers_as_one_that_is_not(
    operations: list[Any], horizon: int, every: int
) -> None:
    """Calls of any kind in any order, rewinds, late reports and restarts among them."""
    with pytest.MonkeyPatch.context() as patch:
        # Names of allocations are made of it.
        patch.setattr("knapsack_scheduler.journal.journal.secrets.randbits", lambda _: 7)
        async with (
            open_service("sqlite://", retention=Retention(horizon, NEVER, every)) as small,
            open_service("sqlite://", retention=Retention(NEVER, NEVER, NEVER)) as whole,
        ):
            twins = Twins(small, whole, horizon)
            await twins.allocate(0, 0, 0)
            for name, *arguments in operations:
                await getattr(twins, name)(*arguments)
            await twins.compare()
            await twins.restart()
            await twins.compare()
            await twins.allocate(1, 3, 0.5)


async def test_memory_and_disk_of_a_long_run_are_bounded(tmp_path: Path, calls) -> None:
    """Allocations, ids, entries and snapshots: those of little more than the horizon."""
    horizon, every = 8, 4
    url = f"sqlite:///{tmp_path / 's.db'}"
    seen = []
    async with open_service(url, retention=Retention(horizon, NEVER, every)) as service:
        for step in range(60):
            answer = await service.allocate(calls.allocate(["a", "b"], 8, step))
            await service.report(calls.report(answer.allocation_id, [[1.0], [0.0]]))
            if step % 20 == 19:
                await service.rewind_run(calls.rewind(step - 3))
            await settle(service)
            run = loaded(service)
            with service._journal.reading("run") as reading:
                seen.append(
                    (
                        len(run.state.allocations),
                        run.recognised - len([e for e in reading.outline() if e.kind == "rewind"]),
                        len([e for e in reading.outline() if e.kind != "rewind"]),
                        len(reading.snapshots()),
                    )
                )
    # A quarter of the horizon on top of it, what comes between two snapshots, and what a
    # rewind took away.
    steps = horizon + horizon // 4 + every + 4
    assert max(number[0] for number in seen) <= steps
    assert max(number[1] for number in seen) <= 2 * steps
    assert max(number[2] for number in seen) <= 2 * steps
    assert max(number[3] for number in seen) <= 4 + 4
    assert run.row.floor_step >= 60 - 3 - steps


def marks_of(*steps_and_seqs: tuple[int, int]) -> list[SnapshotMark]:
    """Return marks with these numbers and steps."""
    return [SnapshotMark(seq, step, 1, 1, b"") for seq, step in steps_and_seqs]


def rewind(seq: int, step: int) -> Outline:
    """Return a rewind's outline."""
    return Outline(seq, "rewind", "", 0, step, b"")


def reports(*steps_and_seqs: tuple[int, int]) -> list[Outline]:
    """Return the outlines of reports with these steps and numbers."""
    return [Outline(seq, "report", "", 0, step, b"") for step, seq in steps_and_seqs]


class Compacted:
    """A run that gets a snapshot at every few calls and is compacted at once, in outline."""

    def __init__(self, retention: Retention, every: int) -> None:
        self.retention = retention
        self.every = every
        self.row = RunRow(1, "run", b"", 0)
        self.marks: list[SnapshotMark] = []
        self.outline: list[Outline] = []

    def call(self, step: int, kind: str = "report") -> None:
        """Record a call."""
        seq = self.row.last_seq + 1
        self.row = dataclasses.replace(self.row, last_seq=seq)
        self.outline.append(Outline(seq, kind, "", 0, step, b""))
        if seq % self.every:
            return
        self.marks += marks_of((seq, step))
        plan = plan_compaction(self.row, self.marks, self.outline, self.retention)
        self.marks = [mark for mark in self.marks if mark.seq not in plan.drop]
        if plan.floor:
            self.row = dataclasses.replace(
                self.row,
                floor_seq=plan.floor.seq,
                floor_step=plan.floor_step,
                closed_step=max(self.row.closed_step, plan.closed_step),
            )
            self.outline = [
                each for each in self.outline if each.seq > plan.floor.seq or each.kind == "rewind"
            ]

    def can_go_back(self, step: int) -> bool:
        """Return whether a rewind finds a snapshot to begin with, or all that was recorded."""
        return self.row.floor_seq == 0 or bool(usable(self.marks, self.row, self.outline, step))

    def gap(self, step: int) -> int:
        """Return the calls that a rewind to a step has to fold."""
        found = usable(self.marks, self.row, self.outline, step)
        kept = [e.seq for e in self.outline if e.step <= step]
        return len([seq for seq in kept if seq > (found[-1].seq if found else 0)])


def test_what_is_kept_reaches_back_the_horizon_and_no_further() -> None:
    """As snapshots come one by one, the floor follows at one to one and a quarter horizons."""
    run = Compacted(Retention(horizon=100, max_calls=NEVER), 7)
    for step in range(1000):
        run.call(step)
        assert len(run.marks) <= 8
        if step > 150:
            assert run.marks[0].seq == run.row.floor_seq
            assert 100 - 7 <= step - run.row.floor_step <= 132 + 7
            assert run.row.closed_step == run.row.floor_step
        # Whatever step is asked for, a snapshot little more than a quarter before it is there.
        if step % 7 == 6:
            assert all(run.gap(asked) <= 32 for asked in range(max(step - 100, 0), step))


def test_steps_are_counted_whatever_their_numbers() -> None:
    """A trainer that names steps by samples goes back as many steps as one that counts by 1."""
    by_one, by_many = (Compacted(Retention(horizon=40, max_calls=NEVER), 5) for _ in range(2))
    for step in range(300):
        by_one.call(step)
        by_many.call(2048 * step)
        assert [mark.seq for mark in by_many.marks] == [mark.seq for mark in by_one.marks]
        assert by_many.row.floor_step == max(2048 * by_one.row.floor_step, -1)


def test_one_step_far_beyond_the_others_is_one_step() -> None:
    """Every step of the horizon can be gone back to, and what is kept stays bounded."""
    run = Compacted(Retention(horizon=60, max_calls=NEVER), 7)
    for step in range(400):
        if step in (200, 210, 330):
            run.call(2**40 + step)
        run.call(step)
        # There are two of them within a horizon, at most.
        assert all(run.can_go_back(asked) for asked in range(max(step - 58, 0), step + 1))
        assert run.row.closed_step <= max(step - 58, -1)
        assert len(run.outline) <= 60 + 15 + 21
        assert len(run.marks) <= 9
    # The first two were never taken back: they are compacted, and hold up nothing.
    assert 400 - 60 - 15 - 21 <= run.row.floor_step <= 400 - 60


def test_a_rewind_takes_a_step_far_beyond_the_others_back() -> None:
    """What it left in snapshots goes with it, and the floor moves on as if it had not been."""
    run = Compacted(Retention(horizon=100, max_calls=NEVER), 7)
    for step in range(300):
        run.call(step)
    for _ in range(14):
        run.call(2**40)
    with_it = [mark.seq for mark in run.marks if mark.seq > 300]
    run.call(299, "rewind")
    assert with_it
    assert not set(with_it) & {mark.seq for mark in usable(run.marks, run.row, run.outline)}
    for step in range(300, 600):
        run.call(step)
        assert all(run.can_go_back(asked) for asked in range(step - 98, step + 1))
    assert 600 - 140 <= run.row.floor_step <= 500


def test_a_store_that_was_compacted_up_to_such_a_step_recovers() -> None:
    """An older scheduler let nothing be gone back to below it; a horizon later all is well."""
    run = Compacted(Retention(horizon=50, max_calls=NEVER), 5)
    run.row = dataclasses.replace(run.row, last_seq=100, floor_seq=100, floor_step=2**40)
    run.marks = marks_of((100, 2**40))
    for step in range(1000, 1200):
        assert not run.can_go_back(step - 1) or step > 1000 + 50
        run.call(step)
        assert run.can_go_back(step) or step < 1000 + 50 + 12 + 10
    assert all(run.can_go_back(asked) for asked in range(1200 - 50, 1200))
    assert len(run.outline) <= 50 + 12 + 10


def test_a_run_that_begins_again_at_lower_steps_is_compacted() -> None:
    """Its trainer forgot to rewind: what came before is not waited for for ever."""
    run = Compacted(Retention(horizon=50, max_calls=NEVER), 5)
    for step in range(1000, 1300):
        run.call(step)
    for step in range(300):
        run.call(step, "allocate")
    assert len(run.outline) <= 50 + 12 + 10
    assert run.can_go_back(260)


def test_late_reports_of_compacted_steps_begin_none() -> None:
    """Else a newer step would be taken for one far beyond the others, and a rewind leave it."""
    run = Compacted(Retention(horizon=4, max_calls=NEVER), 12)
    made: dict[int, int] = {}
    for step in range(40):
        run.call(step, "allocate")
        made[step] = run.row.last_seq
        for late in range(max(step - 9, 0), step):
            # Of those that are compacted nothing is taken.
            if made[late] > run.row.floor_seq:
                run.call(late)
        assert not RecordedSteps.of(run.row, run.outline, run.marks).settled(4)


def test_a_run_whose_step_stands_still_is_compacted_by_its_calls() -> None:
    """No report of it is refused for that; a rewind there is nothing to go back to."""
    run = Compacted(Retention(horizon=100, max_calls=1000), 50)
    for _ in range(10_000):
        run.call(0)
        assert run.row.closed_step < 0
        assert len(run.marks) <= 8
        assert run.row.last_seq - run.row.floor_seq <= 1300


@pytest.mark.parametrize("late", [0, 3])
def test_a_run_whose_steps_pass_slowly_closes_what_its_calls_compacted(late: int) -> None:
    """Whose calls are all forgotten, but no step that calls still come of, a mistake's included."""
    run = Compacted(Retention(horizon=100, max_calls=1000), 50)
    calls: list[int] = []
    for number in range(10_000):
        step = max(number // 250 - late * (number % 9 == 0), 0)
        step = 90_000 if number == 5000 else step
        run.call(step)
        calls.append(step)
        floor, closed = run.row.floor_seq, run.row.closed_step
        assert all(step > closed for step in calls[-1000:])
        assert closed <= run.row.floor_step
        if number % 500 == 499:
            kept = min(calls[floor:])
            assert all(step <= closed or step >= kept for step in calls[:floor])
    assert closed >= 40 - 7 - late


def test_a_snapshot_of_what_a_rewind_forgot_is_dropped() -> None:
    """And the floor is never one of them, nor the newest snapshot, which may be damaged."""
    marks = marks_of((10, 5), (20, 10), (40, 6), (50, 7))
    outline = [*reports((5, 10), (10, 20)), rewind(30, 6), *reports((6, 40), (7, 50))]
    later = [*outline, *reports(*((step, 40 + step) for step in range(11, 21)))]
    row = RunRow(1, "run", b"", 0, last_seq=60)
    plan = plan_compaction(row, marks, later, Retention(1000, NEVER))
    assert (plan.drop, plan.floor) == ((20,), None)
    plan = plan_compaction(row, marks, later, Retention(10, NEVER))
    assert (plan.drop, plan.floor) == ((10, 20), marks[2])


@pytest.fixture
async def compacted(tmp_path: Path, calls) -> str:
    """URL of a store with a run of 30 steps that goes back about 8 of them."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    async with open_service(url, retention=Retention(8, NEVER, 3)) as service:
        await service.report(calls.own_report(["once"], [[1.0]], 0, report_id="first"))
        for step in range(30):
            answer = await service.allocate(calls.allocate(["a", "b"], 8, step, f"allocate-{step}"))
            await service.report(calls.report(answer.allocation_id, [[1.0], [0.0]]))
            await settle(service)
    return url


async def test_what_is_compacted_is_refused_and_not_counted_again(compacted: str, calls) -> None:
    """A rewind beyond the horizon, and a report that may be a repeated one, say why."""
    async with open_service(compacted) as service:
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
        row = loaded(service).row
        assert 16 <= row.floor_step <= 21
        with pytest.raises(FailedPrecondition, match=f"to step {row.floor_step} or a later one"):
            await service.rewind_run(calls.rewind(row.floor_step - 1))
        repeated = calls.own_report(["once"], [[1.0]], 0, report_id="first")
        with pytest.raises(FailedPrecondition, match=f"of step {row.closed_step + 1} and later"):
            await service.report(repeated)
        with pytest.raises(NotFound, match="long since closed"):
            await service.report(calls.report("a-000000000000000000000000", [[1.0]]))
        assert await service.get_run(pb.GetRunRequest(run_id="run")) == run
        back = await service.rewind_run(calls.rewind(row.floor_step))
        assert (back.last_step, back.rewinds) == (row.floor_step, 1)
        # Anew: from the first step on, whose reports are taken again.
        anew = await service.rewind_run(calls.rewind(-1))
        assert (anew.last_step, anew.total_rollouts) == (-1, 0)
        assert (await service.report(repeated)).accepted_rollouts == 1


async def test_what_was_compacted_for_many_calls_is_not_counted_again(tmp_path, calls) -> None:
    """Nor gone back to, however few the steps; of a step that goes on reports are taken."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    first = calls.own_report(["once"], [[1.0]], 0, report_id="first")
    async with open_service(url, retention=Retention(1000, 12, 3)) as service:
        await service.report(first)
        for number in range(40):
            await service.report(calls.own_report(["a"], [[1.0]], number // 10))
            await settle(service)
        row = loaded(service).row
        assert (row.floor_step, row.closed_step) == (2, 1)
        before = await service.get_run(pb.GetRunRequest(run_id="run"))
        with pytest.raises(FailedPrecondition, match="takes reports of step 2 and later"):
            await service.report(first)
        with pytest.raises(FailedPrecondition, match="to step 2 or a later one"):
            await service.rewind_run(calls.rewind(1))
        assert await service.get_run(pb.GetRunRequest(run_id="run")) == before
        for step in (2, 3):
            late = await service.report(calls.own_report(["a"], [[1.0]], step))
            assert late.accepted_rollouts == 1


def damage(url: str, which: str) -> None:
    """Change a byte in the middle of snapshots: all of them, or all but the oldest."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        seqs = connection.exec_driver_sql("SELECT seq FROM snapshots ORDER BY seq").scalars().all()
        for seq in seqs if which == "all" else seqs[1:]:
            connection.exec_driver_sql(
                "UPDATE snapshot_parts SET data = "
                "CAST(substr(data, 1, 9) || x'00' || substr(data, 11) AS BLOB) "
                f"WHERE seq = {seq} AND part = 1"
            )
    engine.dispose()


async def test_a_damaged_snapshot_is_passed_over(compacted: str, caplog) -> None:
    """The run is folded from an older one, the same to the bit, and the log says so."""
    pages = []
    for which in ("none", "newer"):
        if which != "none":
            damage(compacted, which)
        with caplog.at_level(logging.ERROR):
            async with open_service(compacted) as service:
                page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
                pages.append(page.SerializeToString())
    assert pages[0] == pages[1]
    assert "cannot be used, an older one is" in caplog.text


async def test_a_run_without_any_sound_snapshot_is_an_error(compacted: str) -> None:
    """Not a run that has forgotten its past."""
    damage(compacted, "all")
    async with open_service(compacted) as service:
        with pytest.raises(StoreUnavailable, match="bring the store back from a backup"):
            await service.get_run(pb.GetRunRequest(run_id="run"))

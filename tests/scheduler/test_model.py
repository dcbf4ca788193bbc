"""The whole service against a reference that is too simple to be wrong.

Hypothesis draws the calls: allocations with duplicates, waves, partial and late reports,
ids used again, rewinds, imports, deletions and restarts. After each of them everything that
can be read must be what the reference says.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.errors import SchedulerError
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.service import SchedulerService

from reference import Call, ReferenceRun

RUNS = ("one", "two")
PROMPTS = ["a", "b", "c", "d\u00e9", "e"]
CONFIGS = (
    pb.RunConfig(),
    pb.RunConfig(
        objective="effective",
        success_threshold=0.25,
        visit_discount=0.75,
        version_discount=0.5,
        evidence_cap=5,
    ),
)
REWARDS = st.sampled_from([0.0, 0.25, 0.5, 1.0])
GROUPS = st.lists(st.lists(REWARDS, max_size=3), min_size=5, max_size=5)
STEPS = st.integers(0, 3)
INDEX = st.integers(0, 10**6)


class Machine(RuleBasedStateMachine):
    """Calls the service and the reference, and compares them."""

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a folder: a disk that is slow finds no more faults.
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.runner = asyncio.Runner()
        self.numbers = itertools.count()
        self.runs: dict[str, ReferenceRun] = {}
        self.made: list[tuple[str, str, Any]] = []
        self.forgotten_allocations: set[tuple[str, str]] = set()
        self.journal: Journal
        self.service: SchedulerService
        self.open()

    def open(self) -> None:
        """Start the service on the store."""
        self.journal = Journal(f"sqlite:///{self.folder / 'stats.db'}")
        self.journal.open()
        self.service = SchedulerService(self.journal, auto_create_runs=True)

    def close(self) -> None:
        """Stop it."""
        self.service.close()
        self.journal.close()

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.close()
        self.runner.close()
        shutil.rmtree(self.folder)

    def ask(self, method: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
        """Return the answer, or the name of the status that the call is refused with."""

        async def call() -> Any:
            try:
                return await method(request)
            except SchedulerError as error:
                return error.code

        return self.runner.run(call())

    def run(self, run_id: str) -> ReferenceRun:
        """Return the reference's run, created as the service creates it by itself."""
        if run_id not in self.runs:
            config = self.runner.run(self.service.get_run(pb.GetRunRequest(run_id=run_id))).config
            self.runs[run_id] = ReferenceRun(config)
        return self.runs[run_id]

    def known(self, run_id: str, kind: str, call_id: str, content: bytes) -> Any:
        """Return what a call made before must be answered: its answer, a code, or None."""
        run = self.runs.get(run_id)
        before = run.same_id(kind, call_id) if run else None
        if before is None:
            return None
        return before.answer if before.content == content else "ALREADY_EXISTS"

    def new_id(self) -> str:
        """Return an id that was not used before."""
        return f"id-{next(self.numbers)}"

    def call(self, kind: str, run_id: str, request: Any) -> None:
        """Make a call and hold it against the reference; remembers it to be made again."""
        self.made.append((kind, run_id, request))
        getattr(self, f"do_{kind}")(run_id, request)

    def do_allocate(self, run_id: str, request: pb.AllocateRequest) -> None:
        """Allocate: within the bounds, the exact total, a share of it in the first wave."""
        answer = self.ask(self.service.allocate, request)
        content = request.SerializeToString(deterministic=True)
        expected = self.known(run_id, "allocate", request.request_id, content)
        if expected is not None:
            assert answer == expected
            return
        count, budget = len(request.prompt_ids), request.total_rollouts
        least, most = 2 * count, request.max_rollouts[0] * count
        if not least <= budget <= most:
            assert answer == "INVALID_ARGUMENT"
            return
        given = list(answer.num_rollouts)
        share = int(budget * request.wave_fraction + 0.5) if request.wave_fraction else budget
        if request.waves == 2:
            # As much as is best for both waves, which is for the core's tests to say.
            share = min(answer.allocated_rollouts, budget)
        assert sum(given) == answer.allocated_rollouts == max(share, least)
        assert all(2 <= n <= request.max_rollouts[0] for n in given)
        assert answer.remaining_rollouts == budget - sum(given)
        assert answer.summary.value <= answer.summary.value_upper_bound * (1 + 1e-12)
        if request.waves != 2:
            assert answer.summary.value >= answer.summary.uniform_value * (1 - 1e-12)
        self.run(run_id).calls.append(
            Call(
                "allocate", request.request_id, content, answer, request.step,
                answer.allocation_id, list(request.prompt_ids), given, budget,
            )
        )  # fmt: skip

    def do_extend(self, run_id: str, request: pb.ExtendRequest) -> None:
        """Extend: never beyond the budget, and lost rollouts are given again."""
        answer = self.ask(self.service.extend, request)
        content = request.SerializeToString(deterministic=True)
        expected = self.known(run_id, "extend", request.request_id, content)
        if expected is not None:
            assert answer == expected
            return
        run = self.runs.get(run_id)
        if run is None or not any(
            c.allocation == request.allocation_id for c in run.kept("allocate")
        ):
            assert answer == "NOT_FOUND"
            return
        first, given, reported = run.allocation(request.allocation_id)
        if not any(reported) and not request.keep_outstanding:
            assert answer == "FAILED_PRECONDITION"
            return
        spent = sum(given) if request.keep_outstanding else sum(reported)
        waves = sum(c.allocation == request.allocation_id for c in run.kept("extend"))
        assert answer.wave == waves + 2
        assert answer.step == first.step
        assert 0 <= answer.allocated_rollouts == sum(answer.num_rollouts)
        left = first.budget - spent
        assert (
            answer.allocated_rollouts + answer.remaining_rollouts + answer.unallocated_rollouts
            == max(left, 0)
        )
        run.calls.append(
            Call(
                "extend", request.request_id, content, answer, first.step,
                request.allocation_id, [], list(answer.num_rollouts),
            )
        )  # fmt: skip

    def do_report(self, run_id: str, request: pb.ReportRequest) -> None:
        """Report: counted once, or ignored because a rewind forgot it, or refused whole."""
        answer = self.ask(self.service.report, request)
        content = request.SerializeToString(deterministic=True)
        run = self.runs.get(run_id)
        name = request.allocation_id
        ignored = (run_id, name) in self.forgotten_allocations or any(
            c.forgotten and (c.kind, c.id, c.content) == ("report", request.report_id, content)
            for c in (run.calls if run else [])
        )
        if ignored:
            # It takes no id, nor is it refused for one.
            same = [c for c in run.kept("report") if c.content == content] if run else []
            expected = same[0].answer if same else None
        else:
            expected = self.known(run_id, "report", request.report_id, content)
        if expected is not None:
            assert answer == expected
            return
        owners = itertools.chain.from_iterable(
            [i] * n for i, n in zip(request.prompt_indices, request.num_rewards, strict=True)
        )
        rewards = list(zip(owners, request.rewards, strict=True))
        prompts, step = list(request.prompt_ids), float(request.step)
        if ignored:
            step = float("-inf")
        elif name:
            if run is None or not any(c.allocation == name for c in run.kept("allocate")):
                assert answer == "NOT_FOUND"
                return
            else:
                first, given, reported = run.allocation(name)
                for position, _ in rewards:
                    reported[position] += 1
                if any(r > g for r, g in zip(reported, given, strict=True)):
                    assert answer == "INVALID_ARGUMENT"
                    return
                prompts, step = first.prompts, first.step
        assert answer == pb.ReportResponse(
            accepted_rollouts=0 if ignored else len(rewards),
            ignored_rollouts=len(rewards) if ignored else 0,
        )
        self.run(run_id).calls.append(
            Call(
                "report", request.report_id, content, answer, step, name, prompts, [], 0,
                request.policy_version, rewards, ignored,
            )
        )  # fmt: skip

    def do_rewind(self, run_id: str, request: pb.RewindRunRequest) -> None:
        """RewindRun: forgets later steps, once per id."""
        answer = self.ask(self.service.rewind_run, request)
        run = self.runs.get(run_id)
        if run is None:
            assert answer == "NOT_FOUND"
            return
        content = request.SerializeToString(deterministic=True)
        if request.request_id:
            expected = self.known(run_id, "rewind", request.request_id, content)
            if expected is not None:
                assert answer == expected
                return
        run.rewind(request.step)
        self.forgotten_allocations |= {
            (run_id, c.allocation) for c in run.calls if c.kind == "allocate" and c.forgotten
        }
        run.calls.append(Call("rewind", request.request_id, content, answer, request.step))
        assert {key: getattr(answer, key) for key in run.summary()} == run.summary()

    def do_import(self, run_id: str, messages: list[pb.ImportOutcomesRequest]) -> None:
        """ImportOutcomes: older than step 0, never forgotten."""

        async def stream() -> Any:
            for message in messages:
                yield message

        answer = self.ask(self.service.import_outcomes, stream())
        content = b"|".join(m.SerializeToString(deterministic=True) for m in messages)
        call_id = messages[0].request_id
        expected = self.known(run_id, "import", call_id, content)
        if expected is not None:
            assert answer == expected
            return
        rollouts = sum(len(m.rewards) for m in messages)
        assert answer.imported_rollouts == rollouts
        run = self.run(run_id)
        for message in messages:
            owners = itertools.chain.from_iterable(
                [i] * n for i, n in enumerate(message.num_rewards)
            )
            run.calls.append(
                Call(
                    "import", call_id, content, answer, float("-inf"), "",
                    list(message.prompt_ids), [], 0, message.step,
                    list(zip(owners, message.rewards, strict=True)),
                )
            )  # fmt: skip

    @rule(run_id=st.sampled_from(RUNS), config=st.sampled_from(CONFIGS))
    def create_run(self, run_id: str, config: pb.RunConfig) -> None:
        """The same config again is fine, another one is not."""
        there = self.runs.get(run_id)
        answer = self.ask(
            self.service.create_run, pb.CreateRunRequest(run_id=run_id, config=config)
        )
        is_other = there is not None and (there.config.objective == "effective") != bool(
            config.objective
        )
        if is_other:
            assert answer == "ALREADY_EXISTS"
        else:
            assert answer.config.objective == (config.objective or "paper")
            self.run(run_id)

    @rule(
        run_id=st.sampled_from(RUNS),
        prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5),
        budget=st.integers(2, 24),
        step=STEPS,
        fraction=st.sampled_from([0.0, 0.3, 0.5, None]),
        most=st.sampled_from([3, 8]),
    )
    def allocate(self, run_id: str, prompts: list[str], budget: int, step: int,
                 fraction: float | None, most: int) -> None:  # fmt: skip
        """A new allocation, the same prompt perhaps twice."""
        request = pb.AllocateRequest(
            run_id=run_id, step=step, request_id=self.new_id(), prompt_ids=prompts,
            total_rollouts=budget, wave_fraction=fraction or 0.0, max_rollouts=[most],
            waves=2 if fraction is None else 0,
        )  # fmt: skip
        self.call("allocate", run_id, request)

    def some_allocation(self, index: int) -> tuple[str, Call] | None:
        """Return an allocation that was ever made, forgotten ones among them."""
        every = [
            (run_id, c)
            for run_id, run in self.runs.items()
            for c in run.calls
            if c.kind == "allocate"
        ]
        return every[index % len(every)] if every else None

    @precondition(lambda self: self.some_allocation(0))
    @rule(index=INDEX, groups=GROUPS, version=st.integers(0, 4), full=st.booleans())
    def report(self, index: int, groups: list[list[float]], version: int, full: bool) -> None:
        """Part of an allocation's rollouts, all that are due, or too many."""
        run_id, allocation = self.some_allocation(index)  # type: ignore[misc]
        groups = groups[: len(allocation.prompts)]
        if full and not allocation.forgotten:
            _, given, reported = self.runs[run_id].allocation(allocation.allocation)
            due = [g - r for g, r in zip(given, reported, strict=True)]
            groups = [
                [(group or [1.0])[k % max(len(group), 1)] for k in range(n)]
                for group, n in zip(groups, due, strict=True)
            ]
        request = pb.ReportRequest(
            run_id=run_id, allocation_id=allocation.allocation, report_id=self.new_id(),
            policy_version=version, prompt_indices=range(len(groups)),
            num_rewards=[len(g) for g in groups], rewards=[r for g in groups for r in g],
        )  # fmt: skip
        self.call("report", run_id, request)

    @precondition(lambda self: self.some_allocation(0))
    @rule(index=INDEX, fraction=st.sampled_from([0.0, 0.4]), keep=st.booleans())
    def extend(self, index: int, fraction: float, keep: bool) -> None:
        """A further wave of an allocation."""
        run_id, allocation = self.some_allocation(index)  # type: ignore[misc]
        request = pb.ExtendRequest(
            run_id=run_id, allocation_id=allocation.allocation, request_id=self.new_id(),
            wave_fraction=fraction, keep_outstanding=keep,
        )  # fmt: skip
        self.call("extend", run_id, request)

    @rule(run_id=st.sampled_from(RUNS), groups=GROUPS, step=STEPS, version=st.integers(0, 4))
    def own_report(self, run_id: str, groups: list[list[float]], step: int, version: int) -> None:
        """Rollouts that the scheduler did not allocate."""
        request = pb.ReportRequest(
            run_id=run_id, report_id=self.new_id(), step=step, policy_version=version,
            prompt_ids=PROMPTS, prompt_indices=range(5), num_rewards=[len(g) for g in groups],
            rewards=[r for g in groups for r in g],
        )  # fmt: skip
        self.call("report", run_id, request)

    @rule(run_id=st.sampled_from(RUNS), parts=st.lists(st.tuples(STEPS, GROUPS), min_size=1,
                                                       max_size=3))  # fmt: skip
    def import_outcomes(self, run_id: str, parts: list[tuple[int, list[list[float]]]]) -> None:
        """Outcomes of an earlier run, in up to three messages."""
        call_id = self.new_id()
        messages = [
            pb.ImportOutcomesRequest(
                run_id=run_id,
                request_id=call_id,
                step=step,
                prompt_ids=PROMPTS,
                num_rewards=[len(g) for g in groups],
                rewards=[r for g in groups for r in g],
            )
            for step, groups in parts
        ]
        self.call("import", run_id, messages)

    @rule(run_id=st.sampled_from(RUNS), step=st.integers(-1, 2), named=st.booleans())
    def rewind(self, run_id: str, step: int, named: bool) -> None:
        """Back to a step."""
        request = pb.RewindRunRequest(
            run_id=run_id, step=step, request_id=self.new_id() if named else ""
        )
        self.call("rewind", run_id, request)

    @precondition(lambda self: self.made)
    @rule(index=INDEX)
    def repeat(self, index: int) -> None:
        """Any call made before, once more, however much has happened since."""
        kind, run_id, request = self.made[index % len(self.made)]
        if kind != "import" or run_id in self.runs:
            getattr(self, f"do_{kind}")(run_id, request)

    def forgotten_call(self, index: int) -> tuple[str, str, Any] | None:
        """Return a call that a rewind has forgotten."""
        contents = {c.content for run in self.runs.values() for c in run.calls if c.forgotten}
        every = [
            (kind, run_id, request)
            for kind, run_id, request in self.made
            if kind != "import" and request.SerializeToString(deterministic=True) in contents
        ]
        return every[index % len(every)] if every else None

    @precondition(lambda self: self.forgotten_call(0))
    @rule(index=INDEX)
    def repeat_forgotten(self, index: int) -> None:
        """A call that arrives once more after a rewind forgot it."""
        kind, run_id, request = self.forgotten_call(index)  # type: ignore[misc]
        getattr(self, f"do_{kind}")(run_id, request)

    @precondition(lambda self: self.made)
    @rule(index=INDEX)
    def reuse_id(self, index: int) -> None:
        """The id of a call made before, for another call."""
        kind, run_id, request = self.made[index % len(self.made)]
        if kind == "import":
            return
        other = type(request)()
        other.CopyFrom(request)
        if kind == "allocate":
            other.total_rollouts += 1
        elif kind == "extend":
            other.keep_outstanding = not other.keep_outstanding
        elif kind == "report":
            other.policy_version += 1
        else:
            other.step = (other.step + 1) % 4
        getattr(self, f"do_{kind}")(run_id, other)

    @rule(run_id=st.sampled_from(RUNS))
    def delete_run(self, run_id: str) -> None:
        """The run and everything known of it is gone."""
        answer = self.ask(self.service.delete_run, pb.DeleteRunRequest(run_id=run_id))
        assert answer == (pb.DeleteRunResponse() if run_id in self.runs else "NOT_FOUND")
        self.runs.pop(run_id, None)
        self.forgotten_allocations = {
            (run, name) for run, name in self.forgotten_allocations if run != run_id
        }

    @rule()
    def restart(self) -> None:
        """Everything comes back from the journal."""
        self.close()
        self.open()

    @invariant()
    def reads_as_the_reference(self) -> None:
        """Runs and statistics are what the reference derives."""
        listed = self.ask(self.service.list_runs, pb.ListRunsRequest())
        assert [run.run_id for run in listed.runs] == sorted(self.runs)
        for answer in listed.runs:
            run = self.runs[answer.run_id]
            expected = run.summary()
            assert {key: getattr(answer, key) for key in expected} == expected
            page = self.ask(
                self.service.list_prompt_stats, pb.ListPromptStatsRequest(run_id=answer.run_id)
            )
            rows = dict(
                zip(
                    page.prompt_ids,
                    zip(page.total_rollouts, page.total_successes, page.last_step,
                        page.last_policy_version, page.posterior_alpha, page.posterior_beta,
                        strict=True),
                    strict=True,
                )
            )  # fmt: skip
            statistics = run.statistics()
            assert list(rows) == list(statistics)
            for prompt, row in rows.items():
                assert row[:4] == statistics[prompt][:4]
                assert row[4:] == pytest.approx(statistics[prompt][4:], rel=1e-9)


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestService = Machine.TestCase

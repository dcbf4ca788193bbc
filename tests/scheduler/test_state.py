"""Statistics do not depend on the order of arrival, and a rewind is as if it never was."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.core.drift import Drift
from knapsack_scheduler.core.paper import recent_outcomes
from knapsack_scheduler.core.policy import plan_allocation
from knapsack_scheduler.core.problem import Bounds, Budget
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.facts import ImportedPart, OutcomesImported, OutcomesReported, Rewards
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.service import SchedulerService
from knapsack_scheduler.state import RunState

PROMPTS = ["a", "b", "c"]

SUCCESS_OR_FAILURE = st.sampled_from([0.0, 1.0])
FEW_LEVELS = st.sampled_from([0.0, -0.0, 0.25, 0.7, 1.0, 2.0])
MANY_LEVELS = st.integers(0, 40).map(lambda k: k / 40)


def reports_of(reward: Any) -> Any:
    """Return lists of (step, policy version, rewards of the three prompts)."""
    groups = st.lists(st.lists(reward, max_size=4), min_size=3, max_size=3)
    return st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), groups), min_size=1, max_size=8)


REPORTS = reports_of(SUCCESS_OR_FAILURE)
LEVELLED_REPORTS = reports_of(FEW_LEVELS) | reports_of(MANY_LEVELS) | REPORTS


def own_report(number: int, step: int, version: int, groups: list[list[float]]) -> Any:
    """Return a report of rollouts of the three prompts."""
    return pb.ReportRequest(
        run_id="run",
        report_id=f"report-{number}",
        step=step,
        policy_version=version,
        prompt_ids=PROMPTS,
        prompt_indices=range(3),
        num_rewards=[len(group) for group in groups],
        rewards=[r for group in groups for r in group],
        completion_tokens=[3 + int(r) for group in groups for r in group],
    )


def allocate(step: int, request_id: str) -> Any:
    """Return a request for an allocation to the three prompts and an unknown one."""
    return pb.AllocateRequest(
        run_id="run",
        step=step,
        request_id=request_id,
        prompt_ids=[*PROMPTS, "unseen"],
        total_rollouts=40,
    )


def decided(state: RunState, ids: tuple[str, ...], step: int) -> list[object]:
    """Return what is believed of prompts and what they are given for it, to the bit."""
    beliefs, prior = state.beliefs(ids, step)
    rows = state.rows_of(ids)
    bounds = Bounds(np.full(len(ids), 2), np.full(len(ids), 128))
    decision = plan_allocation("posterior", "paper", beliefs, bounds, Budget(9 * len(ids)))
    recent = recent_outcomes(state._visits, rows)
    stats = state.stats_of(rows[rows >= 0])
    arrays = (
        *(beliefs.posterior.alpha, beliefs.posterior.beta, beliefs.expected_tokens, beliefs.unseen),
        *(getattr(stats, field.name) for field in fields(stats)),
        *(recent.rollouts, recent.successes),
        *(state.bands(rows), decision.num_rollouts, decision.chances),
    )
    return [prior, state.drift(prior), decision.reasons, *(a.tobytes() for a in arrays)]


async def statistics(service: SchedulerService) -> bytes:
    """Return every prompt's statistics, bit by bit."""
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
    return page.SerializeToString()


@settings(max_examples=100, deadline=None)
@given(reports=LEVELLED_REPORTS, order=st.randoms(use_true_random=False))
async def test_the_order_of_reports_changes_nothing(reports: list[Any], order: Any) -> None:
    """Shuffled reports give the same statistics, posteriors and allocation, to the bit."""
    seen = []
    shuffled = list(enumerate(reports))
    for _ in range(2):
        async with open_service("sqlite://") as service:
            for number, report in shuffled:
                await service.report(own_report(number, *report))
            answer = await service.allocate(allocate(7, "next"))
            answer.allocation_id = ""
            seen.append((await statistics(service), answer.SerializeToString()))
        order.shuffle(shuffled)
    assert seen[0] == seen[1]


@settings(max_examples=60, deadline=None)
@given(reports=LEVELLED_REPORTS, later=LEVELLED_REPORTS, keep=st.integers(-1, 6))
async def test_a_rewound_run_decides_as_one_that_never_went_on(
    reports: list[Any], later: list[Any], keep: int
) -> None:
    """After Rewind to k: as if only steps up to k had been reported, now and afterwards."""
    kept = [(n, r) for n, r in enumerate(reports) if r[0] <= keep]
    answers = []
    for rewound in (True, False):
        async with open_service("sqlite://") as service:
            await service.create_run(pb.CreateRunRequest(run_id="run"))
            for number, report in enumerate(reports) if rewound else kept:
                await service.report(own_report(number, *report))
            if rewound:
                lost = await service.allocate(allocate(9, "lost"))
                await service.rewind_run(pb.RewindRunRequest(run_id="run", step=keep))
                # Arrives late, and is of a step that never was.
                await service.report(
                    pb.ReportRequest(
                        run_id="run",
                        allocation_id=lost.allocation_id,
                        report_id="late",
                        prompt_indices=[0],
                        num_rewards=[1],
                        rewards=[1.0],
                    )
                )
            seen = [await statistics(service)]
            for number, report in enumerate(later, 100):
                await service.report(own_report(number, *report))
                answer = await service.allocate(allocate(7, f"next-{number}"))
                answer.allocation_id = ""
                seen.append(answer.SerializeToString())
            seen.append(await statistics(service))
            answers.append(seen)
    assert answers[0] == answers[1]


async def test_a_restart_folds_to_the_same_state(tmp_path, calls) -> None:
    """What is read from the journal decides as what was in memory, rewinds included."""
    store = f"sqlite:///{tmp_path / 's.db'}"
    rng = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(50)]
    answers = []
    async with open_service(store) as service:
        for step in range(12):
            batch = list(rng.choice(ids, 10, replace=False))
            answer = await service.allocate(calls.allocate(batch, 80, step, wave_fraction=0.5))
            for wave in range(2):
                rewards = [list(rng.integers(0, 2, n).astype(float)) for n in answer.num_rollouts]
                await service.report(
                    calls.report(answer.allocation_id, rewards, policy_version=step)
                )
                if wave == 0:
                    answer = await service.extend(calls.extend(answer.allocation_id))
            if step == 8:
                await service.rewind_run(calls.rewind(4))
        answers.append((await statistics(service), await service.allocate(allocate(20, "x"))))
    async with open_service(store) as service:
        answers.append((await statistics(service), await service.allocate(allocate(20, "x"))))
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert answers[0] == answers[1]
    assert (run.last_step, run.rewinds) == (20, 1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.5])
async def test_rewards_above_the_threshold_are_successes(threshold: float) -> None:
    """A reward equal to the threshold is none."""
    rewards = [-1.0, 0.0, 0.5, 1.0, 2.5, 3.0]
    async with open_service("sqlite://") as service:
        config = pb.RunConfig(success_threshold=threshold)
        await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
        await service.report(own_report(0, 0, 0, [rewards, [], []]))
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert run.total_successes == sum(r > threshold for r in rewards)


async def test_the_report_that_completes_a_wave_has_the_next_decision_prepared(calls: Any) -> None:
    """Not one before it: until all has come, nobody decides by what has."""
    async with open_service("sqlite://") as service:
        answer = await service.allocate(allocate(0, "first"))
        groups = [[1.0] * count for count in answer.num_rollouts]
        part = calls.report(answer.allocation_id, [*groups[:3], []], report_id="part")
        await service.report(part)
        await service.settled()
        state = service._runs._loaded["run"].state
        assert (state._prior, state._drift) == (None, None)
        rest = calls.report(answer.allocation_id, [[], [], [], groups[3]], report_id="rest")
        await service.report(rest)
        await service.settled()
        prepared = state._prior, state._drift
        assert None not in prepared
        state._prior = state._drift = None
        assert prepared == (state.prior(), state.drift(state.prior()))


def test_a_step_that_was_pushed_out_of_the_window_leaves_no_trace() -> None:
    """Many policy versions of one step, and the other step reported before or after them."""
    ids = tuple(f"p{k}" for k in range(60))

    def reported(step: int, version: int) -> OutcomesReported:
        draw = np.random.default_rng(step * 100 + version)
        succeeded = draw.random(240) < (0.2 if step == 1 else 0.8)
        rewards = Rewards.of_each(np.repeat(np.arange(60), 4), succeeded.astype(np.float32))
        return OutcomesReported("", step, ids, version, rewards, False)

    late = [reported(1, 0)]
    rest = [reported(2, version) for version in range(1, 9)]
    seen = []
    for reports in (late + rest, rest + late):
        state = RunState(RunConfig())
        for report in reports:
            state.fold(report)
        posterior = state.beliefs(ids, 3)[0].posterior
        seen.append((posterior.alpha.tobytes(), posterior.beta.tobytes()))
    assert seen[0] == seen[1]


def test_whom_a_decision_learns_drift_from_does_not_depend_on_when_it_came() -> None:
    """Over 512 were visited last, and then versions of their step push its elders out."""
    ids = tuple(f"p{k}" for k in range(1200))

    def reported(step: int, version: int, begin: int, end: int) -> OutcomesReported:
        draw = np.random.default_rng(step * 100 + version)
        owner = np.repeat(np.arange(end - begin), 4)
        succeeded = draw.random(owner.size) < (0.2 if step < 3 else 0.8)
        rewards = Rewards.of_each(owner, succeeded.astype(np.float32))
        return OutcomesReported("", step, ids[begin:end], version, rewards, False)

    first = [reported(1, 1, 0, 1200), reported(2, 2, 600, 1200), reported(3, 3, 0, 600)]
    rest = [reported(3, version, 0, 400) for version in range(4, 11)]
    seen = []
    for reports, asked in ((first + rest, True), (first + rest, False), (rest + first, True)):
        state = RunState(RunConfig())
        for report in reports:
            state.fold(report)
            if asked:
                state.prepare()
        seen.append(decided(state, ids, 4))
        assert state.drift(state.prior()) != Drift()
    assert seen[0] == seen[1] == seen[2]


LATE_REPORTS = st.lists(
    st.tuples(
        st.integers(-1, 4),
        st.integers(0, 5),
        # One policy version, or enough of them to fill a window.
        st.sampled_from([1, 2, 9]),
        st.lists(st.integers(0, 7), min_size=1, max_size=8),
        FEW_LEVELS | SUCCESS_OR_FAILURE,
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(waves=LATE_REPORTS, most=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_nothing_that_is_believed_depends_on_the_order_of_arrival(
    waves: list[Any], most: int, order: Any
) -> None:
    """Late by versions, in parts, decided and restarted between; the few fitted to are many."""
    ids = tuple(f"p{k}" for k in range(8))
    facts: list[OutcomesReported | OutcomesImported] = []
    for step, since, versions, rows, reward in waves:
        named = tuple(ids[row] for row in rows)
        for version in range(since, since + versions):
            values = [reward, *(float((row + version) % 2) for row in rows[1:])]
            rewards = Rewards.of_each(
                np.arange(len(rows)), np.array(values, np.float32), np.full(len(rows), 7 + version)
            )
            if step < 0:
                facts.append(OutcomesImported((ImportedPart(0, named, rewards),)))
            else:
                facts.append(OutcomesReported("", step, named, version, rewards, False))
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        for name in ("state.PRIOR_PROMPTS", "state.DRIFT_PROMPTS"):
            patched.setattr(f"knapsack_scheduler.{name}", most)
        for name in ("posterior", "drift"):
            patched.setattr(f"knapsack_scheduler.core.{name}.FEWEST_PROMPTS", 1)
        for shuffled in (False, True, True):
            if shuffled:
                order.shuffle(facts)
            state = RunState(RunConfig())
            for fact in facts:
                state.fold(fact)
                if shuffled and order.random() < 0.3:
                    state.prepare()
                if shuffled and order.random() < 0.1:
                    state = RunState.from_columns(state.config, state.columns())
            seen.append(decided(state, ids, 4))
    assert seen[0] == seen[1] == seen[2]


def test_many_prompts_are_found_and_sorted_as_few_are() -> None:
    """They are handled in slices, here more than two; also when they come from a snapshot."""
    ids = tuple(f"é{k * 7919 % 40_009:x}" for k in range(40_009))
    first, rest = ids[:10], ids[10:]
    state = RunState(RunConfig())
    for step, some in enumerate((first, rest)):
        rewards = Rewards.of_each(np.arange(len(some)), np.ones(len(some), np.float32))
        state.fold(OutcomesReported("", step, some, 0, rewards, False))
    for each in (state, RunState.from_columns(state.config, state.columns())):
        assert each.rows_of(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
        assert each.prompts_after("", 10**6).tolist() == sorted(
            range(len(ids)), key=ids.__getitem__
        )


@given(st.lists(st.lists(st.text("abé", min_size=1, max_size=3), max_size=6), max_size=6))
def test_prompts_are_listed_in_order_as_they_are_added(batches: list[list[str]]) -> None:
    """Those with an outcome, from any id on; what was added since is sorted in."""
    state, seen = RunState(RunConfig()), set()
    for step, batch in enumerate(batches):
        ids = tuple(batch)
        # Of the first only, so that some prompts are known and have no outcome.
        some = min(len(ids), 1)
        rewards = Rewards.of_each(np.zeros(some, np.int64), np.ones(some, np.float32))
        state.fold(OutcomesReported("", step, ids, 0, rewards, False))
        seen.update(ids[:1])
        for after in ("", "a", "b", "é"):
            listed = [state.prompt_ids[row] for row in state.prompts_after(after, 3)]
            assert listed == sorted(p for p in seen if p > after)[:3]

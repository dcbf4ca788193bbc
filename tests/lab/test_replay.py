"""A replay against numbers by hand, and against runs on the rates that made the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from knapsack_scheduler.core.objective import PAPER
from knapsack_scheduler.core.problem import Bounds
from knapsack_scheduler.lab.arms import Arm, find_arms
from knapsack_scheduler.lab.logged_step import LoggedStep
from knapsack_scheduler.lab.outcome_log import OutcomeLog
from knapsack_scheduler.lab.replay import ReplaySettings, replay
from knapsack_scheduler.lab.replay_outcome import Column, relative_gain
from knapsack_scheduler.lab.tracker import Tracker

ALL = ("uniform", "paper", "posterior", "posterior-2-waves", "posterior-3-waves")


def log_of(steps: Sequence[dict[str, list[float]]]) -> OutcomeLog:
    """Return the log of steps, each a dict of prompts' rewards."""
    ids = sorted({name for step in steps for name in step})
    groups = [(ids.index(name), step[name]) for step in steps for name in sorted(step)]
    sizes = [len(rewards) for _, rewards in groups]
    return OutcomeLog(
        np.arange(len(steps)),
        np.cumsum([0, *(len(step) for step in steps)]),
        np.array([prompt for prompt, _ in groups], np.int32),
        np.cumsum([0, *sizes]),
        np.concatenate([rewards for _, rewards in groups]).astype(np.float32),
        None,
        ids,
        0,
        None,
    )


def step_of(rewards: list[list[float]]) -> LoggedStep:
    """Return a drawn step of prompts with those rewards."""
    log = log_of([{f"p{k}": group for k, group in enumerate(rewards)}])
    return LoggedStep.draw(log, 0, 0.5, np.random.default_rng(0))


def test_a_prefix_is_read_rightly() -> None:
    """Successes, difference and rewards of the first n are those of the drawn order."""
    step = step_of([[0, 1, 1, 0, 1], [1, 1], [0.2, 0.4, 0.3]])
    orders = np.split(step.rewards, np.cumsum(step.sizes)[:-1])

    assert [sorted(order.tolist()) for order in orders] == [
        [0, 0, 1, 1, 1],
        [1, 1],
        pytest.approx([0.2, 0.3, 0.4]),
    ]
    for n in range(7):
        asked = np.array([n, max(n - 1, 0), 2 * n])
        prefixes = [order[:k] for order, k in zip(orders, asked, strict=True)]
        assert step.seen(asked).tolist() == [len(one) for one in prefixes]
        assert step.successes(asked).tolist() == [int((one > 0.5).sum()) for one in prefixes]
        assert step.effective(asked).tolist() == [len(set(one.tolist())) > 1 for one in prefixes]
        owner, rewards = step.part(np.zeros(3, np.int64), asked)
        assert rewards.tolist() == np.concatenate(prefixes).tolist()
        assert owner.tolist() == np.repeat(np.arange(3), [len(one) for one in prefixes]).tolist()
    later = step.part(np.array([2, 1, 0]), np.array([4, 9, 1]))[1]
    assert later.tolist() == [*orders[0][2:4], *orders[1][1:], *orders[2][:1]]


def test_orders_are_fair() -> None:
    """Every order of a group is as likely: how often each reward comes first."""
    log = log_of([{"a": [0, 1, 2, 3]}] * 2000)
    first = [
        LoggedStep.draw(log, at, 0.5, np.random.default_rng((7, at))).rewards[0]
        for at in range(2000)
    ]

    counts = np.bincount(np.array(first, np.int64))
    assert (np.abs(counts - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)).all()


TINY = [
    {"a": [1, 1, 1, 1], "b": [1, 0, 1, 0]},
    {"a": [1, 1, 1, 1], "b": [0, 0, 0, 0]},
]


def test_two_steps_by_hand() -> None:
    """Uniform is the log; posterior gives b six in step 1, of which the log has four.

    Step 0: nothing is known, both get 4, and b is effective. Step 1: a always passed and
    gets its minimum of 2, b gets the other 6. All four that the log has of b failed, so
    whether b would have been effective is not measured.
    """
    found = replay(log_of(TINY), ReplaySettings(find_arms(ALL)))
    uniform, posterior = found.outcome("uniform"), found.outcome("posterior")
    assert uniform is not None
    assert posterior is not None

    rate = uniform.effective_group_rate
    assert (rate.measured, rate.extrapolated) == (1 / 4, 0.0)
    assert uniform.effective_rollout_rate.measured == 4 / 16
    assert uniform.value.total == pytest.approx(found.logged_value.sum())
    assert uniform.size_counts.tolist() == [0, 0, 0, 0, 4]

    assert posterior.size_counts.tolist() == [0, 0, 1, 0, 2, 0, 1]
    assert posterior.sum_of(Column.BEYOND) == 2
    assert posterior.beyond_log == 2 / 16
    assert posterior.effective_group_rate.measured == 1 / 4
    assert posterior.effective_rollout_rate.measured == 4 / 16
    chance, _ = found.hindsight.rates(np.array([3])).change(np.array([0]), np.array([2]), PAPER)
    assert 0.0 < chance[0] < 1.0
    assert posterior.effective_group_rate.extrapolated == pytest.approx(chance[0] / 4)
    assert posterior.effective_rollout_rate.extrapolated == pytest.approx(6 * chance[0] / 16)


def test_what_is_already_effective_is_measured() -> None:
    """A group that got more than was logged is measured if what was logged differs."""
    steps = [TINY[0], {"a": [1, 1, 1, 1], "b": [0, 1, 1, 1]}]
    found = replay(log_of(steps), ReplaySettings(find_arms(["posterior"])))
    outcome = found.outcomes[0]

    assert outcome.sum_of(Column.BEYOND) == 2
    assert outcome.effective_group_rate.measured == 2 / 4
    assert outcome.effective_rollout_rate.measured == (4 + 6) / 16
    assert outcome.value.extrapolated == 0.0


def test_budgets_are_the_logs() -> None:
    """Every arm spends what each step had, or its share, also where bounds must give way."""
    rng = np.random.default_rng(0)
    steps: list[dict[str, list[float]]] = [
        {f"p{k}": rng.integers(0, 2, rng.integers(1, 9)).tolist() for k in range(5)}
        for _ in range(6)
    ]
    steps.append({"p0": [0.0] * 200, "p1": [1.0]})
    steps.append({"p2": [1.0], "p3": [0.0]})
    log = log_of(steps)
    each = np.diff(log.group_rows[log.step_groups])
    groups = np.diff(log.step_groups)
    for share in (1.0, 0.5):
        settings = ReplaySettings(find_arms(ALL), budget_share=share, max_rollouts=16)
        found = replay(log, settings)
        for outcome in found.outcomes:
            spent = outcome.columns[Column.ROLLOUTS]
            assert spent.tolist() == np.maximum(np.floor(each * share + 0.5), groups).tolist()
        assert found.widened_steps >= 2


def test_the_same_seed_gives_the_same_replay() -> None:
    """Replays repeat exactly, and replicates average over more than one order."""
    log, settings = make_log(world(3, 0), 0), ReplaySettings(find_arms(ALL), budget_share=0.5)
    first, again = replay(log, settings), replay(log, settings)
    more = replay(log, replace(settings, replicates=2))

    for one, other, both in zip(first.outcomes, again.outcomes, more.outcomes, strict=True):
        assert np.array_equal(one.columns, other.columns)
        assert both.sum_of(Column.ROLLOUTS) == one.sum_of(Column.ROLLOUTS)
    assert first.outcomes[2].value.total != more.outcomes[2].value.total
    assert relative_gain(first.outcomes[0], first.outcomes[0]) == (0.0, 0.0)


World = list[tuple[np.ndarray, np.ndarray]]
"""Of every step the prompts and their success rates."""

PROMPTS, BATCH, EPOCHS = 160, 40, 3


def world(seed: int, drift: float) -> World:
    """Return a run's prompts and their success rates."""
    rng = np.random.default_rng(seed)
    logits = rng.choice([-4.0, -0.5, 2.5], PROMPTS, p=[0.3, 0.4, 0.3]) + rng.normal(0, 1, PROMPTS)
    steps = []
    for _ in range(EPOCHS):
        for batch in rng.permutation(PROMPTS).reshape(-1, BATCH):
            steps.append((np.sort(batch), 1 / (1 + np.exp(-logits[np.sort(batch)]))))
        logits = logits + rng.normal(drift, drift, PROMPTS)
    return steps


def make_log(steps: World, seed: int, size: int = 8) -> OutcomeLog:
    """Return what a uniform run would have logged; successes first, as some sort them."""
    rng = np.random.default_rng((seed, 1))
    return log_of(
        [
            {
                f"{prompt:03d}": sorted((rng.random(size) < p).astype(float).tolist(), reverse=True)
                for prompt, p in zip(batch, rates, strict=True)
            }
            for batch, rates in steps
        ]
    )


def run_directly(steps: World, arm: Arm, budget: int, most: int, seed: int) -> np.ndarray:
    """Return effective groups, rollouts in them and true value of a run on the rates."""
    rng = np.random.default_rng((seed, 2))
    tracker = Tracker(ReplaySettings((arm,), max_rollouts=most).config_of(arm))
    bounds = Bounds(np.full(BATCH, 2), np.full(BATCH, most))
    totals = np.zeros(3)
    for at, (batch, p) in enumerate(steps):
        ids = tuple(f"{prompt:03d}" for prompt in batch)
        n, k = np.zeros(BATCH, np.int64), np.zeros(BATCH, np.int64)
        for wave, fraction in enumerate(arm.wave_fractions):
            if wave == 0:
                given = tracker.allocate(at, ids, bounds, arm.budget(budget))
            else:
                given = tracker.extend(fraction)
            owner = np.repeat(np.arange(BATCH), given.num_rollouts)
            rewards = (rng.random(owner.size) < p[owner]).astype(np.float32)
            tracker.report(owner, rewards, at)
            n = n + given.num_rollouts
            k = k + np.bincount(owner, rewards, BATCH).astype(np.int64)
        mixed = (k > 0) & (k < n)
        totals += mixed.sum(), n[mixed].sum(), (p * (1 - p) ** 2)[mixed].sum()
    return totals


def compare(
    names: list[str], worlds: int, drift: float, size: int, share: float, most: int
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Return by how much replays are above direct runs: mean, its error, extrapolated."""
    arms = find_arms(names)
    settings = ReplaySettings(arms, budget_share=share, max_rollouts=most)
    budget = int(BATCH * size * share)
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    ran: dict[str, list[np.ndarray]] = {name: [] for name in names}
    extrapolated = dict.fromkeys(names, 0.0)
    for seed in range(worlds):
        steps = world(seed, drift)
        for outcome in replay(make_log(steps, seed, size), settings).outcomes:
            name = outcome.arm.name
            groups = outcome.effective_group_rate.total * outcome.sum_of(Column.GROUPS)
            rollouts = outcome.effective_rollout_rate.total * outcome.sum_of(Column.ROLLOUTS)
            found[name].append(np.array([groups, rollouts, outcome.value.total]))
            ran[name].append(run_directly(steps, outcome.arm, budget, most, seed))
            extrapolated[name] = max(extrapolated[name], outcome.value.unsupported)
    differences = {}
    for name in names:
        level = np.mean(ran[name], axis=0)
        relative = (np.array(found[name]) - np.array(ran[name])) / level
        error = relative.std(axis=0, ddof=1) / np.sqrt(worlds)
        differences[name] = relative.mean(axis=0), error, extrapolated[name]
    return differences


def test_what_is_measured_is_unbiased() -> None:
    """Where the log has all an arm asks for, a replay is a run on the same rates.

    Groups of 16 are logged, successes first, and arms spend 4 on average and 16 at most.
    """
    compared = compare(["paper", "posterior", "posterior-2-waves"], 12, 0.0, 16, 0.25, 16)
    for mean, error, extrapolated in compared.values():
        assert extrapolated == 0.0
        assert (error < 0.03).all()
        assert (np.abs(mean) < 4 * error).all()


def test_what_is_extrapolated_comes_close() -> None:
    """Where arms go beyond the log, figures are within 4 % and error of a run's."""
    compared = compare(["posterior", "posterior-2-waves"], 8, 0.3, 8, 1.0, 128)
    for mean, error, extrapolated in compared.values():
        assert extrapolated > 0.01
        assert (np.abs(mean) < 0.04 + 3 * error).all()

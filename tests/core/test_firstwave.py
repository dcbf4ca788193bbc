"""First waves that know of a second one, against every outcome enumerated."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.firstwave import first_wave
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.policy import plan_allocation, plan_extension
from knapsack_scheduler.core.problem import (
    Beliefs,
    Bounds,
    Budget,
    Posterior,
    WaveOutcomes,
    tie_keys,
)

from oracles import EXPONENTS, beta_moment
from small_beliefs import beliefs

MOST = 9
"""Largest group where outcomes are enumerated."""


def rule(name: str) -> Objective:
    """Return an objective of the paper's family."""
    found = find_objective(name)
    assert isinstance(found, Objective)
    return found


def bounds(count: int, low: int = 2, high: int = MOST) -> Bounds:
    """Return the same bounds for every prompt."""
    return Bounds(np.full(count, low), np.full(count, high))


@cache
def after(
    alpha: Fraction, beta: Fraction, passed: int, first: int, most: int, name: str
) -> list[float]:
    """Return what a group with that first wave is worth after 0, 1, .. rollouts more.

    Summed over all the ways in which the further rollouts may come out.
    """
    i, j = EXPONENTS[name]
    a, b = alpha + passed, beta + first - passed
    worth = []
    for more in range(most - first + 1):
        total = Fraction(0)
        for later in range(more + 1):
            if 0 < passed + later < first + more:
                total += comb(more, later) * beta_moment(a, b, i + later, j + more - later)
        worth.append(float(total))
    return worth


def plan(
    alpha: Fraction, beta: Fraction, first: int, price: float, name: str, most: int = MOST
) -> tuple[float, float]:
    """Return worth less price, and expected rollouts, of both waves over all first outcomes.

    The second wave is the best that each outcome allows, in a group of ``most``.
    """
    worth = spent = 0.0
    for passed in range(first + 1):
        chance = comb(first, passed) * float(beta_moment(alpha, beta, passed, first - passed))
        gains = after(alpha, beta, passed, first, most, name)
        best = max(range(len(gains)), key=lambda m: gains[m] - price * m)
        worth += chance * (gains[best] - price * (first + best))
        spent += chance * (first + best)
    return worth, spent


QUARTERS = st.integers(1, 24).map(lambda k: Fraction(k, 4))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(QUARTERS, QUARTERS), min_size=1, max_size=4),
    st.integers(0, 40),
    st.sampled_from(sorted(EXPONENTS)),
    st.sampled_from([0, 1, 2]),
)
def test_every_size_is_the_best_at_the_price(
    states: list[tuple[Fraction, Fraction]], spare: int, name: str, low: int
) -> None:
    """No other first wave of any prompt is worth more, whatever its second wave would be."""
    count = len(states)
    total = min(count * max(low, 2) + spare, count * MOST)
    posterior = Posterior(
        np.array([float(a) for a, _ in states]), np.array([float(b) for _, b in states])
    )

    sizes, price = first_wave(rule(name), posterior, bounds(count, low), total)

    assert sizes.sum() <= total
    most = min(MOST, total)
    choices = [n for n in range(low, most + 1) if n != 1 or low == 1]
    for (a, b), size in zip(states, sizes.tolist(), strict=True):
        assert size in choices
        if price > 0.0:
            worth = {n: plan(a, b, n, price, name, most)[0] if n else 0.0 for n in choices}
            assert worth[size] == pytest.approx(max(worth.values()), abs=1e-12)


def test_both_waves_are_expected_to_spend_the_budget() -> None:
    """Over many prompts the price is such that nothing is left, and nothing is missing."""
    rng = np.random.default_rng(3)
    states = [(Fraction(int(a), 4), Fraction(int(b), 4)) for a, b in rng.integers(1, 30, (90, 2))]
    posterior = Posterior(
        np.array([float(a) for a, _ in states]), np.array([float(b) for _, b in states])
    )
    for total in (250, 400, 500):
        sizes, price = first_wave(rule("paper"), posterior, bounds(90), total)
        expected = sum(
            plan(a, b, n, price, "paper")[1]
            for (a, b), n in zip(states, sizes.tolist(), strict=True)
        )
        assert expected == pytest.approx(total, rel=0.02)
        assert 0.4 * total < sizes.sum() < 0.9 * total


def test_the_example_of_the_readme() -> None:
    """Beta(1, 3): 3 first, and 4.15 rollouts in both waves."""
    posterior = Posterior(np.full(100, 1.0), np.full(100, 3.0))
    sizes, price = first_wave(rule("paper"), posterior, bounds(100, 2, 64), 415)
    assert sizes.tolist() == [3] * 100
    assert price == pytest.approx(0.01, rel=0.2)
    assert plan(Fraction(1), Fraction(3), 3, 0.01, "paper")[1] == pytest.approx(4.15)


def test_many_posteriors_are_planned_for_as_well_as_each_alone() -> None:
    """Cells of like posteriors lose next to nothing of what each prompt's own size is worth."""
    rng = np.random.default_rng(5)
    alpha, beta = rng.gamma(0.6, 3.0, 3000) + 0.05, rng.gamma(0.9, 3.0, 3000) + 0.05
    total = 8 * alpha.size
    sizes, price = first_wave(
        rule("paper"), Posterior(alpha, beta), bounds(alpha.size, 2, 64), total
    )
    alone = np.concatenate(
        [
            # Fewer than are told apart; the same price is found for each part of the whole.
            first_wave(
                rule("paper"), Posterior(alpha[k::30], beta[k::30]), bounds(100, 2, 64), 800
            )[0][:, None]
            for k in range(30)
        ],
        axis=1,
    ).ravel()
    assert abs(int(sizes.sum()) - int(alone.sum())) < 0.02 * alone.sum()
    assert np.abs(sizes - alone).mean() < 0.6
    assert np.corrcoef(sizes, alone)[0, 1] > 0.9
    assert price > 0.0


def test_equal_prompts_get_equal_sizes_in_any_order() -> None:
    """Sizes belong to posteriors, not to places in the batch."""
    rng = np.random.default_rng(7)
    alpha, beta = rng.gamma(0.6, 3.0, 400) + 0.05, rng.gamma(0.9, 3.0, 400) + 0.05
    order = rng.permutation(400)
    one, price = first_wave(rule("paper"), Posterior(alpha, beta), bounds(400), 2000)
    other, same = first_wave(rule("paper"), Posterior(alpha[order], beta[order]), bounds(400), 2000)
    assert (one[order] == other).all()
    assert price == pytest.approx(same, rel=1e-9)


def test_bounds_of_each_prompt_hold() -> None:
    """Every minimum is met at once, no maximum is passed, and skipped prompts get none."""
    alpha, beta = np.full(6, 0.5), np.array([0.5, 0.5, 0.5, 0.5, 40.0, 900.0])
    limits = Bounds(np.array([2, 5, 2, 1, 0, 0]), np.array([64, 64, 3, 1, 64, 64]))
    sizes, _ = first_wave(rule("paper"), Posterior(alpha, beta), limits, 30)
    assert sizes[1] >= 5
    assert sizes[2] <= 3
    assert sizes[3] == 1
    assert sizes[5] == 0
    assert all(n == 0 or n >= 2 for n in sizes[4:].tolist())


@pytest.mark.parametrize("total", [8, 16, 512])
def test_extreme_budgets(total: int) -> None:
    """Nothing beyond the minimums, or all that the maximums hold."""
    posterior = Posterior(np.full(4, 0.5), np.full(4, 2.0))
    sizes, _ = first_wave(rule("paper"), posterior, bounds(4, 2, 128), total)
    assert sizes.sum() <= total
    assert sizes.min() >= 2
    assert total > 8 or sizes.sum() == 8


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_extreme_posteriors(scale: float) -> None:
    """Prompts that surely never or always succeed get their minimum; nothing overflows."""
    sure, other = np.array([scale, 1.0]), np.array([1.0, scale])
    posterior = Posterior(np.append(sure, np.ones(20)), np.append(other, np.ones(20)))
    sizes, price = first_wave(rule("paper"), posterior, bounds(22, 2, 128), 110)
    assert np.isfinite(price)
    assert sizes.sum() <= 110
    if scale > 1.0:
        assert sizes[:2].tolist() == [2, 2]
        assert sizes[2] > 2


BELIEFS = beliefs([0.5, 2.5, 8.5, 0.5] * 4, [8.5, 6.5, 0.5, 0.5] * 4)


def test_a_planned_wave_leaves_the_rest_to_extend() -> None:
    """Both waves together are the budget, and the reasons are those of the first."""
    budget = Budget(128, waves=2)
    decision = plan_allocation("posterior", "paper", BELIEFS, bounds(16, 2, 64), budget)
    sizes, price = first_wave(rule("paper"), BELIEFS.posterior, bounds(16, 2, 64), 128)

    assert decision.num_rollouts.tolist() == sizes.tolist()
    assert decision.allocated + decision.remaining == 128
    assert decision.unallocated == 0
    assert decision.reasons.price == price
    assert decision.reasons.value_upper_bound >= decision.reasons.value
    came = decision.num_rollouts
    nothing = WaveOutcomes(came, came, np.zeros(16, np.int64), np.zeros(16, bool))
    rest = plan_extension(
        "posterior", "paper", BELIEFS, bounds(16, 2, 64), Budget(128), nothing, False
    )
    assert rest.allocated == decision.remaining


@pytest.mark.parametrize(
    ("policy", "objective", "budget"),
    [
        ("uniform", "paper", Budget(128, waves=2)),
        ("posterior", "hora", Budget(128, waves=2)),
        ("posterior", "paper", Budget(0, 12_800, waves=2)),
        ("posterior", "paper", Budget(128, 12_800, waves=2)),
    ],
)
def test_what_cannot_be_planned_begins_with_half(
    policy: str, objective: str, budget: Budget
) -> None:
    """Other policies and objectives, and tokens, get what a share of 0.5 gives."""
    known = beliefs([0.5, 2.5, 8.5, 0.5] * 4, [8.5, 6.5, 0.5, 0.5] * 4, tokens=100.0)
    half = Budget(budget.total_rollouts, budget.total_tokens, 0.5)
    one = plan_allocation(policy, objective, known, bounds(16, 2, 64), budget)
    other = plan_allocation(policy, objective, known, bounds(16, 2, 64), half)
    assert one.num_rollouts.tolist() == other.num_rollouts.tolist()
    assert one.remaining == other.remaining


@pytest.mark.parametrize(("shape", "mean"), [((0.5, 0.5), 8), ((0.4, 1.6), 4), ((1.0, 4.0), 16)])
def test_planning_is_worth_more_than_half_first(shape: tuple[float, float], mean: int) -> None:
    """Where beliefs are right, both waves are worth more than with half of the budget first."""
    rng = np.random.default_rng(11)
    count = 600
    keys, limits = tie_keys([f"p{k}" for k in range(count)]), bounds(count, 2, 64)
    unseen, tokens = np.zeros(count, bool), np.zeros(count)
    total = count * mean
    worth = {"planned": 0.0, "half": 0.0}
    for _ in range(12):
        seen = rng.integers(0, 9, count)
        rates = rng.beta(*shape, count)
        passed = rng.binomial(seen, rates)
        start = Posterior(shape[0] + passed, shape[1] + seen - passed)
        luck = rng.random((count, 64)) < rates[:, None]
        for name, budget in (
            ("planned", Budget(total, waves=2)),
            ("half", Budget(total, wave_fraction=0.5)),
        ):
            known = Beliefs(start, keys, unseen, tokens)
            first = plan_allocation("posterior", "paper", known, limits, budget).num_rollouts
            came = (luck & (np.arange(64) < first[:, None])).sum(axis=1)
            mixed = (came > 0) & (came < first)
            now = Posterior(start.alpha + came, start.beta + first - came)
            known, seen_so_far = Beliefs(now, keys, unseen, tokens), (first, first, came, mixed)
            second = plan_extension(
                "posterior", "paper", known, limits, budget, WaveOutcomes(*seen_so_far), False
            ).num_rollouts
            assert first.sum() + second.sum() == total
            differs = np.where(came == 0, 1 - (1 - rates) ** second, 1 - rates**second)
            gains = rates * (1 - rates) ** 2 * np.where(mixed, 1.0, differs)
            worth[name] += float(gains.sum())
    assert worth["planned"] > worth["half"]

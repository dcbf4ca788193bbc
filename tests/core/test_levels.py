"""Rewards of more than two levels, against exact Dirichlet arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler import solve_levels, solve_posterior
from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.policy import plan_allocation, plan_extension
from knapsack_scheduler.core.problem import (
    Begun,
    Beliefs,
    Bounds,
    Budget,
    Levels,
    Posterior,
    WaveOutcomes,
    tie_keys,
)

from oracles import EXPONENTS, best_value, rising

WEIGHT = st.floats(1e-3, 1e2)
DIRICHLETS = st.integers(2, 6).flatmap(
    lambda levels: st.tuples(
        st.lists(WEIGHT, min_size=levels, max_size=levels), st.integers(1, levels - 1)
    )
)


def believed(weights: np.ndarray, failures: int) -> Posterior:
    """Return the posterior of Dirichlet weights [M, K] whose first levels are failures."""
    success = np.arange(weights.shape[1]) >= failures
    alpha, beta = np.zeros(len(weights)), np.zeros(len(weights))
    for level in range(weights.shape[1]):
        if success[level]:
            alpha += weights[:, level]
        else:
            beta += weights[:, level]
    return Posterior(alpha, beta, Levels(weights, success))


def moment(weights: list[float], failures: int, i: int, j: int, level: int, n: int) -> Fraction:
    """Return E[pi_level^n p^i q^j] exactly: n draws of the level, then i and j of the classes."""
    exact = [Fraction(w) for w in weights]
    own = level >= failures
    passed = sum(exact[failures:], Fraction(0)) + (n if own else 0)
    failed = sum(exact[:failures], Fraction(0)) + (0 if own else n)
    draws = rising(exact[level], n) * rising(passed, i) * rising(failed, j)
    return draws / rising(sum(exact, Fraction(0)), n + i + j)


def group_value(weights: list[float], failures: int, name: str, n: int) -> float:
    """Return E[(1 - sum_k pi_k^n) p^i q^j] exactly, as a float."""
    if n < 2:
        return 0.0
    i, j = EXPONENTS[name]
    whole = moment(weights, failures, i, j, 0, 0)
    alike = sum(moment(weights, failures, i, j, k, n) for k in range(len(weights)))
    return float(whole - alike)


def gains(rule: Objective, posterior: Posterior, begun: Begun, count: int) -> np.ndarray:
    """Return the first gains of the only prompt."""
    marginals = rule.conditional(posterior, begun)
    return np.array([float(marginals.advanced(np.array([t])).first[0]) for t in range(count)])


@given(DIRICHLETS, st.sampled_from(list(EXPONENTS)))
@settings(max_examples=120, deadline=None)
def test_gains_never_rise_and_add_up_to_the_value(
    drawn: tuple[list[float], int], name: str
) -> None:
    """In floating point they fall; their sum and the closed form are the exact value."""
    weights, failures = drawn
    posterior = believed(np.array([weights]), failures)
    rule = OBJECTIVES[name]
    series = gains(rule, posterior, Begun.nothing(1), 40)
    assert (np.diff(series) <= 0).all()
    exact = group_value(weights, failures, name, 41)
    assert series.sum() == pytest.approx(exact, rel=1e-10)
    closed = rule.values(posterior, Begun.nothing(1), np.array([41]))
    scale = float(moment(weights, failures, *EXPONENTS[name], 0, 0))
    assert closed[0] == pytest.approx(exact, rel=1e-9, abs=1e-9 * scale)


@given(DIRICHLETS, st.sampled_from(list(EXPONENTS)), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_groups_begun_gain_by_what_differs_from_their_level(
    drawn: tuple[list[float], int], name: str, level: int, outstanding: int
) -> None:
    """The k-th further rollout gains E[I pi^(k-1) (1 - pi)] of the one level that was seen."""
    weights, failures = drawn
    level %= len(weights)
    posterior = believed(np.array([weights]), failures)
    begun = Begun(
        np.array([3]),
        np.array([3 if level >= failures else 0]),
        np.array([False]),
        np.array([outstanding]),
        np.array([level]),
    )
    rule = OBJECTIVES[name]
    i, j = EXPONENTS[name]
    series = gains(rule, posterior, begun, 12)
    assert (np.diff(series) <= 0).all()
    exact = [
        float(
            moment(weights, failures, i, j, level, k)
            - moment(weights, failures, i, j, level, k + 1)
        )
        for k in range(outstanding, outstanding + 12)
    ]
    scale = float(moment(weights, failures, i, j, 0, 0))
    assert series == pytest.approx(exact, rel=1e-9, abs=1e-12 * scale)
    value = rule.values(posterior, begun, np.array([outstanding + 12]))
    before = rule.values(posterior, begun, np.array([outstanding]))
    assert float(value[0] - before[0]) == pytest.approx(sum(exact), rel=1e-7, abs=1e-9 * scale)


@pytest.mark.parametrize("name", list(EXPONENTS))
def test_one_level_of_each_class_is_the_beta_posterior(name: str) -> None:
    """Two levels give the gains and values of the success rate alone, begun or not."""
    alpha, beta = np.array([0.7, 4.7, 1.5, 0.5]), np.array([4.4, 0.4, 3.5, 0.5])
    plain = Posterior(alpha, beta)
    levelled = believed(np.stack([beta, alpha], axis=1), 1)
    begun = Begun(
        np.array([4, 4, 4, 0]),
        np.array([0, 4, 1, 0]),
        np.array([False, False, True, False]),
        np.array([0, 2, 0, 3]),
        np.array([0, 1, -1, -1]),
    )
    rule = OBJECTIVES[name]
    for t in range(20):
        step = np.full(4, t)
        one = rule.conditional(plain, begun).advanced(step).first
        other = rule.conditional(levelled, begun).advanced(step).first
        assert other == pytest.approx(one, rel=1e-13)
        values = [rule.values(p, begun, begun.outstanding + t) for p in (plain, levelled)]
        assert values[1] == pytest.approx(values[0], rel=1e-10, abs=1e-13)


def test_by_hand() -> None:
    """Three levels of equal weight 1: two rollouts differ with 1/2, a third adds 1/4 - 1/10."""
    weights = [1.0, 1.0, 1.0]
    # E[sum pi^2] = 3 * 1*2/(3*4) = 1/2 and E[sum pi^3] = 3 * 1*2*3/(3*4*5) = 3/10.
    posterior = believed(np.array([weights]), 2)
    series = gains(OBJECTIVES["effective"], posterior, Begun.nothing(1), 2)
    assert series.tolist() == pytest.approx([0.5, 0.2])


@pytest.mark.parametrize("minimum", [0, 2])
def test_never_worse_than_dynamic_program(minimum: int) -> None:
    """Random batches of levelled prompts, skipping allowed or not: the exact optimum."""
    rng = np.random.default_rng(7 + minimum)
    for _ in range(150):
        prompts, levels = int(rng.integers(1, 6)), int(rng.integers(2, 6))
        failures = int(rng.integers(1, levels))
        weights = rng.gamma(0.4, 2.0, (prompts, levels)) + 1e-3
        name = str(rng.choice(list(EXPONENTS)))
        limits = Bounds(np.full(prompts, minimum), minimum + rng.integers(0, 7, prompts))
        least, most = int(limits.minimum.sum()), int(limits.most.sum())
        if most < 1:
            continue
        total = int(rng.integers(max(least, 1), most + 1))
        table = [[group_value(list(row), failures, name, n) for n in range(10)] for row in weights]
        best = best_value(
            [lambda n, row=row: row[n] for row in table],
            total,
            limits.minimum.tolist(),
            limits.most.tolist(),
        )
        keys = tie_keys([f"p{k}" for k in range(prompts)])
        beliefs = Beliefs(
            believed(weights, failures), keys, np.zeros(prompts, bool), np.zeros(prompts)
        )
        budget = Budget(total, allow_partial=True)
        decision = plan_allocation("posterior", name, beliefs, limits, budget)
        if best is None:
            assert decision.allocated != total
            continue
        assert decision.allocated == total
        worth = sum(row[n] for row, n in zip(table, decision.num_rollouts, strict=True))
        assert worth == pytest.approx(best, rel=1e-9, abs=1e-300)


def test_the_solver_takes_levels() -> None:
    """With one level of each kind it is solve_posterior; with two failures it sees both."""
    rng = np.random.default_rng(3)
    alpha, beta = rng.gamma(1.0, 3.0, 50) + 0.1, rng.gamma(1.0, 3.0, 50) + 0.1
    two = solve_levels(np.stack([beta, alpha], axis=1), [False, True], 500)
    assert two.tolist() == solve_posterior(alpha, beta, 500).tolist()
    # As hard as each other, but the second fails in two ways and is soon effective.
    weights = [[6.0, 0.001, 1.0], [3.0, 3.0, 1.0]]
    counts = solve_levels(weights, [False, False, True], 30, objective="effective")
    assert counts.sum() == 30
    assert counts[0] > 2 * counts[1]
    tokens = solve_levels(weights, [False, False, True], 30, costs=[1.0, 2.0])
    assert (tokens * [1, 2]).sum() <= 30


@pytest.mark.parametrize(
    ("weights", "success", "said"),
    [
        ([1.0, 2.0], [True, False], "weights: must have a row per prompt"),
        ([[1.0, 2.0]], [True], "weights: must have a row per prompt"),
        ([[1.0, 2.0]], [True, True], "success: must be true for some"),
        ([[1.0, 2.0], [0.0, 1.0]], [True, False], r"weights\[1\]\[0\] = 0.0: must be"),
        ([[1.0, float("nan")]], [True, False], r"weights\[0\]\[1\] = nan: must be"),
    ],
)
def test_levels_that_cannot_be_are_named(weights: object, success: object, said: str) -> None:
    """Shapes, classes and weights."""
    with pytest.raises(ValueError, match=said):
        solve_levels(weights, success, 4)


def test_a_second_wave_goes_where_the_rewards_are_still_alike() -> None:
    """Failures of two kinds make a group effective, which needs no further rollout."""
    posterior = believed(np.array([[4.0, 2.0, 0.5], [6.0, 0.5, 0.5]]), 2)
    beliefs = Beliefs(posterior, tie_keys(["a", "b"]), np.zeros(2, bool), np.zeros(2))
    limits = Bounds(np.full(2, 2), np.full(2, 64))
    none = np.zeros(2, np.int64)
    four = np.full(2, 4)
    outcomes = WaveOutcomes(four, four, none, np.array([True, False]), np.array([-1, 0]))
    rest = plan_extension(
        "posterior", "paper", beliefs, limits, Budget(16), outcomes, keep_outstanding=False
    )
    assert rest.num_rollouts.tolist() == [0, 8]

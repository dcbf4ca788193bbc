"""The rules of other papers: their formulas, and their exact best division."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_scheduler import solve, solve_posterior
from knapsack_scheduler.core.catalogue import OBJECTIVES, find_objective
from knapsack_scheduler.core.problem import Begun, Posterior
from knapsack_scheduler.core.table import solve_table

RIVALS = ["deviation", "gvm", "hora", "coba", "cero"]


def hora(n: int, a: float, b: float) -> float:
    """Return the probability of a success among n rollouts, as a product."""
    return 1.0 - math.prod((b + j) / (a + b + j) for j in range(n))


def deviation(n: int, a: float, b: float) -> float:
    """Return minus the variance of a mean of n rewards."""
    p = a / (a + b)
    return -p * (1 - p) / n


def gvm(n: int, a: float, b: float) -> float:
    """Return minus w^2 / n with the weight of its code, a = 0.001 and b = 2."""
    p = a / (a + b)
    return -((1.0 / math.sqrt(p + 1e-3 / p ** (2 - 1))) ** 2) / n


def cero(n: int, a: float, b: float) -> float:
    """Return the saturating utility of the expected variance."""
    q = a * b / ((a + b) * (a + b + 1))
    return 1.0 - math.exp(-4.0 * q * n / 8.0)


FORMULAS: dict[str, Callable[[int, float, float], float]] = {
    "hora": hora,
    "deviation": deviation,
    "gvm": gvm,
    "cero": cero,
}
EVIDENCE = st.floats(0.05, 40.0)


@given(st.sampled_from(sorted(FORMULAS)), EVIDENCE, EVIDENCE)
def test_gains_are_differences_of_the_papers_formula(name: str, a: float, b: float) -> None:
    """From the first rollout to the second and on, and they never rise."""
    rule, formula = OBJECTIVES[name], FORMULAS[name]
    marginals = rule.expected(np.array([a]), np.array([b]))
    gains = [float(marginals.advanced(np.array([t])).first[0]) for t in range(30)]
    expected = [formula(n + 1, a, b) - formula(n, a, b) for n in range(1, 31)]
    assert gains == pytest.approx(expected, rel=1e-7, abs=1e-13)
    assert all(x >= y for x, y in itertools.pairwise(gains))


@given(st.sampled_from(RIVALS), EVIDENCE, EVIDENCE, st.integers(0, 40))
def test_values_are_sums_of_gains(name: str, a: float, b: float, n: int) -> None:
    """The value of a group is what its second and further rollouts gain."""
    rule = OBJECTIVES[name]
    alpha, beta = np.array([a]), np.array([b])
    value = rule.values(Posterior(alpha, beta), Begun.nothing(1), np.array([n]))
    marginals = rule.expected(alpha, beta)
    total = 0.0
    for t in range(n - 1):
        total += float(marginals.advanced(np.array([t])).first[0])
    assert float(value[0]) == pytest.approx(total, rel=1e-9, abs=1e-13)


def test_cobas_value_by_hand() -> None:
    """Two prompts of rates 0.2 and 0.4: F = 0.7 > 1/2, so a = 1 + 9 * 0.7 = 7.3, b = 3.7."""
    p = np.array([0.2, 0.4])
    rule = OBJECTIVES["coba"]
    a, b = 7.3, 3.7
    scale = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    # The spread of the two is 0.01 of at most 0.1667, so tau is 3.54.
    tau = 3.0 + 9.0 * 0.01 / 0.1667
    for row, x in enumerate(p):
        density = x ** (a - 1) * (1 - x) ** (b - 1) / scale
        gain = density * (math.exp(-5 / tau * x * (1 - x)) - math.exp(-6 / tau * x * (1 - x)))
        marginals = rule.at_rates(p).advanced(np.array([4, 4]))
        assert float(marginals.first[row]) == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("name", RIVALS)
def test_the_division_is_the_best_one_of_the_rule(name: str) -> None:
    """Against the exact search of the table of the rule's own values."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        count = int(rng.integers(2, 12))
        alpha, beta = rng.gamma(1.0, 3.0, count) + 0.1, rng.gamma(1.0, 3.0, count) + 0.1
        total = int(rng.integers(2 * count, 20 * count))
        new = Begun.nothing(count)
        rule = find_objective(name)
        table = np.full((count, 21), -np.inf)
        for n in range(2, 21):
            table[:, n] = rule.values(Posterior(alpha, beta), new, np.full(count, n))
        answer = solve_posterior(alpha, beta, total, 2, 20, name)
        worth = table[np.arange(count), answer].sum()
        assert answer.sum() == total
        assert worth == pytest.approx(solve_table(list(table), total).value, rel=1e-9)


def test_proportional_rules_are_proportional() -> None:
    """With much to divide and wide bounds, sizes are as the weights."""
    p = np.array([0.5, 0.1, 0.02])
    sizes = solve(p, 100_000, 1, 10**6, "deviation")
    weights = np.sqrt(p * (1 - p))
    assert sizes / sizes.sum() == pytest.approx(weights / weights.sum(), rel=1e-3)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_known_rates_at_the_edges(name: str, edge: float) -> None:
    """No objective fails on rates of 0 and 1, and the budget is spent."""
    counts = solve([edge, 0.5, edge], 30, 2, 64, name)
    assert counts.sum() == 30
    assert counts.min() >= 2


def test_horas_groups_with_a_success_still_hope() -> None:
    """Of a group begun, the next rollouts gain E[p], E[p q], E[p q q]."""
    rule = OBJECTIVES["hora"]
    a, b = 2.5, 4.0
    begun = Begun(np.array([3]), np.array([1]), np.array([True]), np.array([0]))
    marginals = rule.conditional(Posterior(np.array([a]), np.array([b])), begun)
    gains = [float(marginals.advanced(np.array([t])).first[0]) for t in range(3)]
    total = a + b
    assert gains == pytest.approx(
        [
            a / total,
            a * b / (total * (total + 1)),
            a * b * (b + 1) / (total * (total + 1) * (total + 2)),
        ]
    )

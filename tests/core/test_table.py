"""The search over tables is exact: brute force, dynamic programs, and shapes of all kinds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.problem import InfeasibleBudget
from knapsack_scheduler.core.solve import solve
from knapsack_scheduler.core.table import TooManyChoices, solve_table

VALUES = st.one_of(
    st.floats(-5, 5), st.sampled_from([0.0, 1.0, 0.5, -math.inf]), st.integers(0, 3).map(float)
)
TABLES = st.lists(st.lists(VALUES, min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda table: all(max(column) > -math.inf for column in table)
)

# Of few digits: sums that differ at all then differ by more than rounding does.
COSTS = st.one_of(st.integers(-2000, 9000).map(lambda c: c / 1000), st.integers(0, 4).map(float))


def by_brute_force(
    values: list[list[float]], costs: list[list[float]], budget: float, exactly: bool
) -> float:
    """Return the best value of all choices, -inf if none fits."""
    best = -math.inf
    for choice in itertools.product(*[range(len(column)) for column in values]):
        cost = sum(column[k] for column, k in zip(costs, choice, strict=True))
        if cost > budget + 1e-9 or (exactly and cost < budget - 1e-9):
            continue
        best = max(best, sum(column[k] for column, k in zip(values, choice, strict=True)))
    return best


@settings(max_examples=400, deadline=None)
@given(TABLES, st.integers(0, 14), st.booleans())
def test_groups_by_size(values: list[list[float]], budget: int, exactly: bool) -> None:
    """Option n costs n rollouts; the whole budget, or at most it."""
    costs = [[float(n) for n in range(len(column))] for column in values]
    best = by_brute_force(values, costs, budget, exactly)
    if best == -math.inf:
        with pytest.raises(InfeasibleBudget):
            solve_table(values, budget, exactly=exactly)
        return
    found = solve_table(values, budget, exactly=exactly)
    assert found.value == pytest.approx(best, abs=1e-9)
    assert found.value == sum(column[k] for column, k in zip(values, found.options, strict=True))
    assert found.cost == budget if exactly else found.cost <= budget
    assert found.cost == sum(found.options)


@settings(max_examples=400, deadline=None)
@given(TABLES, COSTS.filter(lambda c: c >= 0), st.data())
def test_options_of_any_cost(values: list[list[float]], budget: float, data: st.DataObject) -> None:
    """Real costs, not in order, some negative."""
    costs = [
        data.draw(
            st.lists(
                COSTS,
                min_size=len(column),
                max_size=len(column),
            )
        )
        for column in values
    ]
    best = by_brute_force(values, costs, budget, exactly=False)
    if best == -math.inf:
        with pytest.raises(InfeasibleBudget):
            solve_table(values, budget, costs)
        return
    found = solve_table(values, budget, costs)
    assert found.value == pytest.approx(best, abs=1e-7)
    assert found.cost <= budget + 1e-9


def by_dynamic_program(table: np.ndarray, budget: int) -> float:
    """Return the best value of exactly the budget, by the textbook recursion."""
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    for row in table:
        following = np.full(budget + 1, -np.inf)
        for n, value in enumerate(row[: budget + 1]):
            following[n:] = np.maximum(following[n:], best[: budget + 1 - n] + value)
        best = following
    return float(best[budget])


@pytest.mark.parametrize("kind", ["random", "convex", "steps", "ties", "concave"])
def test_batches_against_a_dynamic_program(kind: str) -> None:
    """Twenty-odd positions of up to thirty options, of shapes that greed gets wrong."""
    rng = np.random.default_rng(sum(map(ord, kind)))
    for _ in range(40):
        count, width = int(rng.integers(1, 25)), int(rng.integers(2, 30))
        n = np.arange(width)
        table = {
            "random": rng.normal(size=(count, width)),
            "convex": rng.random((count, 1)) * n**2,
            "steps": rng.random((count, 1)) * (n // rng.integers(1, 7, (count, 1))),
            "ties": rng.integers(0, 3, (count, width)).astype(float),
            "concave": rng.random((count, 1)) * np.sqrt(n),
        }[kind]
        table[rng.random(table.shape) < 0.1] = -np.inf
        table[:, 0] = 0.0
        budget = int(rng.integers(0, count * (width - 1) + 1))
        best = by_dynamic_program(table, budget)
        if best == -np.inf:
            with pytest.raises(InfeasibleBudget):
                solve_table(list(table), budget)
            continue
        assert solve_table(list(table), budget).value == pytest.approx(best, abs=1e-9)


def test_the_papers_values_give_the_solvers_answer() -> None:
    """On the values of groups of 2 to 40 it agrees with the threshold rule."""
    rng = np.random.default_rng(5)
    p = rng.beta(0.5, 0.5, 64)
    n = np.arange(41)
    table = (p * (1 - p) ** 2)[:, None] * (1 - p[:, None] ** n - (1 - p[:, None]) ** n)
    table[:, :2] = -np.inf
    counts = solve(p, 512, 2, 40)
    found = solve_table(list(table), 512)
    assert found.cost == 512
    assert found.value == pytest.approx(table[np.arange(64), counts].sum(), rel=1e-12)


def test_small_batches_with_costs_beat_the_best_gains_first() -> None:
    """What greed loses on a handful of prompts, this finds; checked by hand.

    Two prompts, budget 5: one option of cost 3 worth 4, one of cost 5 worth 6. The first
    has the higher value per cost and leaves 2 unspent.
    """
    found = solve_table([[0.0, 4.0], [0.0, 6.0]], 5.0, [[0.0, 3.0], [0.0, 5.0]])
    assert found.options.tolist() == [0, 1]
    assert (found.value, found.cost) == (6.0, 5.0)


def test_the_same_input_has_the_same_answer() -> None:
    """Where many choices are optimal."""
    table = [[0.0, 1.0, 1.0, 2.0]] * 6
    answers = {tuple(solve_table(table, 7).options.tolist()) for _ in range(3)}
    assert len(answers) == 1


def test_wrong_arguments_are_named() -> None:
    """With what is allowed."""
    with pytest.raises(ValueError, match=r"values\[1\]: must be one-dimensional"):
        solve_table([[1.0], [[1.0]]], 1)
    with pytest.raises(ValueError, match=r"values\[0\]: must be finite"):
        solve_table([[math.inf]], 0)
    with pytest.raises(ValueError, match=r"values\[0\]: must allow at least one"):
        solve_table([[math.nan, -math.inf]], 0)
    with pytest.raises(ValueError, match=r"costs: must be one per position \(1\)"):
        solve_table([[1.0]], 1, [[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"costs\[0\]: must be one per option \(1\)"):
        solve_table([[1.0]], 1, [[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"costs\[0\]: must be finite"):
        solve_table([[1.0]], 1, [[math.nan]])
    with pytest.raises(ValueError, match="budget"):
        solve_table([[1.0]], math.inf)
    with pytest.raises(InfeasibleBudget, match=r"from 2, the cost .* to 4"):
        solve_table([[-math.inf, 1.0, 1.0]] * 2, 9)
    with pytest.raises(InfeasibleBudget, match="must be from 2"):
        solve_table([[-math.inf, 1.0, 1.0]] * 2, 1, exactly=False)


def test_what_cannot_be_proven_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than answered approximately."""
    from knapsack_scheduler.core import table

    monkeypatch.setattr(table, "_MOST_STATES", 100)
    rng = np.random.default_rng(0)
    # Values equal to costs: every partial choice may be part of the best one.
    costs = [[0.0, float(c)] for c in rng.random(40)]
    with pytest.raises(TooManyChoices, match="round the costs"):
        solve_table(costs, 7.123456789, costs)

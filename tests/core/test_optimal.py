"""Ten thousand random instances of each problem, compared with exact answers: none is worse.

The instances are small enough for a dynamic program or for every choice there is, and
of all kinds: success rates of 0, 1, next to them, too small for a normal number, all
equal, of few eighths; bounds per prompt, of nothing but one pair; both ends of the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler import InfeasibleBudget, solve, solve_posterior
from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.costs import CostSolution, divide_by_cost
from knapsack_scheduler.core.many import open_problem
from knapsack_scheduler.core.problem import Bounds
from knapsack_scheduler.core.table import solve_table

from oracles import (
    EXPONENTS,
    allowed_sizes,
    best_of_all,
    best_sums,
    posterior_tables,
    value_tables,
)

DEGENERATE = [0.0, 1.0, 0.5, 1e-17, 5e-324, 1e-310, 1 - 2**-53, 1e-3, 1e-200, 1e-100]
PRECISION = 1e-12
TINY = 1e-300
"""Below this the values of an instance are rounded to few digits or none."""

PROMPTS = 7
ROOM = 8


def random_rates(rng: np.random.Generator, instances: int, prompts: int) -> np.ndarray:
    """Draw success rates of five kinds, one for each instance, [instances, prompts]."""
    shape = (instances, prompts)
    kinds = np.stack(
        [
            rng.random(shape),
            rng.beta(0.5, 0.5, shape),
            rng.choice(DEGENERATE, shape),
            rng.integers(0, 9, shape) / 8,
            np.broadcast_to(rng.choice([0.5, 0.3, 0.0, 1.0, 5e-324], (instances, 1)), shape),
        ]
    )
    mixed = rng.random(shape) < 0.3
    drawn = kinds[rng.integers(0, len(kinds), instances), np.arange(instances)]
    return np.where(mixed, kinds[2], drawn)


def random_sizes(
    rng: np.random.Generator, instances: int, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw how many prompts each instance really has: the others get no rollout."""
    real = rng.integers(1, prompts + 1, (instances, 1)) > np.arange(prompts)
    return real, real.sum(axis=1)


def random_budgets(rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Draw budgets from the lowest to the highest, often at an end or next to one."""
    kinds = np.stack(
        [low, high, low + 1, high - 1, rng.integers(low, high + 1), rng.integers(low, high + 1)]
    )
    drawn = kinds[rng.integers(0, len(kinds), low.size), np.arange(low.size)]
    return np.clip(drawn, low, high)


def objectives_of(rng: np.random.Generator, instances: int) -> list[str]:
    """Draw an objective for each instance."""
    return rng.choice(list(EXPONENTS), instances).tolist()


def assert_none_is_worse(
    tables: np.ndarray,
    totals: np.ndarray,
    prompts: np.ndarray,
    answer: Callable[[int, slice], np.ndarray],
) -> None:
    """Assert that every answer is allowed, spends the total, and is worth the optimum.

    Args:
        tables: of allowed sizes, -inf elsewhere, [I, M, K].
        totals: budgets, [I].
        prompts: how many of the M there are, [I].
        answer: returns the sizes of an instance, given its number and its prompts.
    """
    best = best_sums(tables, int(totals.max()))[np.arange(totals.size), totals]
    assert np.isfinite(best).mean() > 0.4, "instances should mostly have an answer"
    for instance in range(totals.size):
        there = slice(0, int(prompts[instance]))
        if best[instance] == -np.inf:
            with pytest.raises(InfeasibleBudget):
                answer(instance, there)
            continue
        sizes = answer(instance, there)
        worth = tables[instance, np.arange(sizes.size), sizes].sum()
        assert sizes.sum() == totals[instance]
        assert worth >= best[instance] * (1 - PRECISION) - TINY, instance


@pytest.mark.parametrize("kind", ["at least one", "skipping", "pairs only", "any"])
def test_equal_costs(kind: str) -> None:
    """Mixed bounds, with minimums and without, of which some leave room for one pair only."""
    instances = 10_000 if kind == "at least one" else 5_000
    rng = np.random.default_rng(sum(map(ord, kind)))
    p = random_rates(rng, instances, PROMPTS)
    real, prompts = random_sizes(rng, instances, PROMPTS)
    low = rng.integers(1, 5, p.shape)
    if kind == "any":
        low = rng.integers(0, 4, p.shape)
    elif kind != "at least one":
        low = np.zeros(p.shape, int)
    high = low + rng.integers(0, ROOM + 1, p.shape)
    if kind == "pairs only":
        high = 2 + (rng.random(p.shape) < 0.2) * rng.integers(0, 3, p.shape)
    low, high = low * real, high * real
    held = np.where((low == 0) & (high == 1), 0, high)
    totals = random_budgets(rng, low.sum(axis=1), held.sum(axis=1))
    names = objectives_of(rng, instances)
    tables = allowed_sizes(value_tables(p, names, int(high.max())), low, high)

    assert_none_is_worse(
        tables,
        totals,
        prompts,
        lambda k, s: solve(p[k, s], int(totals[k]), low[k, s], high[k, s], names[k]),
    )


@pytest.mark.parametrize("lowest", [0, 1])
def test_posteriors(lowest: int) -> None:
    """Beta posteriors from hardly any evidence to much, with values from exact fractions."""
    instances = 5_000
    rng = np.random.default_rng(lowest)
    evidence = [0.02, 0.5, 1.0, 2.5, 9.0, 30.0]
    alpha, beta = rng.choice(evidence, (2, instances, 5))
    real, prompts = random_sizes(rng, instances, 5)
    low = rng.integers(lowest, 4, alpha.shape) * real
    high = low + rng.integers(0, ROOM + 1, alpha.shape) * real
    held = np.where((low == 0) & (high == 1), 0, high)
    totals = random_budgets(rng, low.sum(axis=1), held.sum(axis=1))
    names = objectives_of(rng, instances)
    tables = allowed_sizes(posterior_tables(alpha, beta, names, int(high.max())), low, high)

    assert_none_is_worse(
        tables,
        totals,
        prompts,
        lambda k, s: solve_posterior(
            alpha[k, s], beta[k, s], int(totals[k]), low[k, s], high[k, s], names[k]
        ),
    )


ANY_RATE = st.one_of(st.floats(0, 1), st.sampled_from(DEGENERATE))
ANY_PROMPT = st.tuples(ANY_RATE, st.integers(0, 4), st.integers(0, 12))


@given(st.lists(ANY_PROMPT, min_size=1, max_size=9), st.sampled_from(sorted(EXPONENTS)), st.data())
@settings(max_examples=400, deadline=None)
def test_equal_costs_of_any_shape(
    prompts: list[tuple[float, int, int]], name: str, data: st.DataObject
) -> None:
    """Whatever the rates, the bounds and the budget."""
    p, low, room = (np.array(column) for column in zip(*prompts, strict=True))
    held = np.where((low == 0) & (room == 1), 0, low + room)
    total = data.draw(st.integers(int(low.sum()), int(held.sum())))
    values = value_tables(p[None], [name], int((low + room).max(initial=2)))
    tables = allowed_sizes(values, low[None], (low + room)[None])
    best = best_sums(tables, total)[0, total]
    if best == -np.inf:
        with pytest.raises(InfeasibleBudget):
            solve(p, total, low, low + room, name)
        return

    sizes = solve(p, total, low, low + room, name)

    assert sizes.sum() == total
    assert tables[0, np.arange(p.size), sizes].sum() >= best * (1 - PRECISION) - TINY


def random_costs(rng: np.random.Generator, instances: int, prompts: int, whole: bool) -> np.ndarray:
    """Draw costs of a rollout: lognormal, or whole numbers of 1 to 9 with many equal."""
    if whole:
        return rng.integers(1, rng.integers(2, 10, (instances, 1)), (instances, prompts)) * 1.0
    return np.exp(rng.normal(4.0, 0.7, (instances, prompts)))


def sizes_within_cost(
    p: np.ndarray, budget: float, low: np.ndarray, high: np.ndarray, name: str, costs: np.ndarray
) -> tuple[np.ndarray, CostSolution]:
    """Return the sizes and the certificate of the problem that ``solve`` solves."""
    bounds = Bounds(low, high)
    gains, room, pairs = open_problem(find_objective(name).at_rates(p), bounds)
    left = budget - float((costs * low).sum())
    keys = np.arange(p.size, dtype=np.uint64)
    found = divide_by_cost(gains, low, room, costs, left, keys, pairs)
    return low + found.num_rollouts, found


@pytest.mark.parametrize("whole", [True, False])
def test_costs_of_small_batches(whole: bool) -> None:
    """Budgets in tokens: exact, by dynamic program or by every choice, and certified so."""
    instances = 5_000
    most, prompts = (8, 6) if whole else (5, 4)
    rng = np.random.default_rng(whole)
    p = random_rates(rng, instances, prompts)
    low = rng.integers(0, 3, p.shape) * (rng.random((instances, 1)) < 0.7)
    high = np.minimum(low + rng.integers(0, most, p.shape), most)
    costs = random_costs(rng, instances, prompts, whole)
    least, all_ = (costs * low).sum(axis=1), (costs * high).sum(axis=1)
    budgets = least + rng.choice([0.0, 1.0, 0.3, 0.7], instances) * (all_ - least)
    # Above the sum of real costs by more than rounding, where it is meant to be that sum.
    budgets = np.floor(budgets) if whole else budgets * (1 + 1e-8)
    names = objectives_of(rng, instances)
    tables = allowed_sizes(value_tables(p, names, most), low, high)
    option_costs = costs[..., None] * np.arange(most + 1)
    if whole:
        reached = best_sums(tables, int(budgets.max()), option_costs.astype(int))
        best = np.maximum.accumulate(reached, axis=1)[np.arange(instances), budgets.astype(int)]
    else:
        best = best_of_all(tables, option_costs, budgets)

    for k in range(instances):
        sizes, found = sizes_within_cost(p[k], budgets[k], low[k], high[k], names[k], costs[k])
        worth = tables[k, np.arange(prompts), sizes].sum()
        assert (sizes * costs[k]).sum() <= budgets[k] * (1 + 1e-12)
        assert worth >= best[k] * (1 - 1e-9) - TINY, k
        assert found.upper_bound - found.gain <= 1e-9 * max(best[k], TINY), k


@given(
    st.lists(st.tuples(ANY_PROMPT, st.integers(1, 9)), min_size=1, max_size=8),
    st.sampled_from(sorted(EXPONENTS)),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_costs_of_any_shape(
    prompts: list[tuple[tuple[float, int, int], int]], name: str, data: st.DataObject
) -> None:
    """Whatever the rates, the bounds, the costs and the budget."""
    p, low, room = (np.array(column) for column in zip(*(x for x, _ in prompts), strict=True))
    costs = np.array([float(cost) for _, cost in prompts])
    least, most = int((costs * low).sum()), int((costs * (low + room)).sum())
    budget = data.draw(st.integers(least, most))
    options = int((low + room).max(initial=2))
    tables = allowed_sizes(value_tables(p[None], [name], options), low[None], (low + room)[None])
    option_costs = (costs[:, None] * np.arange(options + 1)).astype(int)
    best = best_sums(tables, budget, option_costs[None])[0].max()

    sizes, found = sizes_within_cost(p, budget, low, low + room, name, costs)

    worth = tables[0, np.arange(p.size), sizes].sum()
    assert (sizes * costs).sum() <= budget
    assert worth >= best * (1 - 1e-9) - TINY
    assert found.upper_bound - found.gain <= 1e-9 * max(best, TINY)


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_costs_of_larger_batches_are_certified(lowest: int) -> None:
    """The optimum lies between the value and its bound, which are one marginal apart at most."""
    instances, prompts, most = 700, 24, 7
    rng = np.random.default_rng(100 + lowest)
    p = random_rates(rng, instances, prompts)
    low = np.full(p.shape, lowest)
    high = np.minimum(low + rng.integers(0, most, p.shape), most)
    costs = random_costs(rng, instances, prompts, whole=True)
    least, all_ = (costs * low).sum(axis=1), (costs * high).sum(axis=1)
    budgets = np.floor(least + rng.random(instances) * (all_ - least))
    names = objectives_of(rng, instances)
    tables = allowed_sizes(value_tables(p, names, most), low, high)
    option_costs = (costs[..., None] * np.arange(most + 1)).astype(int)
    reached = best_sums(tables, int(budgets.max()), option_costs)
    best = np.maximum.accumulate(reached, axis=1)[np.arange(instances), budgets.astype(int)]

    for k in range(instances):
        sizes, found = sizes_within_cost(p[k], budgets[k], low[k], high[k], names[k], costs[k])
        worth = tables[k, np.arange(prompts), sizes].sum()
        bound = worth + found.upper_bound - found.gain
        assert (sizes * costs[k]).sum() <= budgets[k]
        assert worth <= best[k] * (1 + PRECISION) + TINY
        assert best[k] <= bound * (1 + PRECISION) + TINY, k
        # A rollout, or the two of a pair, at the price.
        dearest = (costs[k] * np.where(low[k] == 0, 2, 1)).max()
        assert bound - worth <= found.price * dearest + PRECISION * max(best[k], TINY), k


def random_tables(rng: np.random.Generator, instances: int, rows: int, options: int) -> np.ndarray:
    """Draw values of five shapes, some options not allowed, [instances, rows, options]."""
    shape = (instances, rows, options)
    n = np.arange(options)
    scale = rng.random((instances, rows, 1))
    kinds = np.stack(
        [
            rng.normal(size=shape),
            scale * n**2,
            scale * (n // rng.integers(1, 5, (instances, rows, 1))),
            rng.integers(0, 3, shape).astype(float),
            scale * np.sqrt(n),
        ]
    )
    table = kinds[rng.integers(0, len(kinds), instances), np.arange(instances)]
    table[rng.random(shape) < 0.15] = -np.inf
    # At least one option of each row is allowed.
    spare = rng.integers(0, options, (instances, rows, 1))
    kept = np.take_along_axis(table, spare, axis=2)
    np.put_along_axis(table, spare, np.where(kept == -np.inf, 0.0, kept), axis=2)
    return table


def test_tables_of_values_by_size() -> None:
    """Any values, concave or not: the whole budget in rollouts, or at most it."""
    instances, rows, options = 6_000, 6, 6
    rng = np.random.default_rng(3)
    tables = random_tables(rng, instances, rows, options)
    budgets = rng.integers(0, rows * (options - 1) + 1, instances)
    exactly = rng.random(instances) < 0.5
    reached = best_sums(tables, rows * (options - 1))
    at_most = np.maximum.accumulate(reached, axis=1)
    best = np.where(exactly[:, None], reached, at_most)[np.arange(instances), budgets]

    for k in range(instances):
        if best[k] == -np.inf:
            with pytest.raises(InfeasibleBudget):
                solve_table(list(tables[k]), int(budgets[k]), exactly=bool(exactly[k]))
            continue
        found = solve_table(list(tables[k]), int(budgets[k]), exactly=bool(exactly[k]))
        assert found.value == pytest.approx(best[k], abs=1e-9)
        assert tables[k, np.arange(rows), found.options].sum() == pytest.approx(found.value)
        assert found.options.sum() == budgets[k] if exactly[k] else True
        assert found.options.sum() <= budgets[k]


def test_tables_of_any_costs() -> None:
    """Costs in no order and some below 0, against every choice there is."""
    instances, rows, options = 4_000, 4, 5
    rng = np.random.default_rng(4)
    tables = random_tables(rng, instances, rows, options)
    # Few digits: sums that differ at all then differ by more than rounding does.
    costs = rng.integers(-500, 3000, tables.shape) / 1000
    budgets = rng.integers(-1000, 9000, instances) / 1000
    best = best_of_all(tables, costs, budgets)

    for k in range(instances):
        if best[k] == -np.inf:
            with pytest.raises(InfeasibleBudget):
                solve_table(list(tables[k]), budgets[k], list(costs[k]))
            continue
        found = solve_table(list(tables[k]), budgets[k], list(costs[k]))
        assert found.value == pytest.approx(best[k], abs=1e-9)
        assert found.cost <= budgets[k] + 1e-9

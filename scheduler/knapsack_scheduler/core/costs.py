"""Division of a budget in tokens: highest gain per cost first, with a certificate.

When rollouts cost differently the best division is a knapsack proper. Taking the highest
gains per unit of cost until the budget is used, and then whatever still fits, is within
one rollout of the optimum; the linear relaxation at the same price bounds the optimum
from above, so every answer comes with the most that it can be short of. On a handful of
prompts one rollout is a large part of the whole: those are searched exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.knapsack import divide
from knapsack_scheduler.core.problem import (
    BoolArray,
    FloatArray,
    InfeasibleBudget,
    IntArray,
    KeyArray,
)
from knapsack_scheduler.core.sweep import count_gains, sweep
from knapsack_scheduler.core.table import TooManyChoices, solve_table

SMALL_BATCH = 20
"""Batches of fewer prompts are divided exactly."""

_MOST_OPTIONS = 20_000
"""Rollouts in all the tables of a batch that is: more are no handful."""


@dataclass(frozen=True, slots=True)
class CostSolution:
    """A division within a budget of costs.

    Attributes:
        num_rollouts: new rollouts of each position, int64[M].
        price: gain per unit of cost at the margin.
        gain: sum of the gains of the new rollouts.
        upper_bound: no division within the budget gains more.
    """

    num_rollouts: IntArray
    price: float
    gain: float
    upper_bound: float


class _HighestDensities:
    """Keeps the gains per cost of a sweep until they use up the budget."""

    def __init__(self, capacity: IntArray, costs: FloatArray, budget: float) -> None:
        self.bound = 0.0
        self._capacity = capacity
        self._costs = costs
        self._budget = budget
        self._blocks: list[tuple[IntArray, FloatArray]] = []
        self._parts: list[tuple[FloatArray, FloatArray]] = []
        self._held = 0.0

    def add(self, rows: IntArray, gains: FloatArray) -> None:
        self._blocks.append((rows, gains))
        better = (gains > 0.0) & (gains >= self.bound)
        costs = np.broadcast_to(self._costs[rows, None], gains.shape)[better]
        self._parts.append((gains[better], costs))
        self._held += float(costs.sum())
        # As for equal costs: a pass over all that is held, only when it drops a good part.
        if self._held > (self._budget if self.bound == 0.0 else 1.25 * self._budget):
            self._raise_bound()

    def _raise_bound(self) -> None:
        pool = np.concatenate([gains for gains, _ in self._parts])
        costs = np.concatenate([costs for _, costs in self._parts])
        order = np.argsort(-pool, kind="stable")
        pool, costs = pool[order], costs[order]
        critical = int(np.searchsorted(np.cumsum(costs), self._budget, side="right"))
        if critical < pool.size:
            self.bound = float(pool[critical])
            keep = pool >= self.bound
            pool, costs = pool[keep], costs[keep]
        self._parts = [(pool, costs)]
        self._held = float(costs.sum())

    def counts(self) -> IntArray:
        """Return how many gains of each position lie above the price, which is then final."""
        if self._held > self._budget:
            self._raise_bound()
        price = self.bound
        return count_gains(self._capacity, self._blocks, lambda gains: gains > price)


def divide_by_cost(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    costs: FloatArray,
    budget: float,
    tie_keys: KeyArray,
    pairs: BoolArray | None = None,
    *,
    exact_below: int = SMALL_BATCH,
) -> CostSolution:
    """Return a division that costs at most ``budget``, by gain per cost.

    Rollouts that gain nothing are not given. The gains of batches of fewer than
    ``exact_below`` prompts are the highest possible, unless their bounds leave more choices
    than can be searched.

    Args:
        marginals, size, capacity, tie_keys, pairs: as in ``knapsack.divide``.
        costs: cost of one rollout, float64[M], > 0.
        budget: most that all may cost, >= 0.
    """
    capacity = np.minimum(capacity, np.floor(budget / costs)).astype(np.int64)
    if pairs is not None:
        capacity = np.where(pairs & (capacity < 2), 0, capacity)
        pairs = pairs & (capacity > 0)
    per_cost = marginals.per_cost(costs)
    highest = _HighestDensities(capacity, costs, budget)
    sweep(per_cost, capacity, pairs, highest)
    given = highest.counts()
    price = highest.bound
    if pairs is None:
        pairs = np.zeros(given.shape, np.bool_)
    left = budget - float((costs * given).sum())
    bound = total_gain(marginals, given, pairs) + price * max(left, 0.0)
    _fill(per_cost, given, size, capacity, costs, left, tie_keys, pairs)
    gain = total_gain(marginals, given, pairs)
    if given.size < exact_below and int(capacity.sum()) <= _MOST_OPTIONS and gain < bound:
        try:
            given = _exactly(marginals, capacity, costs, budget, tie_keys, pairs)
        except TooManyChoices:
            return CostSolution(given, price, gain, bound)
        gain = bound = total_gain(marginals, given, pairs)
    return CostSolution(given, price, gain, max(bound, gain))


def _exactly(
    marginals: Marginals,
    capacity: IntArray,
    costs: FloatArray,
    budget: float,
    tie_keys: KeyArray,
    pairs: BoolArray,
) -> IntArray:
    """Return the division of most gain: every position chooses from its own table."""
    steps = capacity - pairs
    columns = [np.zeros(capacity.shape)]
    chain = marginals
    for _ in range(int(steps.max(initial=0))):
        columns.append(columns[-1] + chain.first)
        chain = chain.advanced(np.ones_like(capacity))
    gains = np.stack(columns, axis=1)
    # In the order of the keys, so that the answer does not depend on the batch's.
    order = np.argsort(tie_keys, kind="stable")
    tables, prices = [], []
    for row in order:
        options = int(steps[row]) + 1
        sizes = np.arange(options, dtype=np.float64)
        sizes[1:] += float(pairs[row])
        tables.append(gains[row, :options])
        prices.append(sizes * costs[row])
    chosen = solve_table(tables, budget, prices).options
    given = np.zeros_like(capacity)
    given[order] = np.where(pairs[order] & (chosen > 0), chosen + 1, chosen)
    return given


_BISECTIONS = 16
"""Halvings in the search for the weight between the two caps."""


def divide_within(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    costs: FloatArray,
    budget: float,
    tie_keys: KeyArray,
    pairs: BoolArray | None = None,
    most_rollouts: int | None = None,
) -> CostSolution:
    """Return a division that costs at most ``budget`` and gives at most ``most_rollouts``.

    Where both caps bind, rollouts are weighed by ``cost + weight``, which is one cap
    that any answer within both must keep, so that every weight gives an upper bound;
    the weight is searched for.

    Args:
        marginals, size, capacity, costs, budget, tie_keys, pairs: as in
            ``divide_by_cost``.
        most_rollouts: cap on the sum; None for none.
    """
    if most_rollouts is not None:
        # Or one prompt alone is gone through for all that the budget could pay.
        capacity = np.minimum(capacity, most_rollouts)
    by_cost = divide_by_cost(marginals, size, capacity, costs, budget, tie_keys, pairs)
    if most_rollouts is None or int(by_cost.num_rollouts.sum()) <= most_rollouts:
        return by_cost
    ended = np.zeros(size.shape, np.bool_) if pairs is None else pairs
    # A part of what the budget pays for costs no more than it.
    best = _most_gaining(marginals, size, by_cost.num_rollouts, most_rollouts, tie_keys, pairs)
    best_gain = total_gain(marginals, best, ended)
    bound, price = by_cost.upper_bound, by_cost.price
    low, high = 0.0, 1e3 * float(costs.max())
    for _ in range(_BISECTIONS):
        weight = 0.5 * (low + high)
        weighed = divide_by_cost(
            marginals,
            size,
            capacity,
            costs + weight,
            budget + weight * most_rollouts,
            tie_keys,
            pairs,
            exact_below=0,
        )
        bound = min(bound, weighed.upper_bound)
        given = weighed.num_rollouts
        if int(given.sum()) > most_rollouts:
            low = weight
            continue
        high = weight
        if float((costs * given).sum()) <= budget and weighed.gain > best_gain:
            best, best_gain, price = given, weighed.gain, weighed.price
    return CostSolution(best, price, best_gain, max(bound, best_gain))


def _most_gaining(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    rollouts: int,
    tie_keys: KeyArray,
    pairs: BoolArray | None,
) -> IntArray:
    try:
        return divide(marginals, size, capacity, rollouts, tie_keys, pairs).num_rollouts
    except InfeasibleBudget:
        # An odd number of pairs' rollouts: one less is even.
        return divide(marginals, size, capacity, rollouts - 1, tie_keys, pairs).num_rollouts


_NOTHING = float(np.finfo(np.float64).tiny)
"""Below this a falling gain gets stuck on rounding and would never reach 0."""


def _fill(
    per_cost: Marginals,
    given: IntArray,
    size: IntArray,
    capacity: IntArray,
    costs: FloatArray,
    left: float,
    tie_keys: KeyArray,
    pairs: BoolArray,
) -> None:
    """Give whatever still fits, highest gain per cost first; changes ``given``."""
    while True:
        fresh = pairs & (given == 0)
        price = np.where(fresh, 2.0 * costs, costs)
        rows = np.flatnonzero((given < capacity) & (price <= left))
        if rows.size == 0:
            return
        done = np.where(pairs, np.maximum(given - 1, 0), given)[rows]
        gains = per_cost.take(rows).advanced(done).first
        gains = np.where(fresh[rows], 0.5 * gains, gains)
        if not gains.max() > _NOTHING:
            return
        highest = rows[gains == gains.max()]
        # Ties: lowest group first, then by key, as many as fit at once.
        order = highest[np.lexsort((tie_keys[highest], (size + given)[highest]))]
        fitting = np.cumsum(price[order]) <= left
        fitting[0] = True
        chosen = order[fitting]
        left -= float(price[chosen].sum())
        given[chosen] += np.where(fresh[chosen], 2, 1)


def total_gain(marginals: Marginals, given: IntArray, pairs: BoolArray) -> float:
    """Return the sum of the gains of ``given`` new rollouts."""
    steps = np.where(pairs, np.maximum(given - 1, 0), given)
    return float(marginals.summed(steps).sum())

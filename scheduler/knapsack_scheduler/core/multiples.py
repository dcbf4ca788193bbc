"""Exact division among states that stand for many positions each.

The answer is that of ``knapsack.divide`` on the whole batch, bit by bit and tie by tie:
positions that are alike get the same number of rollouts, except that what is left of the
last tied gain goes to the lowest groups and then to the lowest keys, which is settled
position by position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.knapsack import Solution, exchanges, no_even_division
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray, KeyArray
from knapsack_scheduler.core.states import States
from knapsack_scheduler.core.sweep import count_gains, sweep
from knapsack_scheduler.core.ties import lowest_keys, lowest_level

_FEW = 4096
"""Values that are sorted rather than halved."""


def divide_states(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    rollouts: int,
    states: States,
    keys_of: Callable[[IntArray], KeyArray],
    pairs: BoolArray | None = None,
    *,
    whole: bool = False,
) -> Solution:
    """Return the division of ``rollouts`` with the highest sum of gains.

    Args:
        marginals, size, capacity, rollouts, pairs: as in ``knapsack.divide``, of each
            state in place of each position.
        states: of the batch.
        keys_of: returns the tie keys of some positions; asked only where ties are split.
        whole: return whole groups: what they have already and what is given.

    Returns:
        The division among the positions, int64[M].

    Raises:
        InfeasibleBudget: as ``knapsack.divide``.
    """
    capacity = np.minimum(capacity, rollouts)
    if pairs is not None:
        capacity = np.where(pairs & (capacity < 2), 0, capacity)
        pairs = pairs & (capacity > 0)
        if int(states.counts @ capacity) < rollouts:
            raise no_even_division(rollouts)
        if not pairs.any():
            pairs = None
    if rollouts == 0:
        return Solution(states.spread(size if whole else np.zeros_like(size)), 0.0)
    highest = _HighestOfMany(capacity, states.counts, rollouts)
    sweep(marginals, capacity, pairs, highest)
    price, given, reach = highest.counts()
    rest = rollouts - int(states.counts @ given)
    if pairs is not None:
        tied = pairs & (given == 0) & (reach >= 2)
        if rest < 2:
            tied[:] = False
        elif rest < 2 * int(states.counts @ tied):
            positions = _positions(states, np.flatnonzero(tied))
            begun = positions[lowest_keys(keys_of(positions), rest // 2)]
            states, of_old = _split(states, begun)
            tied = np.arange(of_old.size) >= given.size
            marginals = marginals.take(of_old)
            size, capacity, pairs = size[of_old], capacity[of_old], pairs[of_old]
            given, reach = given[of_old], reach[of_old]
        given[tied] = 2
        rest -= 2 * int(states.counts @ tied)
    low = size + given
    open_ = (given < reach) & (states.counts > 0)
    if pairs is not None:
        open_ &= ~pairs | (given >= 2)
    high = np.where(open_, size + reach, low)
    fitting = min(rest, int(states.counts @ (high - low)))
    level = lowest_level(low[open_], high[open_], fitting, states.counts[open_]) if fitting else 0
    if fitting:
        given = given + np.where(open_, np.clip(level, low, high) - low, 0)
    lucky = fitting - int(states.counts @ (size + given - low))
    shown = size + given if whole else given
    if lucky:
        numbers = _spread_lucky(
            states, shown, open_ & (low <= level) & (level < high), lucky, keys_of
        )
    else:
        numbers = states.spread(shown)
    if rest > fitting and pairs is not None:
        there = states.counts > 0
        # States that were split up altogether have no position to offer.
        some = exchanges(
            given[there], marginals.take(there), capacity[there], pairs[there], rollouts
        )
        names = np.flatnonzero(there)
        for alike, change in some:
            positions = _positions(states, names[alike])
            numbers[positions[np.argmin(keys_of(positions))]] += change
    return Solution(numbers, price)


def _spread_lucky(
    states: States,
    given: IntArray,
    tied: BoolArray,
    lucky: int,
    keys_of: Callable[[IntArray], KeyArray],
) -> IntArray:
    """Return the numbers of the positions, one more for the ``lucky`` lowest keys of tied."""
    # Marked by their sign: one pass finds them, and who they are is not looked up again.
    numbers = states.spread(np.where(tied, ~given, given))
    positions = np.flatnonzero(numbers < 0)
    numbers[positions] = ~numbers[positions]
    numbers[positions[lowest_keys(keys_of(positions), lucky)]] += 1
    return numbers


def _positions(states: States, some: IntArray) -> IntArray:
    """Return the positions of some states, in order."""
    chosen = np.zeros(len(states), np.int64)
    chosen[some] = 1
    return np.flatnonzero(states.spread(chosen))


def _split(states: States, positions: IntArray) -> tuple[States, IntArray]:
    """Return the states with some positions apart from those that were like them.

    The states they leave keep their numbers, perhaps with no position left. Also
    returned is, of each new state, the old one.
    """
    of_slot = np.zeros(states.width, np.int64)
    of_slot[states.slots] = np.arange(len(states))
    left, new = np.unique(of_slot[states.of[positions]], return_inverse=True)
    moved = np.bincount(new, minlength=left.size)
    counts = np.concatenate([states.counts, moved])
    counts[left] -= moved
    of = states.of.copy()
    of[positions] = states.width + new
    slots = np.concatenate([states.slots, states.width + np.arange(left.size)])
    old = np.concatenate([np.arange(len(states)), left])
    split = replace(
        states,
        rows=states.rows[old],
        counts=counts,
        slots=slots,
        of=of,
        width=states.width + left.size,
    )
    return split, old


class _HighestOfMany:
    """Keeps the T highest gains of a sweep in which every gain counts several times."""

    def __init__(self, capacity: IntArray, counts: IntArray, rollouts: int) -> None:
        self.bound = 0.0
        self._capacity = capacity
        self._counts = counts
        self._rollouts = rollouts
        self._blocks: list[tuple[IntArray, FloatArray]] = []
        self._parts: list[tuple[FloatArray, IntArray]] = []
        self._held = 0

    def add(self, rows: IntArray, gains: FloatArray) -> None:
        self._blocks.append((rows, gains))
        better = gains >= self.bound if self.bound > 0.0 else gains > 0.0
        counts = np.broadcast_to(self._counts[rows, None], gains.shape)[better]
        self._parts.append((gains[better], counts))
        self._held += int(counts.sum())
        # As for single positions: a pass over all that is held, when it drops a good part.
        enough = self._rollouts if self.bound == 0.0 else self._rollouts + self._rollouts // 4
        if self._held >= enough:
            self._raise_bound()

    def _raise_bound(self) -> None:
        pool = np.concatenate([gains for gains, _ in self._parts])
        counts = np.concatenate([counts for _, counts in self._parts])
        self.bound = weighted_highest(pool, counts, self._rollouts)
        keep = pool >= self.bound
        pool, counts = pool[keep], counts[keep]
        self._parts = [(pool, counts)]
        self._held = int(counts.sum())

    def counts(self) -> tuple[float, IntArray, IntArray]:
        """Return the price and, per state, the gains above it and those not below."""
        if self._held > self._rollouts:
            self._raise_bound()
        price = self.bound
        above = count_gains(self._capacity, self._blocks, lambda gains: gains > price)
        if price == 0.0:
            return price, above, self._capacity.copy()
        return price, above, count_gains(self._capacity, self._blocks, lambda gains: gains >= price)


def weighted_highest(values: FloatArray, counts: IntArray, total: int) -> float:
    """Return the highest value that ``total`` of the values, each counted, are not below.

    Args:
        values: float64[n].
        counts: how often each counts, int64[n].
        total: from 1 to the sum of the counts.
    """
    left = total
    while values.size > _FEW:
        some = values[:: values.size // 512]
        pivot = np.partition(some, some.size // 2)[some.size // 2]
        above, level = values > pivot, values == pivot
        over, at = int(counts[above].sum()), int(counts[level].sum())
        if over >= left:
            values, counts = values[above], counts[above]
        elif over + at >= left:
            return float(pivot)
        else:
            below = values < pivot
            values, counts, left = values[below], counts[below], left - over - at
    order = np.argsort(values)[::-1]
    reached = np.cumsum(counts[order])
    return float(values[order[np.searchsorted(reached, left)]])

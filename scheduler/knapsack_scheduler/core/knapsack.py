"""Exact division of a budget of rollouts: take the highest marginals there are.

Gains of further rollouts never rise, so taking the T highest gains of the batch takes a
prefix of each prompt's, and no other division of T rollouts is worth more.

A prompt that may be skipped (minimum 0) gets nothing or at least two rollouts. Two are
worth ``2 E[pqI]`` and the third ``E[pqI]`` more, so the first two are swept as a pair, at
half its value each. At most one odd rollout is then left over that fits nowhere, and
``_mend`` places it by the best of the four exchanges that can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.problem import (
    BoolArray,
    FloatArray,
    InfeasibleBudget,
    IntArray,
    KeyArray,
)
from knapsack_scheduler.core.sweep import count_gains, sweep
from knapsack_scheduler.core.ties import fill_lowest


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimal division.

    Attributes:
        num_rollouts: new rollouts of each position, int64[M].
        price: gain of the last rollout given; 0 if none was or it gained nothing.
    """

    num_rollouts: IntArray
    price: float


def divide(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    rollouts: int,
    tie_keys: KeyArray,
    pairs: BoolArray | None = None,
) -> Solution:
    """Return the division of ``rollouts`` with the highest sum of gains.

    Args:
        marginals: gains of each position's next rollouts; where ``pairs``, of the
            second and further ones, the second being worth both of the pair.
        size: rollouts each position has already, int64[M]; only breaks ties.
        capacity: most new rollouts of each position, int64[M], >= 0.
        rollouts: how many to give, ``0 <= rollouts <= sum(capacity)``.
        tie_keys: uint64[M].
        pairs: bool[M], True where the position has no rollout and may get none or at
            least two, but not one. A capacity of 1 is taken as 0 there.

    Raises:
        InfeasibleBudget: no division without a group of one has that sum.
    """
    capacity = np.minimum(capacity, rollouts)
    if pairs is not None:
        capacity = np.where(pairs & (capacity < 2), 0, capacity)
        pairs = pairs & (capacity > 0)
        if int(capacity.sum()) < rollouts:
            raise _no_even_division(rollouts)
        if not pairs.any():
            pairs = None
    if rollouts == 0:
        return Solution(np.zeros_like(capacity), 0.0)
    highest = _HighestGains(capacity, rollouts)
    sweep(marginals, capacity, pairs, highest)
    price, given, reach = highest.counts()
    rest = rollouts - int(given.sum())
    open_ = np.ones(given.shape, np.bool_)
    if pairs is not None:
        begun = _begin_pairs(given, reach, pairs, rest // 2, tie_keys)
        given[begun] = 2
        rest -= 2 * begun.size
        open_ = ~pairs | (given >= 2)
    low = size + given
    high = np.where(open_, size + reach, low)
    fitting = min(rest, int((high - low).sum()))
    given += fill_lowest(low, high, fitting, tie_keys)
    if rest > fitting and pairs is not None:
        _mend(given, marginals, capacity, pairs, tie_keys)
    return Solution(given, price)


class _HighestGains:
    """Keeps the T highest gains of a sweep: the price, and who is above it."""

    def __init__(self, capacity: IntArray, rollouts: int) -> None:
        self.bound = 0.0
        self._capacity = capacity
        self._rollouts = rollouts
        self._blocks: list[tuple[IntArray, FloatArray]] = []
        self._parts: list[FloatArray] = []
        self._held = 0

    def add(self, rows: IntArray, gains: FloatArray) -> None:
        self._blocks.append((rows, gains))
        better = gains[(gains > 0.0) & (gains >= self.bound)]
        self._parts.append(better)
        self._held += better.size
        # Raising the bound costs a pass over all that is held: worth it when it is
        # known for the first time, and then when a good part would be dropped.
        enough = self._rollouts if self.bound == 0.0 else self._rollouts + self._rollouts // 4
        if self._held >= enough:
            self._raise_bound()

    def _raise_bound(self) -> None:
        pool = np.concatenate(self._parts)
        lowest = pool.size - self._rollouts
        pool.partition(lowest)
        self.bound = float(pool[lowest])
        self._parts = [pool[lowest:]]
        self._held = self._rollouts

    def counts(self) -> tuple[float, IntArray, IntArray]:
        """Return the price and, per position, the gains above it and those not below."""
        if self._held > self._rollouts:
            self._raise_bound()
        price = self.bound
        above = count_gains(self._capacity, self._blocks, lambda gains: gains > price)
        if price == 0.0:
            # Fewer rollouts gain anything than there are to give; those that gain
            # nothing are there in any number.
            return price, above, self._capacity.copy()
        return price, above, count_gains(self._capacity, self._blocks, lambda gains: gains >= price)


def _begin_pairs(
    given: IntArray, reach: IntArray, pairs: BoolArray, most: int, tie_keys: KeyArray
) -> IntArray:
    """Return the positions whose pair, worth the price, is given: lowest keys first."""
    tied = np.flatnonzero(pairs & (given == 0) & (reach >= 2))
    return tied[np.argsort(tie_keys[tied], kind="stable")[:most]]


def _mend(
    given: IntArray,
    marginals: Marginals,
    capacity: IntArray,
    pairs: BoolArray,
    tie_keys: KeyArray,
) -> None:
    """Place the odd rollout that fits nowhere at the price; changes ``given``.

    The sweep's answer is optimal but for this rollout, and each exchange costs at
    least nothing at the price, so the best answer is the cheapest exchange that
    places it. Every other one contains one of these four:

    - give it to a position that has room, below the price;
    - begin a pair, and take one rollout from a position that can spare one;
    - begin a pair and its third rollout, and end a pair that has only two.

    (The last in two ways: the position begun is worth the price, or less.)
    """
    first = marginals.first
    begun = given >= 2
    singles = np.where(pairs, given - 1, given)
    next_gain = marginals.advanced(np.maximum(singles, 0)).first
    last_gain = marginals.advanced(np.maximum(singles - 1, 0)).first
    third_gain = marginals.advanced(np.ones_like(given)).first

    grow = np.where((given < capacity) & (~pairs | begun), next_gain, -np.inf)
    spare = np.where(np.where(pairs, given >= 3, given >= 1), -last_gain, -np.inf)
    begin = np.where(pairs & (given == 0), first, -np.inf)
    begin_three = np.where(pairs & (given == 0) & (capacity >= 3), first + third_gain, -np.inf)
    end = np.where(pairs & (given == 2), -first, -np.inf)

    def best(gains: FloatArray) -> int:
        highest = np.flatnonzero(gains == gains.max())
        return int(highest[np.argmin(tie_keys[highest])])

    options = (
        ((grow, 1),),
        ((begin, 2), (spare, -1)),
        ((begin_three, 3), (end, -2)),
    )

    def worth(moves: tuple[tuple[FloatArray, int], ...]) -> float:
        return sum(float(gains.max()) for gains, _ in moves)

    moves = max(options, key=worth)
    if worth(moves) == -np.inf:
        raise _no_even_division(int(given.sum()) + 1)
    for gains, change in moves:
        given[best(gains)] += change


def _no_even_division(rollouts: int) -> InfeasibleBudget:
    return InfeasibleBudget(
        "total_rollouts",
        rollouts,
        "cannot be divided without a group of one; must leave an even number to the prompts "
        "that may be skipped, or give one of them room for 3",
    )

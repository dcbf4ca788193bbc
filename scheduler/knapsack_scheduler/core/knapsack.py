"""Exact division of a budget of rollouts: take the highest marginals there are.

Gains of further rollouts never rise, so taking the T highest gains of the batch takes a
prefix of each prompt's, and no other division of T rollouts is worth more.

A prompt that may be skipped (minimum 0) gets nothing or at least two rollouts. Two are
worth ``2 E[pqI]`` and the third ``E[pqI]`` more, so the first two are swept as a pair, at
half its value each. At most one odd rollout is then left over that fits nowhere, and
``exchanges`` places it by the best of the four that can.
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
from knapsack_scheduler.core.ties import fill_lowest, lowest_keys


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
            raise no_even_division(rollouts)
        if not pairs.any():
            pairs = None
    if rollouts == 0:
        return Solution(np.zeros_like(capacity), 0.0)
    highest = _HighestGains(capacity, rollouts, _safe_bound(marginals, capacity, rollouts, pairs))
    sweep(marginals, capacity, pairs, highest)
    if not highest.enough:
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
        for alike, change in exchanges(given, marginals, capacity, pairs, rollouts):
            given[alike[np.argmin(tie_keys[alike])]] += change
    return Solution(given, price)


_SAMPLE = 512
_LARGE_BATCH = 8 * _SAMPLE
_SAFETY = 0.85
"""The price of the batch is hardly below this part of the sample's."""


def _safe_bound(
    marginals: Marginals, capacity: IntArray, rollouts: int, pairs: BoolArray | None
) -> float:
    """Return what the price of a large batch is hardly below, from a sample of it.

    With it most positions are dropped after a few gains. It is a guess: that enough
    gains lie above it is to be checked.
    """
    if capacity.size < _LARGE_BATCH:
        return 0.0
    rows = np.arange(0, capacity.size, capacity.size // _SAMPLE)
    some = capacity[rows]
    share = min(rollouts * rows.size // capacity.size, int(some.sum()))
    if share == 0:
        return 0.0
    highest = _HighestGains(some, share)
    sweep(marginals.take(rows), some, None if pairs is None else pairs[rows], highest)
    return _SAFETY * highest.counts()[0]


class _HighestGains:
    """Keeps the T highest gains of a sweep: the price, and who is above it.

    Starts from a bound that is a guess, or from 0. ``enough`` tells afterwards whether T
    gains, or all there are, were kept.
    """

    def __init__(self, capacity: IntArray, rollouts: int, bound: float = 0.0) -> None:
        self.bound = bound
        self._guessed = bound > 0.0
        self._capacity = capacity
        self._rollouts = rollouts
        self._blocks: list[tuple[IntArray, FloatArray]] = []
        self._parts: list[FloatArray] = []
        self._held = 0

    def add(self, rows: IntArray, gains: FloatArray) -> None:
        self._blocks.append((rows, gains))
        better = gains[gains >= self.bound if self.bound > 0.0 else gains > 0.0]
        self._parts.append(better)
        self._held += better.size
        # Raising the bound costs a pass over all that is held: worth it when it is
        # known for the first time, and then when a good part would be dropped.
        enough = self._rollouts if self.bound == 0.0 else self._rollouts + self._rollouts // 4
        if self._held >= enough:
            self._raise_bound()

    @property
    def enough(self) -> bool:
        return not self._guessed or self._held >= self._rollouts

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
    return tied[lowest_keys(tie_keys[tied], most)]


def exchanges(
    given: IntArray, marginals: Marginals, capacity: IntArray, pairs: BoolArray, rollouts: int
) -> list[tuple[IntArray, int]]:
    """Return where the odd rollout goes that fits nowhere at the price.

    As one or two changes: positions that would do equally well, of which one is to be
    taken, and the rollouts that it gets or gives up.

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

    options = (
        ((grow, 1),),
        ((begin, 2), (spare, -1)),
        ((begin_three, 3), (end, -2)),
    )

    def worth(moves: tuple[tuple[FloatArray, int], ...]) -> float:
        return sum(float(gains.max()) for gains, _ in moves)

    moves = max(options, key=worth)
    if worth(moves) == -np.inf:
        raise no_even_division(rollouts)
    return [(np.flatnonzero(gains == gains.max()), change) for gains, change in moves]


def no_even_division(rollouts: int) -> InfeasibleBudget:
    """Return the refusal of a number that would leave a group of one."""
    return InfeasibleBudget(
        "total_rollouts",
        rollouts,
        "cannot be divided without a group of one; must leave an even number to the prompts "
        "that may be skipped, or give one of them room for 3",
    )

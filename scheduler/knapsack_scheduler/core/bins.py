"""Exact division of many prompts of any success rates within one pair of bounds.

Prompts whose rates lie close together get the same number of rollouts, but for a few
near the price. So rates are counted in bins. The gains of a bin lie between those made
of the lower ends of p and q and those made of the upper ends: addition and multiplication
of numbers that are not negative never turn an order around, also in floating point, so
these bounds hold for the very bits of the gains. They enclose the price and then, for
nearly every bin, the number of rollouts. Only the prompts of the other bins are looked at
one by one, by the recurrence that defines their gains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.multiples import weighted_highest
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.problem import FloatArray, IntArray, KeyArray
from knapsack_scheduler.core.states import spread
from knapsack_scheduler.core.ties import fill_lowest

_BINS = 16384
"""A power of two, so that the bin of a rate is exact."""

_COARSE = 256
_COARSE_LEVELS = 512
"""For the first guess of the price."""

_WINDOWS = (0.02, 0.3)
"""How far the price may be from the guess, tried in turn."""

_CROWDED = 0.8
"""Prompts that have no gain left are dropped when fewer than this part still have."""

_CHUNK = 1 << 15


def divide_by_bins(
    objective: Objective,
    success_rates: FloatArray,
    low: int,
    high: int,
    rollouts: int,
    keys_of: Callable[[IntArray], KeyArray],
) -> IntArray | None:
    """Return the new rollouts of each position beyond ``low``, as ``knapsack.divide`` would.

    Args:
        objective: what is maximised.
        success_rates: p, float64[M] in [0, 1].
        low: rollouts that every position has already, 1 or more.
        high: most rollouts of a position, ``>= low`` and 2 or more.
        rollouts: how many to give, ``0 <= rollouts <= M (high - low)``.
        keys_of: returns the tie keys of some positions.

    Returns:
        int64[M]; None if bins do not tell the price, as when fewer rollouts gain anything
        than there are.
    """
    capacity = min(high - low, rollouts)
    if rollouts == 0:
        return np.zeros(success_rates.shape, np.int64)
    bins, counts = _counted(success_rates)
    guess = _guess(objective, counts, low, capacity, rollouts)
    for width in _WINDOWS if guess > 0.0 else ():
        enclosed = _enclose(objective, counts, low, capacity, rollouts, guess, width)
        if enclosed is not None:
            break
    else:
        return None
    # Bins that are not clear are marked by their sign.
    clear = enclosed.least == enclosed.most
    given = spread(np.where(clear, enclosed.least, -1), bins)
    rows = np.flatnonzero(given < 0)
    left = rollouts - int(counts[clear] @ enclosed.least[clear])
    p = success_rates[rows]
    walk = _walk(
        objective, p, 1.0 - p, low, capacity, enclosed.lowest_price, enclosed.highest_price
    )
    left -= int(walk.above.sum())
    lowest = walk.gains.size - left
    price = np.partition(walk.gains, lowest)[lowest]
    above = walk.above + np.bincount(walk.rows[walk.gains > price], minlength=rows.size)
    level = np.bincount(walk.rows[walk.gains == price], minlength=rows.size)
    left -= int(np.count_nonzero(walk.gains > price))
    given[rows] = above + fill_lowest(above, above + level, left, keys_of(rows))
    return given


def _counted(success_rates: FloatArray) -> tuple[npt.NDArray[np.uint16], IntArray]:
    """Return floor(p * _BINS), uint16[M], and how many rates are in each bin.

    In chunks, so that what is in between stays in the cache.
    """
    bins = np.empty(success_rates.shape, np.uint16)
    counts = np.zeros(_BINS + 1, np.int64)
    for start in range(0, bins.size, _CHUNK):
        scaled = success_rates[start : start + _CHUNK] * float(_BINS)
        part = scaled.astype(np.int32)
        bins[start : start + _CHUNK] = part
    for start in range(0, bins.size, 4 * _CHUNK):
        counts += np.bincount(bins[start : start + 4 * _CHUNK], minlength=counts.size)
    return bins, counts


def _first(objective: Objective, p: FloatArray, q: FloatArray, low: int) -> list[FloatArray]:
    """Return both chains of gains after ``low`` rollouts: as ``point_marginals``, bit by bit."""
    weight = p * q
    for _ in range(objective.i):
        weight = weight * p
    for _ in range(objective.j):
        weight = weight * q
    chains = [weight.copy(), weight]
    for _ in range(low - 1):
        chains[0] *= p
        chains[1] *= q
    return chains


def _guess(objective: Objective, counts: IntArray, low: int, capacity: int, rollouts: int) -> float:
    """Return about the price: as if all prompts were in the middle of a wide bin."""
    wide = counts[:-1].reshape(_COARSE, -1).sum(axis=1)
    p = (np.arange(_COARSE) + 0.5) / _COARSE
    levels = min(capacity, _COARSE_LEVELS)
    gains = np.zeros((_COARSE, levels))
    for ratio, first in zip((p, 1.0 - p), _first(objective, p, 1.0 - p, low), strict=True):
        block = np.broadcast_to(ratio[:, None], gains.shape).copy()
        block[:, 0] = first
        gains += np.multiply.accumulate(block, axis=1)
    each = np.broadcast_to(wide[:, None], gains.shape).ravel()
    if int(each.sum()) < rollouts:
        return 0.0
    return weighted_highest(gains.ravel(), each, rollouts)


@dataclass(frozen=True, slots=True)
class _Walk:
    """The gains of some prompts at two prices.

    Attributes:
        above: gains of each above the higher price, int64[n].
        rows, gains: those from the lower to the higher price: whose, and how much.
    """

    above: IntArray
    rows: IntArray
    gains: FloatArray


def _walk(
    objective: Objective,
    p: FloatArray,
    q: FloatArray,
    low: int,
    capacity: int,
    lower: float,
    upper: float,
) -> _Walk:
    """Follow the gains of each prompt down to the lower price."""
    above = np.zeros(p.shape, np.int64)
    rows = np.arange(p.size)
    passed, failed = _first(objective, p, q, low)
    over = np.zeros(p.shape, np.int64)
    some_rows: list[IntArray] = []
    some_gains: list[FloatArray] = []
    for _ in range(capacity):
        gains = passed + failed
        alive, higher = gains >= lower, gains > upper
        over += higher
        inside = np.flatnonzero(alive ^ higher)
        some_rows.append(rows[inside])
        some_gains.append(gains[inside])
        left = int(np.count_nonzero(alive))
        if left < _CROWDED * rows.size:
            # Gains never rise, so those left behind would add nothing.
            above[rows] = over
            keep = np.flatnonzero(alive)
            rows, over = rows[keep], over[keep]
            p, q, passed, failed = p[keep], q[keep], passed[keep], failed[keep]
        if left == 0:
            break
        passed *= p
        failed *= q
    above[rows] = over
    return _Walk(above, np.concatenate(some_rows), np.concatenate(some_gains))


@dataclass(frozen=True, slots=True)
class _Enclosed:
    """Where the price lies, and what it means for every bin.

    Attributes:
        lowest_price, highest_price: the price is not outside.
        least, most: gains above the price of each prompt of a bin, at least and with
            those at the price at most, int64[bins].
    """

    lowest_price: float
    highest_price: float
    least: IntArray
    most: IntArray


def _enclose(
    objective: Objective,
    counts: IntArray,
    low: int,
    capacity: int,
    rollouts: int,
    guess: float,
    width: float,
) -> _Enclosed | None:
    """Return bounds of the price; None if it lies too far from the guess."""
    bins = counts.size
    ends = np.minimum(np.arange(bins + 1) / _BINS, 1.0)
    # The upper ends of every bin, then the lower ends.
    p = np.concatenate([ends[1:], ends[:-1]])
    q = np.concatenate([1.0 - ends[:-1], 1.0 - ends[1:]])
    walk = _walk(objective, p, q, low, capacity, guess * (1.0 - width), guess * (1.0 + width))
    weights = np.concatenate([counts, counts])
    upper = walk.rows < bins
    prices = []
    for of_end, above in ((upper, walk.above[:bins]), (~upper, walk.above[bins:])):
        left = rollouts - int(counts @ above)
        each = weights[walk.rows[of_end]]
        if not 0 < left <= int(each.sum()):
            return None
        prices.append(weighted_highest(walk.gains[of_end], each, left))
    highest, lowest = prices
    more = np.bincount(walk.rows[~upper & (walk.gains > highest)] - bins, minlength=bins)
    most = np.bincount(walk.rows[upper & (walk.gains >= lowest)], minlength=bins)
    return _Enclosed(lowest, highest, walk.above[bins:] + more, walk.above[:bins] + most)

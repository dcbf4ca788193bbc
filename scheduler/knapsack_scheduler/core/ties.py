"""Division of rollouts that are all worth the same: lowest group first, then by key.

Ties are the rule, not the exception: rewards are counted, so many prompts of a batch
have the same posterior. What is left at the price goes to the smallest groups first and,
among groups of the same size, to the lowest tie keys, so that the same batch gets the
same answer on every machine and in any order.
"""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import IntArray, KeyArray


def fill_lowest(low: IntArray, high: IntArray, rollouts: int, tie_keys: KeyArray) -> IntArray:
    """Return how many each position gets when groups are filled from the lowest up.

    Args:
        low: group sizes before, int64[M].
        high: group sizes that must not be passed, int64[M], ``>= low``.
        rollouts: how many to give, ``0 <= rollouts <= sum(high - low)``.
        tie_keys: uint64[M]; equal keys are told apart by position.

    Returns:
        int64[M], summing to ``rollouts``.
    """
    given = np.zeros_like(low)
    if rollouts == 0:
        return given
    rows = np.flatnonzero(low < high)
    if rows.size < low.size:
        low, high = low[rows], high[rows]
    level = lowest_level(low, high, rollouts)
    part = np.maximum(np.minimum(level, high), low) - low
    rest = rollouts - int(part.sum())
    given[rows] = part
    if rest:
        lucky = rows[(low <= level) & (level < high)]
        given[lucky[lowest_keys(tie_keys[lucky], rest)]] += 1
    return given


def lowest_level(
    low: IntArray, high: IntArray, rollouts: int, counts: IntArray | None = None
) -> int:
    """Return the highest level that everybody below it can be filled up to.

    Args:
        low, high, rollouts: as in ``fill_lowest``.
        counts: positions that each number stands for, int64[M]; None for 1.
    """
    before = int(low.sum()) if counts is None else int(counts @ low)
    reached = np.empty_like(low)
    below, above = int(low.min()), int(high.max())
    while below < above:
        level = (below + above + 1) // 2
        np.minimum(level, high, out=reached)
        np.maximum(reached, low, out=reached)
        filled = int(reached.sum()) if counts is None else int(counts @ reached)
        if filled - before <= rollouts:
            below = level
        else:
            above = level - 1
    return below


def lowest_keys(tie_keys: KeyArray, count: int) -> IntArray:
    """Return the positions of the ``count`` lowest keys; of equal ones the first.

    Args:
        tie_keys: uint64[M].
        count: ``0 <= count``; M or more for all.
    """
    if count >= tie_keys.size:
        return np.arange(tie_keys.size)
    if count == 0:
        return np.zeros(0, np.int64)
    if bool((tie_keys[1:] >= tie_keys[:-1]).all()):
        return np.arange(count)
    last = np.partition(tie_keys, count - 1)[count - 1]
    chosen = tie_keys < last
    equal = np.flatnonzero(tie_keys == last)
    chosen[equal[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)

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
    if rollouts == 0:
        return np.zeros_like(low)
    # The highest level that can be reached by everybody below it.
    below, above = int(low.min()), int(high.max())
    while below < above:
        level = (below + above + 1) // 2
        if int((np.clip(level, low, high) - low).sum()) <= rollouts:
            below = level
        else:
            above = level - 1
    given: IntArray = np.clip(below, low, high) - low
    rest = rollouts - int(given.sum())
    if rest:
        open_ = np.flatnonzero((low <= below) & (below < high))
        lucky = open_[np.argsort(tie_keys[open_], kind="stable")[:rest]]
        given[lucky] += 1
    return given

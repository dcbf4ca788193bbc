"""Which different numbers there are."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import IntArray


def distinct(numbers: IntArray, below: int) -> tuple[IntArray, IntArray]:
    """Return the different numbers, ascending, and which of them each position has, int64[M].

    Args:
        numbers: int64[M], from 0.
        below: all of them are; a byte is looked at for each number that there could be.
    """
    seen = np.zeros(below, np.bool_)
    seen[numbers] = True
    different = np.flatnonzero(seen)
    place = np.empty(below, np.int64)
    place[different] = np.arange(different.size)
    return different, place.take(numbers)


def ascending(numbers: IntArray) -> IntArray:
    """Return the different numbers, ascending.

    As ``np.unique``, which hashes them and takes ten times as long.
    """
    ordered = np.sort(numbers)
    first = np.ones(ordered.size, np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]

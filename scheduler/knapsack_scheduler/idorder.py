"""Prompts in the order of their ids, which is kept as prompts are added."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import merge

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.journal.columns import TEXTS_AT_ONCE


class IdOrder:
    """Rows of prompts, sorted by their ids. Never changes: ``extended`` returns another one.

    Args:
        rows: of the first prompts of a list of ids, int32[n], each once.
    """

    def __init__(self, rows: npt.NDArray[np.int32] | None = None) -> None:
        self.rows = np.zeros(0, np.int32) if rows is None else rows

    def extended(self, ids: list[str]) -> IdOrder:
        """Return the order of all of ``ids``, of which this one has the first.

        Others may append to the list meanwhile. Takes seconds for a million new ones, which
        are sorted in slices so that other threads run, and milliseconds for some hundreds.
        """
        first, end = self.rows.size, len(ids)
        if first == end:
            return self
        slices = [
            sorted(range(start, min(start + TEXTS_AT_ONCE, end)), key=ids.__getitem__)
            for start in range(first, end, TEXTS_AT_ONCE)
        ]
        rows = np.fromiter(merge(*slices, key=ids.__getitem__), np.int32, end - first)
        if first == 0:
            return IdOrder(rows)
        places = [bisect_left(self.rows, ids[row], key=ids.__getitem__) for row in rows.tolist()]
        return IdOrder(np.insert(self.rows, places, rows))

    def after(self, ids: list[str], prompt_id: str) -> int:
        """Return how many ids sort before or at ``prompt_id``; the next one stands there."""
        return bisect_right(self.rows, prompt_id, key=ids.__getitem__)

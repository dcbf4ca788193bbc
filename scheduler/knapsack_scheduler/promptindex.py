"""Finds the rows of prompts by their ids.

A dict does so too, but one id after the other, and with a million ids each of them waits for
memory four times in a row: thousands of ids take ten times as long as with few that are known.
Here the hashes of a whole batch are looked up at once, in arrays that are smaller than a
dict, and the ids found are compared after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import BoolArray, IntArray
from knapsack_scheduler.journal.columns import TEXTS_AT_ONCE

_SLOTS_PER_ID = 4
"""At least: three of four ids are then found in the first slot that is looked at."""


class PromptIndex:
    """Rows of different prompts, numbered in the order in which they are added.

    Attributes:
        ids: of the prompts, by row; not to be changed from outside.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        # The same once more, as an array: the ids of a batch are taken out at once.
        self._ids = np.empty(64, np.object_)
        # Hash of each row, and a row or -1 in each slot. The number of slots is a power of 2.
        self._hashes = np.zeros(64, np.int64)
        self._slots: npt.NDArray[np.int32] = np.full(64 * _SLOTS_PER_ID, -1, np.int32)
        # Ids with the hash of another one, of which there is hardly ever any.
        self._twins: dict[str, int] = {}

    def find(self, ids: Sequence[str]) -> IntArray:
        """Return the row of each id, int64[M]; -1 where there is none."""
        rows = self._find(_hashes(ids))
        known = np.flatnonzero(rows >= 0)
        asked = ids if known.size == len(ids) else [ids[k] for k in known.tolist()]
        for k in np.flatnonzero(self._differ(asked, rows[known])).tolist():
            rows[known[k]] = self._twins.get(asked[k], -1)
        return rows

    def add(self, ids: Sequence[str]) -> None:
        """Give the next rows to ids that have none yet, all different."""
        # In parts, as one long call of Python's own code stops the event loop.
        for start in range(0, len(ids), TEXTS_AT_ONCE):
            self._add(ids[start : start + TEXTS_AT_ONCE])

    def _add(self, ids: Sequence[str]) -> None:
        first, hashes = len(self.ids), _hashes(ids)
        self.ids.extend(ids)
        rows = np.arange(first, len(self.ids))
        if rows.size and len(self.ids) > self._hashes.size:
            self._grow(2 * len(self.ids))
        self._hashes[rows] = hashes
        self._ids[first : len(self.ids)] = ids
        # The first of those with the same hash, unless one before them has it.
        _, at = np.unique(hashes, return_index=True)
        new = np.zeros(rows.size, np.bool_)
        new[at] = True
        new &= self._find(hashes) < 0
        self._insert(rows[new])
        for row in rows[~new].tolist():
            self._twins[self.ids[row]] = row

    def _grow(self, capacity: int) -> None:
        self._hashes = np.resize(self._hashes, capacity)
        ids = np.empty(capacity, np.object_)
        ids[: self._ids.size] = self._ids
        self._ids = ids
        bits = (_SLOTS_PER_ID * capacity - 1).bit_length()
        before = self._slots
        self._slots = np.full(1 << bits, -1, np.int32)
        for start in range(0, before.size, TEXTS_AT_ONCE):
            rows = before[start : start + TEXTS_AT_ONCE]
            self._insert(rows[rows >= 0].astype(np.int64))

    def _find(self, hashes: IntArray) -> IntArray:
        """Return a row with each hash; -1 where there is none."""
        rows = np.full(hashes.shape, -1, np.int64)
        left: IntArray | None = None
        slots, steps = self._way(hashes)
        while True:
            there = self._slots.take(slots)
            taken = there >= 0
            # The last row, which -1 would name, is there too; it does not count.
            found = taken & (self._hashes.take(there, mode="wrap") == hashes)
            if left is None:
                np.copyto(rows, there, where=found)
            else:
                rows[left[found]] = there[found]
            going = np.flatnonzero(taken & ~found)
            if not going.size:
                return rows
            left = going if left is None else left[going]
            hashes, steps = hashes[going], steps[going]
            slots = (slots[going] + steps) & (self._slots.size - 1)

    def _insert(self, rows: IntArray) -> None:
        """Put rows, whose hashes differ from all others, where ``_find`` looks for them."""
        slots, steps = self._way(self._hashes[rows])
        while rows.size:
            free = self._slots.take(slots) < 0
            # Of several that come to the same free slot one stays.
            self._slots[slots[free]] = rows[free]
            going = self._slots.take(slots) != rows
            rows, steps = rows[going], steps[going]
            slots = (slots[going] + steps) & (self._slots.size - 1)

    def _way(self, hashes: IntArray) -> tuple[IntArray, IntArray]:
        """Return the first slot of each hash, and how far it is to the next ones."""
        # Of other bits than the slot; odd, so that it leads past every slot.
        return hashes & (self._slots.size - 1), (hashes >> 32) | 1

    def _differ(self, ids: Sequence[str], rows: IntArray) -> BoolArray:
        """Return which rows have another id than these."""
        there = self._ids.take(rows).tolist()
        if there == list(ids):
            return np.zeros(len(ids), np.bool_)
        return np.array([a != b for a, b in zip(there, ids, strict=True)])


def _hashes(ids: Sequence[str]) -> IntArray:
    return np.fromiter(map(hash, ids), np.int64, len(ids))

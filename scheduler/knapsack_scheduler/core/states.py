"""Positions that are alike, found in passes over the batch and without sorting it.

Success rates are counted, so a batch of a million prompts has a few hundred different
ones: positions with the same numbers (success rate or posterior, and bounds) are one
state, and what is decided of a state is decided of all its positions but for ties.

The bits of the numbers are hashed into a small table that holds one position per slot,
and every position is compared with the one in its slot. Those that differ, because two
states share a slot, are tried again with another hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import FloatArray, IntArray, KeyArray

SlotArray: TypeAlias = npt.NDArray[np.int32]

_SAMPLE = 8192
_REPEATED = 0.75
"""At most this part of the sample is different in a batch whose states repeat."""

_NUMBERED = 0.5
"""At most this part of a batch is different states where they need not be found."""

_REPEATED_OFTEN = 0.35
_LARGE = 1 << 17
"""Up to so many positions are swept fast enough one by one, so that states have to be few."""

_BITS = 16
_MORE_BITS = 18
"""Of the hash: a table that fits the fastest cache, or one for many states."""

_SLOTS_PER_STATE = 16

_CHUNK = 1 << 15
_ROUNDS = 8

_ODD = (
    0x9E3779B97F4A7C15,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0xD6E8FEB86659FD93,
    0xFF51AFD7ED558CCD,
)
"""Multipliers of the columns, with their bits well mixed; every round takes others."""


@dataclass(frozen=True, slots=True)
class States:
    """A batch by its states.

    Attributes:
        rows: one position of each state, int64[G].
        counts: positions of each state, int64[G], 1 or more.
        slots: the number of each state in ``of``, int64[G].
        of: the state of each position as its slot, int32[M].
        width: slots there are; some have no state.
    """

    rows: IntArray
    counts: IntArray
    slots: IntArray
    of: SlotArray
    width: int

    def __len__(self) -> int:
        return int(self.rows.size)

    def spread(self, numbers: IntArray) -> IntArray:
        """Return the number of each position from that of each state, int64[M]."""
        table = np.zeros(self.width, np.int64)
        table[self.slots] = numbers
        return spread(table, self.of)


def spread(table: IntArray, of: npt.NDArray[np.integer[Any]]) -> IntArray:
    """Return ``table[of]``, int64[M]: in chunks, as every index is widened on the way."""
    numbers = np.empty(of.shape, np.int64)
    for start in range(0, of.size, _CHUNK):
        part = of[start : start + _CHUNK].astype(np.intp)
        # "clip" because "raise" would write to a copy first; no index is out of range.
        table.take(part, out=numbers[start : start + part.size], mode="clip")
    return numbers


def find_states(columns: Sequence[FloatArray | IntArray]) -> States | None:
    """Return the states of a batch, or None if too few positions are alike to gain by it.

    Args:
        columns: float64[M] or int64[M] each; positions are alike if all are equal, bit
            by bit.
    """
    numbers = [np.ascontiguousarray(column).view(np.uint64) for column in columns]
    count = numbers[0].size
    sample = np.arange(0, count, max(count // (_SAMPLE if count > _LARGE else _SAMPLE // 4), 1))
    picked = [column[sample] for column in numbers]
    different = np.unique(_hashed(picked, 32, 0)).size
    if different > (_REPEATED if count > _LARGE else _REPEATED_OFTEN) * sample.size:
        return None
    bits = _MORE_BITS if different > sample.size // 2 else _BITS
    # A table that is larger than the batch would cost more than the batch, and one that is
    # much larger than its states costs more than trying the few again that share a slot.
    bits = min(bits, count.bit_length() + 1, (_SLOTS_PER_STATE * different).bit_length())
    of = np.empty(count, np.int32)
    rows = _first_round(numbers, sample, bits, of)
    tables = [rows]
    for turn in range(1, _ROUNDS):
        left = np.flatnonzero(of < 0)
        if left.size == 0:
            break
        if left.size > count // 2 and turn > 1:
            return None
        tables.append(_round(numbers, left, bits, turn, of))
    else:
        return None
    row_of = np.concatenate(tables)
    counts = np.zeros(row_of.size, np.int64)
    step = max(_CHUNK, 4 * row_of.size)
    for start in range(0, count, step):
        counts += np.bincount(of[start : start + step], minlength=row_of.size)
    slots = np.flatnonzero(counts)
    if slots.size > _REPEATED * count:
        return None
    return States(row_of[slots], counts[slots], slots, of, row_of.size)


def numbered_states(of: IntArray) -> States | None:
    """Return the states of a batch that are numbered already; None if too few are alike.

    Args:
        of: the state of each position, int64[M], from 0; not every number need be used.
    """
    counts = np.bincount(of)
    slots = np.flatnonzero(counts)
    if slots.size > _NUMBERED * of.size:
        return None
    row_of = np.zeros(counts.size, np.int64)
    row_of[of] = np.arange(of.size)
    return States(row_of[slots], counts[slots], slots, of.astype(np.int32), counts.size)


def _hashed(numbers: list[KeyArray], shift: int, turn: int) -> KeyArray:
    """Return the highest bits of a sum of products, uint64[M]."""
    mixed = numbers[0] * _multiplier(0, turn)
    for k, column in enumerate(numbers[1:], 1):
        mixed += column * _multiplier(k, turn)
    mixed >>= np.uint64(shift)
    return mixed


def _multiplier(column: int, turn: int) -> np.uint64:
    odd = _ODD[(column + turn) % len(_ODD)]
    return np.uint64((odd * (2 * turn + 1) + 2 * (column // len(_ODD))) % 2**64)


def _first_round(numbers: list[KeyArray], sample: IntArray, bits: int, of: SlotArray) -> IntArray:
    """Give a state to every position that is like one of the sample; -1 to the others.

    In chunks, so that what is in between stays in the cache.
    """
    shift = 64 - bits
    table = np.zeros(1 << bits, np.int64)
    table[_hashed([column[sample] for column in numbers], shift, 0).view(np.int64)] = sample
    held = [column.take(table) for column in numbers]
    for start in range(0, of.size, _CHUNK):
        part = [column[start : start + _CHUNK] for column in numbers]
        slots = _hashed(part, shift, 0).view(np.int64)
        chunk = of[start : start + _CHUNK]
        chunk[:] = slots
        for column, known in zip(part, held, strict=True):
            other = known.take(slots) != column
            if other.any():
                chunk[other] = -1
    return table


def _round(
    numbers: list[KeyArray], left: IntArray, bits: int, turn: int, of: SlotArray
) -> IntArray:
    """Give a state to the positions that are like the last of their slot, among ``left``."""
    part = [column[left] for column in numbers]
    slots = _hashed(part, 64 - bits, turn).view(np.int64)
    table = np.zeros(1 << bits, np.int64)
    table[slots] = np.arange(left.size)
    alike = np.ones(left.size, np.bool_)
    last = table.take(slots)
    for column in part:
        alike &= column.take(last) == column
    of[left[alike]] = slots[alike] + turn * (1 << bits)
    return left[table] if left.size else table

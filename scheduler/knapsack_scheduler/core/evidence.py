"""Rewards become evidence: successes per group, and a window of visits per prompt.

A visit is what one step learned of one prompt under one policy version. A prompt keeps
its ``WINDOW`` newest visits; older ones only live on in undiscounted totals. Because
the window is the newest keys with their sums, it does not depend on the order in which
reports arrive, nor on how they were cut into parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import IntArray

_Item = TypeVar("_Item", bound=np.generic)

WINDOW = 8
"""Visits kept per prompt. At the default discount of 1/2 a ninth would weigh 1/256."""

IMPORT_STEP_OFFSET = 2**60
"""Imported outcomes are merged at ``step - IMPORT_STEP_OFFSET``: older than step 0."""

_EMPTY_STEP = -(2**62)
"""Step of an empty slot: sorts behind every real visit, imported ones included."""


class Visits:
    """Windows of visits as growable columns, one row per prompt, newest visit first.

    Attributes:
        step: int64[P, WINDOW].
        policy_version: int64[P, WINDOW].
        rollouts: int32[P, WINDOW]; 0 marks an empty slot.
        successes: int32[P, WINDOW].
        by_level: rollouts of each reward level, int32[P, WINDOW, K]; None while
            successes and failures have one level each, or when levels are not kept.
    """

    __slots__ = ("_size", "by_level", "policy_version", "rollouts", "step", "successes")

    def __init__(self, rows: int = 0) -> None:
        self._size = 0
        self.step: npt.NDArray[np.int64] = np.empty((0, WINDOW), np.int64)
        self.policy_version: npt.NDArray[np.int64] = np.empty((0, WINDOW), np.int64)
        self.rollouts: npt.NDArray[np.int32] = np.empty((0, WINDOW), np.int32)
        self.successes: npt.NDArray[np.int32] = np.empty((0, WINDOW), np.int32)
        self.by_level: npt.NDArray[np.int32] | None = None
        self.grow(rows)

    def __len__(self) -> int:
        return self._size

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` prompts; new rows are empty. Never shrinks."""
        if rows > self.step.shape[0]:
            # By a quarter more than asked, so that growing one by one stays linear.
            capacity = max(rows, self.step.shape[0] * 5 // 4, 64)
            self.step = resized(self.step, capacity, _EMPTY_STEP)
            self.policy_version = resized(self.policy_version, capacity, 0)
            self.rollouts = resized(self.rollouts, capacity, 0)
            self.successes = resized(self.successes, capacity, 0)
            if self.by_level is not None:
                self.by_level = resized(self.by_level, capacity, 0)
        self._size = max(self._size, rows)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return what ``from_columns`` makes the same windows of: the filled slots."""
        filled = self.rollouts[: self._size] > 0
        at = np.flatnonzero(filled)
        packed = {}
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is not None:
                slots = column[: self._size].reshape(-1, *column.shape[2:])
                packed[name] = slots.take(at, axis=0)
        return {"filled": np.packbits(filled, axis=1), **packed}

    @classmethod
    def from_columns(cls, columns: Mapping[str, npt.NDArray[Any]]) -> Visits:
        """Return the windows of ``columns()``."""
        filled = np.unpackbits(columns["filled"], axis=1, count=WINDOW).astype(bool)
        visits = cls(filled.shape[0])
        if "by_level" in columns:
            levels = columns["by_level"].shape[1]
            visits.by_level = np.zeros((*visits.step.shape, levels), np.int32)
        for name in _COLUMNS:
            if name in columns:
                getattr(visits, name)[: filled.shape[0]][filled] = columns[name]
        return visits


_COLUMNS = ("step", "policy_version", "rollouts", "successes", "by_level")


@dataclass(frozen=True, slots=True)
class Windows:
    """Copies of some prompts' windows, slot by slot: what is done to a slot is done to all.

    Attributes:
        step, policy_version, rollouts, successes: as of ``Visits``, [WINDOW, n].
    """

    step: npt.NDArray[np.int64]
    policy_version: npt.NDArray[np.int64]
    rollouts: npt.NDArray[np.int32]
    successes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, visits: Visits, rows: IntArray) -> Windows:
        """Return the windows of rows, int64[n]."""
        return cls(
            _slots(visits.step, rows),
            _slots(visits.policy_version, rows),
            _slots(visits.rollouts, rows),
            _slots(visits.successes, rows),
        )


def _slots(column: npt.NDArray[_Item], rows: IntArray) -> npt.NDArray[_Item]:
    return np.ascontiguousarray(column.take(rows, axis=0).T)


def resized(column: npt.NDArray[_Item], rows: int, fill: int) -> npt.NDArray[_Item]:
    """Return a column of more rows, the new ones filled with a number."""
    bigger = np.full((rows, *column.shape[1:]), fill, column.dtype)
    bigger[: column.shape[0]] = column
    return bigger


def merge_visits(
    visits: Visits,
    rows: IntArray,
    step: int,
    policy_version: int,
    rollouts: npt.NDArray[np.integer],
    successes: npt.NDArray[np.integer],
    by_level: npt.NDArray[np.integer] | None = None,
) -> None:
    """Add the outcomes of one (step, policy_version) to the windows of ``rows``.

    Commutative and associative: any order and any cut of the same outcomes leaves the
    same windows.

    Args:
        visits: changed in place; must have grown beyond every row.
        rows: int64[n], each row at most once.
        step: the trainer's step, or an imported one less ``IMPORT_STEP_OFFSET``.
        policy_version: version that generated the rollouts.
        rollouts: [n], 0 or more; rows with 0 are left as they are.
        successes: [n], at most ``rollouts``.
        by_level: rollouts of each level, [n, K]; where ``visits`` keeps them.
    """
    counts: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.integer]]] = [
        (visits.rollouts, np.asarray(rollouts)),
        (visits.successes, np.asarray(successes)),
    ]
    if visits.by_level is not None and by_level is not None:
        counts.append((visits.by_level, by_level))
    some = np.asarray(rollouts) > 0
    if not some.all():
        rows, counts = rows[some], [(column, added[some]) for column, added in counts]
    if rows.size == 0:
        return
    place = _newer(visits, rows, step, policy_version)
    inside = place < WINDOW
    if not inside.all():
        rows, place = rows[inside], place[inside]
        counts = [(column, added[inside]) for column, added in counts]
        if rows.size == 0:
            return
    same = (visits.rollouts[rows, place] > 0) & (visits.step[rows, place] == step)
    same &= visits.policy_version[rows, place] == policy_version

    hit, hit_place = rows[same], place[same]
    for column, added in counts:
        column[hit, hit_place] += added[same].astype(np.int32)

    new = ~same
    if not new.any():
        return
    if not new.all():
        rows, place = rows[new], place[new]
        counts = [(column, added[new]) for column, added in counts]
    values: list[tuple[npt.NDArray[Any], int | npt.NDArray[np.integer]]] = [
        (visits.step, step),
        (visits.policy_version, policy_version),
        *counts,
    ]
    # Slots behind the place move one back; the last one falls out.
    if not place.any():
        for column, value in values:
            _push(column, rows, value)
        return
    at = np.arange(rows.size)
    slot = np.arange(WINDOW)
    source = np.where(slot > place[:, None], slot - 1, slot)
    for column, value in values:
        moved = column[rows[:, None], source]
        moved[at, place] = value
        column[rows] = moved


def _newer(visits: Visits, rows: IntArray, step: int, policy_version: int) -> IntArray:
    """Return how many visits of each row are newer than one of this step and version, int64[n]."""

    def are_newer(at: Any) -> npt.NDArray[np.bool_]:
        steps, versions = visits.step[at], visits.policy_version[at]
        later = (steps > step) | ((steps == step) & (versions > policy_version))
        newer: npt.NDArray[np.bool_] = later & (visits.rollouts[at] > 0)
        return newer

    # The newest comes first. Nearly always nothing is newer than what is reported.
    if not are_newer((rows, 0)).any():
        return np.zeros(rows.shape, np.int64)
    counts: IntArray = np.count_nonzero(are_newer(rows), axis=1)
    return counts


def _push(column: npt.NDArray[Any], rows: IntArray, value: int | npt.NDArray[np.integer]) -> None:
    """Put a value before the slots of each row; the last one falls out."""
    slot = column[0, 0].size
    # The slots of all rows stand behind one that is free. Read from there on they are moved
    # back by one, and the first of each row is what fell out of the row before.
    flat = np.empty(slot + rows.size * WINDOW * slot, column.dtype)
    shape = (rows.size, *column.shape[1:])
    column.take(rows, axis=0, out=flat[slot:].reshape(shape), mode="clip")
    moved = flat[: flat.size - slot].reshape(shape)
    moved[:, 0] = value
    column[rows] = moved


@dataclass(frozen=True, slots=True)
class GroupOutcomes:
    """What the rewards of a report say per position.

    Attributes:
        rollouts: delivered rollouts, int64[positions].
        successes: those with a reward above the threshold, int64[positions].
        reward_min, reward_max: float32[positions]; +inf and -inf where none came.
    """

    rollouts: IntArray
    successes: IntArray
    reward_min: npt.NDArray[np.float32]
    reward_max: npt.NDArray[np.float32]


def group_outcomes(
    rewards: npt.NDArray[np.float32],
    owner: IntArray,
    positions: int,
    success_threshold: float,
) -> GroupOutcomes:
    """Return the outcomes of each position from flat rewards.

    Args:
        rewards: float32[n], finite.
        owner: int64[n], the position each reward belongs to, 0..positions-1.
        positions: how many positions there are.
        success_threshold: a rollout is a success if its reward is above this.
    """
    success = rewards.astype(np.float64) > success_threshold
    rollouts = np.bincount(owner, minlength=positions).astype(np.int64)
    successes = np.bincount(owner[success], minlength=positions).astype(np.int64)
    low = np.full(positions, np.inf, np.float32)
    high = np.full(positions, -np.inf, np.float32)
    np.minimum.at(low, owner, rewards)
    np.maximum.at(high, owner, rewards)
    return GroupOutcomes(rollouts, successes, low, high)

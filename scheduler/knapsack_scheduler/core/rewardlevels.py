"""The reward levels of a run: which rewards were seen, and how many rollouts got each.

Judges of a run usually give one of a few rewards: 0 and 1, or 0, 0.1 and 1, or eighths. As
long as there are few of them, a visit's rollouts are counted by level. Which levels there
are does not depend on the order in which rewards arrive: all that were seen, or none once
there were too many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.evidence import WINDOW, Visits
from knapsack_scheduler.core.problem import BoolArray, IntArray

MOST_LEVELS = 16
"""Different rewards beyond which a reward is a success or a failure and no more."""


@dataclass(frozen=True, slots=True)
class RewardLevels:
    """Which rewards were seen.

    Attributes:
        success_threshold: levels above it are successes.
        values: float32[K], ascending.
        rollouts: of each level in the whole run, not discounted, int64[K].
        kept: False once there were too many levels, or if none are wanted; ``values`` is
            then empty.
    """

    success_threshold: float
    values: npt.NDArray[np.float32]
    rollouts: IntArray
    kept: bool

    @classmethod
    def none_yet(cls, success_threshold: float, kept: bool) -> RewardLevels:
        """Return those of a run without rewards."""
        return cls(success_threshold, np.empty(0, np.float32), np.empty(0, np.int64), kept)

    @property
    def success(self) -> BoolArray:
        """Levels that are successes, bool[K]."""
        return self.values.astype(np.float64) > self.success_threshold

    @property
    def plural(self) -> bool:
        """Whether successes or failures have more than one level."""
        successes = int(np.count_nonzero(self.success))
        return successes > 1 or self.values.size - successes > 1

    def index(self, rewards: npt.NDArray[np.float32]) -> IntArray:
        """Return the level of each reward, all of which were seen, int64[n]."""
        return np.searchsorted(self.values, rewards).astype(np.int64)

    def with_rewards(self, rewards: npt.NDArray[np.float32]) -> RewardLevels:
        """Return the levels after these rewards, finite float32[n], were seen too."""
        if not self.kept or rewards.size == 0:
            return self
        counts = np.array([np.count_nonzero(rewards == value) for value in self.values], np.int64)
        if counts.sum() == rewards.size:
            # Nothing new, as nearly always: no need to sort.
            return replace(self, rollouts=self.rollouts + counts)
        # 0 and -0 are one level; so they are to a sort, which keeps either.
        new, counts = np.unique(rewards + np.float32(0.0), return_counts=True)
        values = np.union1d(self.values, new)
        if values.size > MOST_LEVELS:
            return RewardLevels.none_yet(self.success_threshold, False)
        rollouts = np.zeros(values.size, np.int64)
        rollouts[np.searchsorted(values, self.values)] = self.rollouts
        rollouts[np.searchsorted(values, new)] += counts
        return RewardLevels(self.success_threshold, values, rollouts, True)


def relevel(visits: Visits, before: RewardLevels, after: RewardLevels) -> None:
    """Count visits by the levels of ``after``; changes ``visits``.

    With one level of each class at most, counts by level are the successes and failures
    of the visit and are not kept.

    Args:
        visits: counted by the levels of ``before``.
        before, after: levels of the run; those after hold those before, or are not kept.
    """
    if not after.plural:
        visits.by_level = None
        return
    if before.values.size == after.values.size and visits.by_level is not None:
        return
    counts = np.zeros((visits.step.shape[0], WINDOW, after.values.size), np.int32)
    place = np.searchsorted(after.values, before.values)
    if visits.by_level is not None:
        counts[:, :, place] = visits.by_level
    else:
        for level, success in zip(place, before.success, strict=True):
            failures = visits.rollouts - visits.successes
            counts[:, :, level] = visits.successes if success else failures
    visits.by_level = counts


def counted_by_level(owner: IntArray, level: IntArray, rows: int, levels: int) -> IntArray:
    """Return how many rollouts of each row are of each level, int64[rows, levels].

    Args:
        owner: row of each rollout, int64[n].
        level: its level, int64[n].
        rows, levels: how many there are.
    """
    flat = np.bincount(owner * levels + level, minlength=rows * levels)
    return flat.reshape(rows, levels).astype(np.int64)

"""How often groups came out effective, against how often that was predicted.

A prediction is made for every group that is given rollouts and is not effective already:
the chance that it is when they have come. It is judged when all of them came, so that lost
rollouts are nobody's error. Sums are exact integers, kept by predicted chance: a policy
that is right on average may still be wrong about hard and about easy prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray

BINS = 10
"""Groups are counted by predicted chance: [0, 0.1), [0.1, 0.2) .. [0.9, 1]."""

_UNIT = 2.0**-30
"""Of the summed chances: exact for up to 2**33 rollouts."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted and realised effective groups, by predicted chance.

    Attributes:
        groups: groups judged, int64[BINS].
        effective: those that came out effective, int64[BINS].
        rollouts: rollouts of the judged groups, int64[BINS].
        effective_rollouts: those in groups that came out effective, int64[BINS].
        units: sum of the predicted chances of the groups, and of the rollouts, in units of
            2**-30, int64[2, BINS].
    """

    groups: IntArray
    effective: IntArray
    rollouts: IntArray
    effective_rollouts: IntArray
    units: IntArray

    @classmethod
    def nothing(cls) -> Calibration:
        """Return that of a run in which no group was judged."""
        zero = np.zeros(BINS, np.int64)
        return cls(zero, zero, zero, zero, np.zeros((2, BINS), np.int64))

    @property
    def predicted(self) -> FloatArray:
        """Effective groups that were predicted, float64[BINS]."""
        return _chances(self.units[0])

    @property
    def predicted_rollouts(self) -> FloatArray:
        """Rollouts in effective groups that were predicted, float64[BINS]."""
        return _chances(self.units[1])

    @classmethod
    def of_groups(
        cls,
        chance: npt.NDArray[np.float32],
        rollouts: IntArray,
        effective: BoolArray,
    ) -> Calibration:
        """Return the sums over some judged groups.

        Args:
            chance: what was predicted, float32[n] in [0, 1].
            rollouts: of each group, int64[n].
            effective: what came, bool[n].
        """
        at = np.minimum((chance * BINS).astype(np.int64), BINS - 1)
        units = np.rint(chance.astype(np.float64) / _UNIT).astype(np.int64)
        return cls(
            _sums(at, np.ones_like(rollouts)),
            _sums(at, effective.astype(np.int64)),
            _sums(at, rollouts),
            _sums(at, rollouts * effective),
            np.stack([_sums(at, units), _sums(at, units * rollouts)]),
        )

    def plus(self, other: Calibration) -> Calibration:
        """Return the sums over the groups of both."""
        return Calibration(
            self.groups + other.groups,
            self.effective + other.effective,
            self.rollouts + other.rollouts,
            self.effective_rollouts + other.effective_rollouts,
            self.units + other.units,
        )


def _chances(units: IntArray) -> FloatArray:
    return units.astype(np.float64) * _UNIT


def _sums(at: IntArray, numbers: IntArray) -> IntArray:
    sums = np.zeros(BINS, np.int64)
    np.add.at(sums, at, numbers)
    return sums

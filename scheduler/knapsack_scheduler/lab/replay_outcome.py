"""What a replay found, step by step and in sums, with what is measured kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray
from knapsack_scheduler.lab.arms import Arm
from knapsack_scheduler.lab.hindsight import Hindsight
from knapsack_scheduler.lab.intervals import t_quantile
from knapsack_scheduler.lab.outcome_log import OutcomeLog
from knapsack_scheduler.lab.population import BANDS

FEWEST_BLOCKS = 10
"""Blocks of steps below which no interval is given."""

_BLOCKS = 20


class Column(IntEnum):
    """What is counted of an arm at each step.

    EXTRA is what is extrapolated and comes on top of what is measured; BEYOND are the
    rollouts that the log does not have, which are in ROLLOUTS.
    """

    GROUPS = 0
    ROLLOUTS = 1
    BEYOND = 2
    EFFECTIVE_GROUPS = 3
    EXTRA_GROUPS = 4
    EFFECTIVE_ROLLOUTS = 5
    EXTRA_ROLLOUTS = 6
    VALUE = 7
    EXTRA_VALUE = 8
    PREDICTED_GROUPS = 9
    PREDICTED_ROLLOUTS = 10
    PREDICTED_VALUE = 11
    TOKENS = 12


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of an arm.

    Attributes:
        measured: the part that the log has.
        extrapolated: the part that it has not.
        predicted: what the policy's last decision of each step expected.
    """

    measured: float
    extrapolated: float
    predicted: float

    @property
    def total(self) -> float:
        """Both parts."""
        return self.measured + self.extrapolated

    @property
    def unsupported(self) -> float:
        """The share of the figure that is extrapolated, 0..1."""
        return self.extrapolated / self.total if self.total > 0.0 else 0.0


class Calibration:
    """Predicted chances to become effective, against what was measured, in ten bins.

    Only of groups that were open when the last decision of a step fell and whose
    rollouts the log all has.

    Attributes:
        groups: int64[10].
        predicted, effective: sums of chances and of groups, float64[10].
    """

    BINS = 10

    def __init__(self) -> None:
        self.groups = np.zeros(self.BINS, np.int64)
        self.predicted = np.zeros(self.BINS)
        self.effective = np.zeros(self.BINS)

    def add(self, chance: FloatArray, effective: BoolArray) -> None:
        """Count some groups."""
        bins = np.clip((chance * self.BINS).astype(np.int64), 0, self.BINS - 1)
        self.groups += np.bincount(bins, minlength=self.BINS)
        self.predicted += np.bincount(bins, chance, self.BINS)
        self.effective += np.bincount(bins, effective, self.BINS)


@dataclass(slots=True)
class ExtrapolationCheck:
    """Extrapolations of half of a group, against the other half, over the whole log.

    Attributes:
        groups: whose first half is all equal; each once per replicate.
        predicted: sum of their chances to become effective with the second half.
        variance: of that sum, if the chances are right.
        effective: how many did.
    """

    groups: int = 0
    predicted: float = 0.0
    variance: float = 0.0
    effective: int = 0

    def add(self, chance: FloatArray, effective: BoolArray) -> None:
        """Count some groups."""
        self.groups += chance.size
        self.predicted += float(chance.sum())
        self.variance += float((chance * (1.0 - chance)).sum())
        self.effective += int(np.count_nonzero(effective))


class ArmOutcome:
    """What an arm would have done and got.

    Attributes:
        arm: the arm.
        columns: float64[Column, S], by step; means over the replicates.
        size_counts: groups of each size, float64, position n for size n.
        band_rollouts: rollouts by band, float64[bands].
        band_effective: effective groups by band, extrapolated ones among them.
        calibration: of its predictions.
    """

    def __init__(self, arm: Arm, steps: int) -> None:
        self.arm = arm
        self.columns = np.zeros((len(Column), steps))
        self.size_counts = np.zeros(1)
        self.band_rollouts = np.zeros(len(BANDS))
        self.band_effective = np.zeros(len(BANDS))
        self.calibration = Calibration()

    def count_sizes(self, sizes: IntArray) -> None:
        """Count groups by their sizes."""
        counts = np.bincount(sizes).astype(np.float64)
        if counts.size > self.size_counts.size:
            counts[: self.size_counts.size] += self.size_counts
            self.size_counts = counts
        else:
            self.size_counts[: counts.size] += counts

    def add_bands(self, rollouts: FloatArray, effective: FloatArray) -> None:
        """Add rollouts and effective groups by band."""
        self.band_rollouts += rollouts
        self.band_effective += effective

    def average(self, replicates: int) -> None:
        """Turn sums over replicates into means."""
        self.columns /= replicates
        self.size_counts /= replicates
        self.band_rollouts /= replicates
        self.band_effective /= replicates

    def sum_of(self, column: Column) -> float:
        """Return a column's sum over all steps."""
        return float(self.columns[column].sum())

    @property
    def largest_group(self) -> int:
        """Rollouts of the largest group of any step."""
        return self.size_counts.size - 1

    @property
    def beyond_log(self) -> float:
        """Share of the arm's rollouts that the log does not have, 0..1."""
        return self.sum_of(Column.BEYOND) / max(self.sum_of(Column.ROLLOUTS), 1.0)

    @property
    def effective_group_rate(self) -> Figure:
        """Share of groups that are effective."""
        return self._figure(
            Column.EFFECTIVE_GROUPS, Column.EXTRA_GROUPS, Column.PREDICTED_GROUPS, Column.GROUPS
        )

    @property
    def effective_rollout_rate(self) -> Figure:
        """Share of rollouts that lie in effective groups."""
        return self._figure(
            Column.EFFECTIVE_ROLLOUTS,
            Column.EXTRA_ROLLOUTS,
            Column.PREDICTED_ROLLOUTS,
            Column.ROLLOUTS,
        )

    @property
    def value(self) -> Figure:
        """Information gain of all steps."""
        return self._figure(Column.VALUE, Column.EXTRA_VALUE, Column.PREDICTED_VALUE, None)

    def _figure(
        self, measured: Column, extra: Column, predicted: Column, of: Column | None
    ) -> Figure:
        whole = 1.0 if of is None else max(self.sum_of(of), 1.0)
        return Figure(
            self.sum_of(measured) / whole,
            self.sum_of(extra) / whole,
            self.sum_of(predicted) / whole,
        )


@dataclass(frozen=True, slots=True)
class Replay:
    """A replayed log.

    Attributes:
        log: what was replayed.
        hindsight: what it says of every group's success rate.
        bands: of every group, int64[G], positions in ``BANDS``.
        valued: name of the information gain that value is counted in.
        outcomes: of each arm, in the order asked for.
        check: of the extrapolation, on the log itself.
        logged_value: value of each step as it was, float64[S].
        widened_steps: steps whose budget the bounds could not hold, and were widened for.
    """

    log: OutcomeLog
    hindsight: Hindsight
    bands: IntArray
    valued: str
    outcomes: tuple[ArmOutcome, ...]
    check: ExtrapolationCheck
    logged_value: FloatArray
    widened_steps: int

    def outcome(self, arm: str) -> ArmOutcome | None:
        """Return the outcome of the arm of that name, None if it was not asked for."""
        return next((one for one in self.outcomes if one.arm.name == arm), None)


def relative_gain(arm: ArmOutcome, baseline: ArmOutcome) -> tuple[float, float | None]:
    """Return by how much an arm's value exceeds another's, and half a 95 % interval.

    Both relative to the other's. The interval is that of the mean of at most 20 blocks of
    consecutive steps, paired by step: it holds for other rewards and other batches of the
    same kind, and not for the error of an extrapolation. None with fewer than 10 steps.
    """
    ours = arm.columns[Column.VALUE] + arm.columns[Column.EXTRA_VALUE]
    theirs = baseline.columns[Column.VALUE] + baseline.columns[Column.EXTRA_VALUE]
    whole = float(theirs.sum())
    if whole <= 0.0:
        return 0.0, None
    gain = float((ours - theirs).sum()) / whole
    if ours.size < FEWEST_BLOCKS:
        return gain, None
    blocks = np.array_split(np.arange(ours.size), min(_BLOCKS, ours.size))
    # Residuals of the ratio: what each block has above what the whole says.
    residual = ours - (1.0 + gain) * theirs
    sums = np.array([residual[block].sum() for block in blocks])
    count = len(blocks)
    spread = float(np.sqrt(count / (count - 1) * ((sums - sums.mean()) ** 2).sum()))
    return gain, t_quantile(count - 1) * spread / whole

"""What is measured of an arm, and how it differs from uniform."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.problem import BoolArray, FloatArray
from knapsack_scheduler.lab.arms import BASELINE, Arm
from knapsack_scheduler.lab.intervals import Interval, interval
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.scenario import Scenario
from knapsack_scheduler.lab.simulate import Trace

ALL, FIRST, LATER = "all epochs", "first epoch", "later epochs"
"""Windows. In the first epoch nothing is known of any prompt, so only waves can win there."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of a trace over some steps.

    Attributes:
        name: what reports call it.
        of: the number; NaN where it has no meaning.
        relative: differences are in per cent of uniform's; else in points of a share.
    """

    name: str
    of: Callable[[Trace, BoolArray], float]
    relative: bool

    def difference(self, one: Trace, other: Trace, steps: BoolArray) -> float:
        """Return by how much ``one`` is above ``other``, in per cent or in points."""
        a, b = self.of(one, steps), self.of(other, steps)
        if not self.relative:
            return 100.0 * (a - b)
        return 100.0 * (a / b - 1.0) if b > 0.0 else math.nan


GROUP_RATE = Measure(
    "effective group rate",
    lambda t, steps: _ratio(t.effective_groups[steps], t.groups[steps]),
    relative=False,
)
ROLLOUT_RATE = Measure(
    "effective rollout rate",
    lambda t, steps: _ratio(t.effective_rollouts[steps], t.rollouts[steps]),
    relative=False,
)
VALUE = Measure("value", lambda t, steps: float(t.value[steps].mean()), relative=True)
TOKENS = Measure("tokens", lambda t, steps: float(t.tokens[steps].mean()), relative=True)
SUCCESS = Measure(
    "success rate at the end", lambda t, steps: float(t.success_rate[-1]), relative=False
)
PREDICTED_GROUP_RATE = Measure(
    "predicted effective group rate",
    lambda t, steps: _ratio(t.predicted_effective_groups[steps], t.groups[steps]),
    relative=False,
)
PREDICTED_ROLLOUT_RATE = Measure(
    "predicted effective rollout rate",
    lambda t, steps: _ratio(t.predicted_effective_rollouts[steps], t.rollouts[steps]),
    relative=False,
)
PREDICTED_VALUE = Measure(
    "predicted value", lambda t, steps: float(t.predicted_value[steps].mean()), relative=True
)

SIDE_BY_SIDE = (GROUP_RATE, ROLLOUT_RATE, VALUE)
"""Never one without the others: a rule can win any one of them by losing the rest."""


@dataclass(frozen=True, slots=True)
class Results:
    """Every trace of one scenario.

    Attributes:
        scenario: what was simulated.
        arms: compared, uniform among them.
        seeds: each seed's traces, by name of the arm.
    """

    scenario: Scenario
    arms: tuple[Arm, ...]
    seeds: tuple[dict[str, Trace], ...]

    @property
    def windows(self) -> tuple[str, ...]:
        """The windows that have steps."""
        return (ALL, FIRST, LATER) if self.scenario.run.epochs > 1 else (ALL,)

    def traces(self, arm: str) -> tuple[Trace, ...]:
        """Return the traces of one arm, in the order of seeds."""
        return tuple(seed[arm] for seed in self.seeds)

    def level(self, arm: str, measure: Measure, window: str = ALL) -> Interval:
        """Return the measure itself over seeds."""
        return interval([measure.of(t, steps_of(t, window)) for t in self.traces(arm)])

    def against_uniform(self, arm: str, measure: Measure, window: str = ALL) -> Interval:
        """Return the difference from uniform, paired by seed, in per cent or points."""
        return interval(
            [
                measure.difference(seed[arm], seed[BASELINE], steps_of(seed[arm], window))
                for seed in self.seeds
            ]
        )

    def per_epoch(self, arm: str, measure: Measure) -> FloatArray:
        """Return the measure of each seed and epoch, float64[seeds, epochs]."""
        return np.array(
            [
                [measure.of(t, t.epoch == epoch) for epoch in range(self.scenario.run.epochs)]
                for t in self.traces(arm)
            ]
        )

    def band_shares(self, arm: str) -> FloatArray:
        """Return the share of all rollouts by band, in the order of ``BANDS``."""
        rollouts = _summed([t.band_rollouts for t in self.traces(arm)])
        shares: FloatArray = rollouts / rollouts.sum()
        return shares

    def band_sizes(self, arm: str) -> FloatArray:
        """Return the mean rollouts of a group by band; NaN where there was none."""
        rollouts = _summed([t.band_rollouts for t in self.traces(arm)])
        groups = _summed([t.band_groups for t in self.traces(arm)])
        sizes = np.full(len(BANDS), np.nan)
        np.divide(rollouts, groups, out=sizes, where=groups > 0)
        return sizes

    def largest_group(self, arm: str) -> int:
        """Return the rollouts of the largest group of any seed."""
        return max(int(t.largest_group.max()) for t in self.traces(arm))


def steps_of(trace: Trace, window: str) -> BoolArray:
    """Return which steps lie in a window, bool[steps]."""
    steps: BoolArray = np.ones(trace.epoch.shape, np.bool_)
    if window == FIRST:
        steps = trace.epoch == 0
    elif window == LATER:
        steps = trace.epoch > 0
    return steps


def verdict(results: Results, arm: str) -> str:
    """Return in a sentence where an arm is above and below uniform, and at whose cost.

    An arm is above where the whole interval of the difference is (with one seed: where
    the difference is). One that is above in some of ``SIDE_BY_SIDE`` and below in others
    wins the first by starving somebody; the sentence says whom.
    """
    differences = {m: results.against_uniform(arm, m) for m in SIDE_BY_SIDE}
    above = [m for m, d in differences.items() if d.above_zero]
    below = [m for m, d in differences.items() if d.below_zero]
    said = {m: _said(m, d) for m, d in differences.items()}
    if above and below:
        return (
            f"{arm} wins {_listed([said[m] for m in above])} and loses "
            f"{_listed([said[m] for m in below])}, by starving others: {_moved(results, arm)}"
        )
    if above:
        same = [m.name for m in SIDE_BY_SIDE if m not in above]
        rest = f", and not below it in {_listed(same)}" if same else ""
        return f"{arm} is above uniform in {_listed([said[m] for m in above])}{rest}."
    if below:
        return f"{arm} is below uniform in {_listed([said[m] for m in below])}, above in nothing."
    return f"{arm} is not to be told from uniform in {_listed([m.name for m in SIDE_BY_SIDE])}."


def _said(measure: Measure, difference: Interval) -> str:
    unit = "%" if measure.relative else " points"
    return f"{measure.name} ({difference.mean:+.1f}{unit})"


def _moved(results: Results, arm: str) -> str:
    """Return whose rollouts went to whom."""
    there, here = results.band_shares(arm), results.band_shares(BASELINE)
    moved = there - here
    most, least = int(np.argmax(moved)), int(np.argmin(moved))
    return (
        f"it gives {there[most]:.0%} of the rollouts to {BANDS[most]} prompts (uniform "
        f"{here[most]:.0%}) and {there[least]:.0%} to {BANDS[least]} ones (uniform "
        f"{here[least]:.0%})."
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _summed(columns: Sequence[FloatArray]) -> FloatArray:
    """Return the sum over traces and steps, float64[bands]."""
    total: FloatArray = np.concatenate(columns).sum(axis=0)
    return total


def _ratio(part: FloatArray, whole: FloatArray) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else math.nan

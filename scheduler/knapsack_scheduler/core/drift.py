"""How success rates have moved since they were last seen, learned from the run itself.

A policy that learns makes old outcomes out of date: most prompts succeed more often than
they did, and those seen as hopeless more often than that. What older visits said of a
prompt is therefore compared with what its newest visit brought, over the prompts that were
visited last: a logistic regression of the newest outcomes on the log-odds of the mean that
the older ones gave. Decisions then move every mean by the curve so found, and keep the
weight of the evidence. With little to learn from, the curve stays near the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.elementary import exp, log
from knapsack_scheduler.core.problem import FloatArray, IntArray

PROMPTS = 512
"""Prompts visited last that the curve is fitted to."""

FEWEST_PROMPTS = 50
"""Fewer tell nothing."""

_SHIFT_VARIANCE = 0.25
_SLOPE_VARIANCE = 0.0625
"""Of the normal priors around the identity."""

_SHIFT = 2.0
_SLOPE = (0.3, 2.0)
"""How far the curve may be from the identity."""

_ALIKE = 0.2
"""How alike the rollouts of a visit are beyond what the curve explains: n of them count as
``n / (1 + 0.2 (n - 1))``."""

_MEAN = (1e-3, 1.0 - 1e-3)
"""Of a posterior that was moved."""

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Drift:
    """Where a mean goes: ``logit(m') = shift + slope logit(m)``."""

    shift: float = 0.0
    slope: float = 1.0

    def moved(self, alpha: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return Beta posteriors of the same weight with their means moved.

        Args:
            alpha, beta: float64[M], > 0.
        """
        if self == Drift():
            return alpha, beta
        total = alpha + beta
        mean = np.clip(_mean(self.shift + self.slope * log(alpha / beta)), *_MEAN)
        return mean * total, (1.0 - mean) * total


def fit_drift(
    alpha: FloatArray, beta: FloatArray, rollouts: IntArray, successes: IntArray
) -> Drift:
    """Return the curve that leads from what older visits said to what the newest brought.

    The most probable one by Newton's method. Sums are taken in the order given, so that
    the same prompts in the same order give the same bits everywhere.

    Args:
        alpha, beta: posterior of each prompt from the visits before its newest, float64[n].
        rollouts, successes: of its newest visit, int64[n], 1 or more rollouts.
    """
    if rollouts.size < FEWEST_PROMPTS:
        return Drift()
    odds = log(alpha / beta)
    n = rollouts.astype(np.float64)
    weight = 1.0 / (1.0 + _ALIKE * (n - 1.0))
    shift, slope = 0.0, 1.0
    for _ in range(_ROUNDS):
        mean = _mean(shift + slope * odds)
        missed = weight * (successes - n * mean)
        spread = weight * n * mean * (1.0 - mean)
        down = _sum(missed) - shift / _SHIFT_VARIANCE
        across = _sum(missed * odds) - (slope - 1.0) / _SLOPE_VARIANCE
        a = _sum(spread) + 1.0 / _SHIFT_VARIANCE
        b = _sum(spread * odds)
        c = _sum(spread * odds * odds) + 1.0 / _SLOPE_VARIANCE
        scale = a * c - b * b
        before = shift, slope
        shift = min(max(shift + (c * down - b * across) / scale, -_SHIFT), _SHIFT)
        slope = min(max(slope + (a * across - b * down) / scale, _SLOPE[0]), _SLOPE[1])
        if abs(shift - before[0]) + abs(slope - before[1]) < 1e-9:
            break
    return Drift(shift, slope)


def _mean(odds: FloatArray) -> FloatArray:
    result: FloatArray = 1.0 / (1.0 + exp(-odds))
    return result


def _sum(numbers: FloatArray) -> float:
    """Add one by one: np.sum may choose another order."""
    return float(np.cumsum(numbers)[-1])

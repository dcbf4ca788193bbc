"""How success rates of a log's prompts are spread, and how they move from visit to visit.

A hidden Markov model on a grid of logits: the rate at a prompt's first visit is drawn from
a distribution without a form, and between two visits its logit moves by a normal step, the
same for all prompts. Both are fitted by likelihood: the steps' mean and spread over a grid,
the distribution by expectation and maximisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.problem import FloatArray, IntArray

_SPACING = 1 / 3
LOGITS = np.arange(-24, 25) * _SPACING
"""The grid: rates from 0.0003 to 0.9997."""

RATES = 1.0 / (1.0 + np.exp(-LOGITS))
LOG_RATES, LOG_FAILURES = np.log(RATES), np.log1p(-RATES)

SPREADS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
MEANS = tuple(np.arange(-6, 13) / 8)
"""What is tried for a logit's step between two visits."""

_LEAST_LOG_LIKELIHOOD = -140.0
_START_PASSES = 100
_JOINT_PASSES = 5


@dataclass(frozen=True, slots=True)
class Drift:
    """A fitted model.

    Attributes:
        start: distribution of the rate at the first visit, float64[K].
        kernel: where a rate goes until the next visit, float64[K, K], rows sum to 1.
        mean, spread: of a logit's step; 0 where no prompt has two visits.
    """

    start: FloatArray
    kernel: FloatArray
    mean: float
    spread: float


@dataclass(frozen=True, slots=True)
class Visits:
    """Visit by visit, the counts of prompts that have such a visit, longest chains first.

    Attributes:
        rollouts, successes: per visit int64[p], p falling: position k is the same prompt.
    """

    rollouts: Sequence[IntArray]
    successes: Sequence[IntArray]

    def likelihoods(self) -> list[FloatArray]:
        """Return per visit the likelihood of its counts at every rate, float64[p, K]."""
        return [likelihood(n, k) for n, k in zip(self.rollouts, self.successes, strict=True)]


def likelihood(rollouts: IntArray, successes: IntArray) -> FloatArray:
    """Return the likelihood of counts at every rate, float64[n, K], the highest 1 in a row."""
    log = np.outer(successes, LOG_RATES)
    log += np.outer(rollouts - successes, LOG_FAILURES)
    log -= log.max(axis=1, keepdims=True)
    # Never 0: visits may contradict each other under every model.
    result: FloatArray = np.exp(np.maximum(log, _LEAST_LOG_LIKELIHOOD))
    return result


def fit_drift(visits: Visits) -> Drift:
    """Return the model under which the counts are likeliest."""
    of = visits.likelihoods()
    start = np.full(RATES.size, 1.0 / RATES.size)
    counts, times = np.unique(
        np.stack([visits.rollouts[0], visits.successes[0]]), axis=1, return_counts=True
    )
    first = likelihood(counts[0], counts[1])
    for _ in range(_START_PASSES):
        posterior = first * start
        posterior /= posterior.sum(axis=1, keepdims=True)
        start = times @ posterior / times.sum()
    if len(of) == 1:
        return Drift(start, np.eye(RATES.size), 0.0, 0.0)
    mean, spread = 0.0, 0.35
    for _ in range(2):
        spread = _likeliest(SPREADS, [_evidence(start, mean, one, of) for one in SPREADS])
        mean = _likeliest(MEANS, [_evidence(start, one, spread, of) for one in MEANS])
    kernel = normal_kernel(mean, spread)
    for _ in range(_JOINT_PASSES):
        after = backward(kernel, of)[0]
        posterior = start * of[0] * after
        posterior /= posterior.sum(axis=1, keepdims=True)
        start = posterior.mean(axis=0)
    return Drift(start, kernel, mean, spread)


def normal_kernel(mean: float, spread: float) -> FloatArray:
    """Return a normal step of the logit on the grid, float64[K, K]; ends hold what leaves.

    What lands between two points is shared by them, so that the mean is kept.
    """
    count = LOGITS.size
    offsets = np.arange(-count, count + 1) * _SPACING
    ramp = np.array([_expected_excess(mean - offset, spread) for offset in offsets])
    weight = np.maximum(ramp[:-2] - 2.0 * ramp[1:-1] + ramp[2:], 0.0) / _SPACING
    kernel = np.empty((count, count))
    for at in range(count):
        low, high = count - 1 - at, 2 * count - 1 - at
        kernel[at] = weight[low:high]
        kernel[at, 0] += weight[:low].sum()
        kernel[at, -1] += weight[high:].sum()
    result: FloatArray = kernel / kernel.sum(axis=1, keepdims=True)
    return result


def forward(start: FloatArray, kernel: FloatArray, of: Sequence[FloatArray]) -> list[FloatArray]:
    """Return per visit the rates that the visits before it expect, float64[p, K], rows to 1."""
    expected = [np.broadcast_to(start, of[0].shape)]
    for at in range(1, len(of)):
        count = of[at].shape[0]
        seen = expected[-1][:count] * of[at - 1][:count]
        expected.append((seen / seen.sum(axis=1, keepdims=True)) @ kernel)
    return expected


def backward(kernel: FloatArray, of: Sequence[FloatArray]) -> list[FloatArray]:
    """Return per visit how well each rate fits the visits after it, float64[p, K]."""
    fits = [np.ones_like(one) for one in of]
    for at in range(len(of) - 1, 0, -1):
        later = (of[at] * fits[at]) @ kernel.T
        fits[at - 1][: later.shape[0]] = later / later.max(axis=1, keepdims=True)
    return fits


def _evidence(start: FloatArray, mean: float, spread: float, of: Sequence[FloatArray]) -> float:
    """Return the log likelihood of all counts, but for what no model moves."""
    expected = forward(start, normal_kernel(mean, spread), of)
    return sum(
        float(np.log((one * other).sum(axis=1)).sum())
        for one, other in zip(expected, of, strict=True)
    )


def _likeliest(tried: Sequence[float], evidence: Sequence[float]) -> float:
    return float(tried[int(np.argmax(evidence))])


def _expected_excess(mean: float, spread: float) -> float:
    """Return E[max(X, 0)] of a normal X."""
    if spread <= 0.0:
        return max(mean, 0.0)
    z = mean / spread
    density = math.exp(-z * z / 2.0) / math.sqrt(2.0 * math.pi)
    return mean * 0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) + spread * density

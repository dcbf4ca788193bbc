"""How the success rates of a run are spread, and what evidence says of a prompt against that.

The prior of a run is a histogram: weights of points that are evenly spaced in log-odds. It
can be narrow, have several peaks, or hold prompts that never or always succeed, which no
Beta distribution can at once. The weights are fitted by expectation-maximisation to the
prompts that were visited last, a few rounds only, so that it stays as smooth as little
evidence is. A prompt's evidence picks out of the histogram what agrees with it; the Beta
distribution of the same mean and variance is what is believed.

Evidence is counted in sixteenths of a rollout, so that all powers of success rates are
looked up. Else only additions, multiplications and divisions in a fixed order are used: the
same evidence gives the same bits everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.distinct import distinct
from knapsack_scheduler.core.elementary import exp, log
from knapsack_scheduler.core.problem import FloatArray, IntArray

PROMPTS = 512
"""Prompts visited last that the histogram is fitted to."""

_POINTS = 25
_FURTHEST = 8.0
"""Log-odds of the outermost points: success rates of 1/3000 and 2999/3000 stand for never and
always."""

_MOST = 32
"""Rollouts that meet the histogram: of more evidence this much, scaled down. The points are
about as far apart as twice what so many rollouts leave uncertain, so that sums over them are
as good as integrals; the rest of the evidence is added to the Beta distribution."""

_ROUNDING = 1.0 + 1e-12
"""By how much evidence that was held to ``_MOST`` rollouts may be more."""

_UNITS = 16
"""Per rollout."""

_PSEUDO_PROMPTS = 8.0
"""Prompts of Beta(1/2, 1/2) in the fit: what is assumed before there is data."""

_ROUNDS = 4

_LEAST_VARIANCE = 1e-9
_LEAST_STRENGTH = 0.05

_REPEATING = 1200
"""Prompts among whom so many have the same evidence that it is worth while to find them."""

_CHUNK = 1 << 11
"""Prompts at once: an array of 400 kB, which stays in the cache."""


def _powers(sign: float) -> FloatArray:
    """Return the success rates (or failure rates) to the powers k/16, [points, k]."""
    odds = np.linspace(-_FURTHEST, _FURTHEST, _POINTS)
    logarithm = -log(1.0 + exp(-sign * odds))
    exponents = np.arange(_MOST * _UNITS + 1) / _UNITS
    return exp(logarithm[:, None] * exponents)


_PASSED, _FAILED = _powers(1.0), _powers(-1.0)
_RATES = _PASSED[:, _UNITS]
_HALF = _PASSED[:, _UNITS // 2] * _FAILED[:, _UNITS // 2]
_START = _HALF / np.cumsum(_HALF)[-1]
"""Beta(1/2, 1/2): its density of the log-odds is that of p^(1/2) q^(1/2)."""


def fit_rates(successes: FloatArray, failures: FloatArray) -> tuple[float, ...]:
    """Return the weight of each point, in sum 1; () for no prompts: nothing is known.

    Sums are taken in an order of their own, so that the same prompts in the same order give
    the same bits everywhere.

    Args:
        successes, failures: discounted evidence of each prompt, float64[n], >= 0.
    """
    if successes.size == 0:
        return ()
    passed, failed = _held(successes, failures)
    likelihood = _likelihood(_units(passed), _units(failed))
    weights = _START
    for _ in range(_ROUNDS):
        found = _folded(likelihood * weights[:, None])
        agreed = _folded((likelihood / found).T)
        weights = (weights * agreed + _PSEUDO_PROMPTS * _START) / (successes.size + _PSEUDO_PROMPTS)
    return tuple(weights.tolist())


def believed(
    weights: tuple[float, ...], successes: FloatArray, failures: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the Beta distribution of each prompt's success rate, alpha and beta, float64[M].

    Args:
        weights: of the points, from ``fit_rates``; not ().
        successes, failures: discounted evidence of each prompt, float64[M], >= 0.
    """
    kinds = kinds_of(successes, failures)
    if kinds is not None:
        alpha, beta = believed_units(weights, kinds.passed, kinds.failed)
        return alpha.take(kinds.of), beta.take(kinds.of)
    passed, failed = _held(successes, failures)
    alpha, beta = believed_units(weights, _units(passed), _units(failed))
    return alpha + (successes - passed), beta + (failures - failed)


@dataclass(frozen=True, slots=True)
class Kinds:
    """A batch by the evidence that the histogram tells apart.

    Attributes:
        passed, failed: of each kind in sixteenths of a rollout, int64[K]. Prompts without any
            evidence are the last kind, which may have no position.
        of: the kind of each position, int64[M].
    """

    passed: IntArray
    failed: IntArray
    of: IntArray


def kinds_of(successes: FloatArray, failures: FloatArray) -> Kinds | None:
    """Return the kinds of a large batch; None for a small one, or one with more evidence.

    A large batch holds the same evidence many times. More of it than meets the histogram is
    added to what comes of that, and then no two prompts need be alike.

    Args:
        successes, failures: as for ``believed``.
    """
    if successes.size < _REPEATING:
        return None
    total = successes + failures
    if float(total.max()) > _MOST * _ROUNDING:
        return None
    width = _MOST * _UNITS + 2
    code = _units(successes)
    code *= width
    code += _units(failures)
    nothing = width * width
    code[total == 0.0] = nothing
    different, which = distinct(code, nothing + 1)
    if different[-1] != nothing:
        different = np.append(different, nothing)
    passed, failed = different // width, different % width
    passed[-1] = failed[-1] = 0
    return Kinds(passed, failed, which)


def believed_units(
    weights: tuple[float, ...], passed: IntArray, failed: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return the Beta distributions that some evidence in units leads to, float64[K] each.

    Args:
        weights: of the points, from ``fit_rates``; not ().
        passed, failed: in sixteenths of a rollout, int64[K], at most 32 rollouts in all.
    """
    mean, strength = np.empty(passed.shape), np.empty(passed.shape)
    for start in range(0, mean.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        mean[part], strength[part] = _moments(weights, passed[part], failed[part])
    return mean * strength, (1.0 - mean) * strength


def _moments(
    weights: tuple[float, ...], passed: IntArray, failed: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return mean and strength (alpha + beta) of the Beta distribution of each pair of units."""
    share = _likelihood(passed, failed)
    share *= np.array(weights)[:, None]
    whole = _folded(share)
    share *= _RATES[:, None]
    mean = _folded(share) / whole
    share *= _RATES[:, None]
    variance = _folded(share) / whole - mean * mean
    strength = mean * (1.0 - mean) / np.maximum(variance, _LEAST_VARIANCE) - 1.0
    return mean, np.maximum(strength, _LEAST_STRENGTH)


def _held(successes: FloatArray, failures: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the evidence, of at most ``_MOST`` rollouts."""
    total = successes + failures
    factor = np.where(total > _MOST * _ROUNDING, _MOST / np.maximum(total, _MOST), 1.0)
    return successes * factor, failures * factor


def _likelihood(passed: IntArray, failed: IntArray) -> FloatArray:
    """Return the likelihood of each point, float64[points, n]: at least exp(-8 * 33).

    Args:
        passed, failed: evidence of each prompt in units, int64[n].
    """
    # Not by indexing, which would keep the points of a prompt together.
    likelihood = _PASSED.take(passed, axis=1)
    likelihood *= _FAILED.take(failed, axis=1)
    return likelihood


def _units(rollouts: FloatArray) -> IntArray:
    return (rollouts * _UNITS + 0.5).astype(np.int64)


def _folded(numbers: FloatArray) -> FloatArray:
    """Return the sum of the rows: the last are added to the first until one is left.

    np.sum may choose another order.
    """
    rows = len(numbers)
    total = numbers[: rows - rows // 2].copy(order="K")
    total[: rows // 2] += numbers[rows - rows // 2 :]
    rows -= rows // 2
    while rows > 1:
        total[: rows // 2] += total[rows - rows // 2 : rows]
        rows -= rows // 2
    whole: FloatArray = total[0]
    return whole

"""Moments of a Beta distribution, and ratios of gamma functions."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import FloatArray

_STIRLING_FROM = 10

_CHUNK = 4096
"""Numbers worked on at once: what is in between stays in the cache."""


def moment(alpha: FloatArray, beta: FloatArray, x: int, y: int) -> FloatArray:
    """Return E[p^x q^y] of Beta(alpha, beta), by multiplication and division only."""
    total = alpha + beta
    product = np.ones_like(alpha)
    for t in range(x):
        product = product * ((alpha + float(t)) / (total + float(t)))
    for t in range(y):
        product = product * ((beta + float(t)) / (total + float(x + t)))
    return product


def log_rising(x: FloatArray, n: FloatArray) -> FloatArray:
    """Return log(Gamma(x + n) / Gamma(x)): Stirling's series after a shift by 10.

    Args:
        x: float64[.., M], > 0.
        n: float64[M], >= 0.
    """
    arguments = np.stack([x + n, x]).ravel()
    logs = np.empty_like(arguments)
    for start in range(0, logs.size, _CHUNK):
        logs[start : start + _CHUNK] = _log_gamma(arguments[start : start + _CHUNK])
    ends = logs.reshape(2, *x.shape)
    rising: FloatArray = ends[0] - ends[1]
    return rising


def _log_gamma(x: FloatArray) -> FloatArray:
    product = x.copy()
    for t in range(1, _STIRLING_FROM):
        product = product * (x + float(t))
    z = x + float(_STIRLING_FROM)
    z2 = z * z
    series = (1.0 / 12.0 - (1.0 / 360.0 - (1.0 / 1260.0 - 1.0 / (1680.0 * z2)) / z2) / z2) / z
    result: FloatArray = (z - 0.5) * np.log(z) - z + 0.9189385332046727 + series - np.log(product)
    return result

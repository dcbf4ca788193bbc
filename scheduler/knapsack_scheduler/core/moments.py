"""Moments of a Beta distribution, and ratios of gamma functions."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import FloatArray, IntArray

_CHUNK = 4096
"""Numbers worked on at once: what is in between stays in the cache."""


def moment(alpha: FloatArray, beta: FloatArray, x: int, y: int) -> FloatArray:
    """Return E[p^x q^y] of Beta(alpha, beta), by multiplication and division only."""
    total = alpha + beta
    factors = [(alpha, t, t) for t in range(x)] + [(beta, t, x + t) for t in range(y)]
    product = None
    for weight, above, below in factors:
        numerator = weight + float(above) if above else weight
        factor = numerator / (total + float(below) if below else total)
        product = factor if product is None else product * factor
    return np.ones_like(alpha) if product is None else product


class AllAlike:
    """Chances that rollouts come out all alike, under Beta posteriors.

    Args:
        alpha, beta: float64[M], > 0.
    """

    def __init__(self, alpha: FloatArray, beta: FloatArray) -> None:
        self._arguments = np.stack([alpha, beta, alpha + beta])
        self._logs = log_gamma(self._arguments)

    def after(self, rollouts: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return E[p^n] and E[q^n] for n rollouts on each prompt, float64[M] each.

        Args:
            rollouts: n, int64[M], >= 0.
        """
        rising = log_gamma(self._arguments + rollouts) - self._logs
        return np.exp(rising[0] - rising[2]), np.exp(rising[1] - rising[2])


def log_rising(x: FloatArray, n: IntArray | FloatArray) -> FloatArray:
    """Return log(Gamma(x + n) / Gamma(x)).

    Args:
        x: float64[.., M], > 0.
        n: [M], >= 0.
    """
    rising: FloatArray = log_gamma(x + n) - log_gamma(x)
    return rising


def log_gamma(x: FloatArray) -> FloatArray:
    """Return log(Gamma(x)) of numbers above 0: Stirling's series after a shift by 10."""
    flat = x.ravel()
    logs = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK):
        logs[start : start + _CHUNK] = _log_gamma(flat[start : start + _CHUNK])
    return logs.reshape(x.shape)


def _log_gamma(x: FloatArray) -> FloatArray:
    # x (x+9), (x+1) (x+8) .. (x+4) (x+5) are this and 0, 8, 14, 18 and 20 more.
    outer = x * (x + 9.0)
    product = outer.copy()
    for more in (8.0, 14.0, 18.0, 20.0):
        product *= outer + more
    z = x + 10.0
    inverse = 1.0 / z
    square = inverse * inverse
    series = square * (-1.0 / 1680.0)
    series += 1.0 / 1260.0
    for term in (-1.0 / 360.0, 1.0 / 12.0):
        series *= square
        series += term
    series *= inverse
    result: FloatArray = (z - 0.5) * np.log(z)
    result -= z
    result += 0.9189385332046727
    result += series
    result -= np.log(product)
    return result

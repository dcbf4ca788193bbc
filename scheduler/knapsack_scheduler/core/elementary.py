"""Exponential and logarithm from additions, multiplications and divisions alone.

Those of a C library differ in the last digit from machine to machine, and so would what
is decided by them. IEEE 754 fixes the results of the operations used here.
"""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import FloatArray

_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_ATANH_TERMS = 12
_MOST = 700.0

_PARTS = 32
"""Of a power of two: what is left of an exponent is so small that few terms are enough."""

_EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""1 / k!, highest k first: the next one adds less than 4e-18."""


def _roots() -> FloatArray:
    """Return 2^(k / 32) for k = 0 .. 31: square roots are exactly rounded, too."""
    root = np.float64(2.0)
    for _ in range(5):
        root = np.sqrt(root)
    return np.multiply.accumulate(np.concatenate([[1.0], np.full(_PARTS - 1, root)]))


_ROOTS = _roots()


def log(x: FloatArray) -> FloatArray:
    """Return ln x of positive finite numbers, to a few units in the last place."""
    fraction, exponent = np.frexp(x)
    low = fraction < _SQRT_HALF
    fraction = np.where(low, fraction + fraction, fraction)
    exponent = exponent - low
    # ln f = 2 atanh((f - 1) / (f + 1)), and the argument is at most 0.172.
    ratio = (fraction - 1.0) / (fraction + 1.0)
    square = ratio * ratio
    series = np.full_like(ratio, 1.0 / (2 * _ATANH_TERMS + 1))
    for k in reversed(range(_ATANH_TERMS)):
        series *= square
        series += 1.0 / (2 * k + 1)
    result: FloatArray = exponent * _LN2 + 2.0 * ratio * series
    return result


def exp(x: FloatArray) -> FloatArray:
    """Return e to the power of finite numbers, held within -700 and 700."""
    held = np.clip(x, -_MOST, _MOST)
    parts = np.rint(held * (_PARTS / _LN2))
    rest = held - parts * (_LN2 / _PARTS)
    series = np.full_like(rest, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        series *= rest
        series += term
    whole = parts.astype(np.int64)
    return np.ldexp(series * _ROOTS[whole % _PARTS], (whole // _PARTS).astype(np.int32))

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
_EXP_TERMS = 16
_MOST = 700.0


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
        series = series * square + 1.0 / (2 * k + 1)
    result: FloatArray = exponent * _LN2 + 2.0 * ratio * series
    return result


def exp(x: FloatArray) -> FloatArray:
    """Return e to the power of finite numbers, held within -700 and 700."""
    held = np.clip(x, -_MOST, _MOST)
    power = np.rint(held / _LN2)
    rest = held - power * _LN2
    series = np.ones_like(rest)
    for k in reversed(range(1, _EXP_TERMS)):
        series = series * rest / k + 1.0
    return np.ldexp(series, power.astype(np.int32))

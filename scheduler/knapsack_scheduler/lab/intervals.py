"""Means over seeds, with Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of every interval of the lab."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and how sure it is.

    Attributes:
        mean: NaN if a value is.
        half: half of the interval's width at ``LEVEL``; None from fewer than 2 values.
        values: what the mean is of.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is; without one, whether the mean is."""
        return self.mean - (self.half or 0.0) > 0.0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is; without one, whether the mean is."""
        return self.mean + (self.half or 0.0) < 0.0


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its t-based interval.

    Args:
        values: one or more; paired differences make a paired interval.
    """
    count = len(values)
    mean = math.fsum(values) / count
    half = None
    if count > 1 and math.isfinite(mean):
        variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
        half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Interval(mean, half, tuple(values))


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return t with P(|T| <= t) = level, for T of Student's distribution.

    By bisection of the finite sums for whole degrees of freedom, Abramowitz and Stegun
    26.7.3 and 26.7.4.

    Args:
        freedom: degrees of freedom, 1 or more.
        level: in (0, 1).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """Return P(|T| <= sqrt(freedom) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

"""Student's intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from knapsack_scheduler.lab.intervals import interval, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 400])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_quantiles_are_those_of_the_density(freedom: int, level: float) -> None:
    """The density of Student's distribution has that much mass up to the quantile."""
    t = np.linspace(0.0, t_quantile(freedom, level), 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density = scale / math.sqrt(freedom * math.pi) * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, t) == pytest.approx(level, abs=2e-6)


def test_intervals_of_few_values() -> None:
    """Half the width is the quantile times the standard error; one value has none."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))
    assert not found.above_zero
    assert interval([5.0, 5.1]).above_zero
    assert interval([-5.0, -5.1]).below_zero
    one = interval([1.0])
    assert one.half is None
    assert one.above_zero


def test_what_has_no_meaning_is_neither_above_nor_below() -> None:
    """A difference from nothing stays unknown."""
    found = interval([math.nan, 1.0])
    assert found.half is None
    assert not found.above_zero
    assert not found.below_zero

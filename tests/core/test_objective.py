"""Gains and values against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.objective import (
    EFFECTIVE,
    PAPER,
    VARIANCE,
    conditional_marginals,
    expected_values,
    point_marginals,
    posterior_marginals,
)
from knapsack_scheduler.core.problem import Begun, Posterior

from oracles import EXPONENTS, beta_moment, posterior_value, value

OBJECTIVES = {objective.name: objective for objective in (PAPER, EFFECTIVE, VARIANCE)}
POSITIVE = st.floats(1e-3, 1e3)
STEPS = np.arange(60)


def gains(marginals: object, count: int = 60) -> np.ndarray:
    """Return the first gains of the only prompt."""
    return np.array(
        [float(marginals.advanced(np.array([n])).first[0]) for n in range(count)]  # type: ignore[attr-defined]
    )


@given(st.floats(0, 1), st.lists(st.integers(0, 50), min_size=1, max_size=6), POSITIVE)
def test_sums_of_gains_are_those_of_the_gains(p: float, steps: list[int], a: float) -> None:
    """Of every prompt as many as asked, for known rates and for posteriors."""
    count = len(steps)
    rates = np.linspace(p / 2, p, count)
    for marginals in (
        point_marginals(PAPER, rates),
        posterior_marginals(PAPER, rates * a + 0.01, a - rates * a + 0.01),
    ):
        expected = np.zeros(count)
        for t in range(50):
            now = marginals.advanced(np.full(count, t)).first
            expected += np.where(np.array(steps) > t, now, 0.0)
        assert marginals.summed(np.array(steps)) == pytest.approx(expected, rel=1e-12, abs=1e-300)


@given(st.floats(0, 1), st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=150, deadline=None)
def test_point_gains_never_rise_and_add_up_to_the_value(p: float, name: str) -> None:
    """In floating point, for any success rate, subnormal ones included."""
    series = gains(point_marginals(OBJECTIVES[name], np.array([p])))

    assert (np.diff(series) <= 0).all()
    assert series.sum() == pytest.approx(value(61, p, name), rel=1e-12, abs=1e-300)


@given(POSITIVE, POSITIVE, st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=150, deadline=None)
def test_posterior_gains_never_rise_and_add_up_to_the_value(a: float, b: float, name: str) -> None:
    """In floating point, for any Beta posterior."""
    series = gains(posterior_marginals(OBJECTIVES[name], np.array([a]), np.array([b])))

    assert (np.diff(series) <= 0).all()
    assert series.sum() == pytest.approx(posterior_value(61, a, b, name), rel=1e-11)


@given(POSITIVE, POSITIVE, st.integers(2, 500), st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=150, deadline=None)
def test_closed_form_is_the_exact_expectation(a: float, b: float, n: int, name: str) -> None:
    """The value reported agrees with rational arithmetic."""
    posterior = Posterior(np.array([a]), np.array([b]))
    closed = expected_values(OBJECTIVES[name], posterior, Begun.nothing(1), np.array([n]))

    scale = float(beta_moment(Fraction(a), Fraction(b), *EXPONENTS[name]))
    assert closed[0] == pytest.approx(posterior_value(n, a, b, name), rel=1e-9, abs=1e-9 * scale)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("outstanding", [0, 3])
def test_gains_of_begun_groups_are_conditional_expectations(name: str, outstanding: int) -> None:
    """Failed so far: first success; passed so far: first failure; mixed: nothing; new: as new."""
    i, j = EXPONENTS[name]
    alpha = np.array([0.7, 4.7, 1.5, 0.5])
    beta = np.array([4.4, 0.4, 3.5, 0.5])
    begun = Begun(
        delivered=np.array([4, 4, 4, 0]),
        successes=np.array([0, 4, 1, 0]),
        mixed=np.array([False, False, True, False]),
        outstanding=np.full(4, outstanding),
    )
    marginals = conditional_marginals(OBJECTIVES[name], Posterior(alpha, beta), begun)

    for k in range(1, 20):
        first = marginals.advanced(np.full(4, k - 1)).first
        place = k + outstanding
        a, b = (Fraction(float(x[0])) for x in (alpha, beta))
        assert first[0] == pytest.approx(float(beta_moment(a, b, i + 1, j + place - 1)), rel=1e-13)
        a, b = (Fraction(float(x[1])) for x in (alpha, beta))
        assert first[1] == pytest.approx(float(beta_moment(a, b, i + place - 1, j + 1)), rel=1e-13)
        assert first[2] == 0.0
        # A new group's first rollout gains nothing: its gains begin with the second.
        size = k + max(outstanding - 1, 0)
        new = posterior_value(size + 1, 0.5, 0.5, name) - posterior_value(size, 0.5, 0.5, name)
        assert first[3] == pytest.approx(new, rel=1e-9)


def test_values_of_begun_groups_are_what_their_gains_add_up_to() -> None:
    """The value of a begun group is that of what it has plus the gains of what it gets."""
    alpha, beta = np.array([0.7, 4.7, 1.5]), np.array([4.4, 0.4, 3.5])
    posterior = Posterior(alpha, beta)
    begun = Begun(
        delivered=np.array([4, 4, 4]),
        successes=np.array([0, 4, 2]),
        mixed=np.array([False, False, True]),
        outstanding=np.zeros(3, np.int64),
    )
    for name, objective in OBJECTIVES.items():
        marginals = conditional_marginals(objective, posterior, begun)
        before = expected_values(objective, posterior, begun, np.zeros(3, np.int64))
        after = expected_values(objective, posterior, begun, np.full(3, 9))
        gained = sum(marginals.advanced(np.full(3, k)).first for k in range(9))
        assert after - before == pytest.approx(gained, rel=1e-11, abs=1e-14), name

"""The spread of a run's success rates: found again, and what evidence says against it."""

from __future__ import annotations

from fractions import Fraction
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.aging import Discounts
from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.posterior import Prior, newest_prior
from knapsack_scheduler.core.rates import believed, fit_rates

ODDS = np.linspace(-8.0, 8.0, 25)
PASSED = [1.0 / (1.0 + exp(-x)) for x in ODDS]
FAILED = [1.0 / (1.0 + exp(x)) for x in ODDS]


def drawn(rates: np.ndarray, rollouts: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return successes and failures of prompts with these success rates."""
    successes = np.random.default_rng(seed).binomial(rollouts, rates).astype(float)
    return successes, rollouts - successes


def alone(
    weights: tuple[float, ...], successes: float, failures: float
) -> tuple[np.float64, np.float64]:
    """Return alpha and beta of one prompt."""
    alpha, beta = believed(weights, np.array([float(successes)]), np.array([float(failures)]))
    return alpha[0], beta[0]


def of_fractions(weights: tuple[float, ...], successes: int, failures: int) -> tuple[float, float]:
    """Return mean and variance over the points that the evidence leaves, exactly."""
    points = [Fraction(p) for p in PASSED]
    joint = [
        Fraction(w) * p**successes * Fraction(q) ** failures
        for w, p, q in zip(weights, points, FAILED, strict=True)
    ]
    mean = sum(j * p for j, p in zip(joint, points, strict=True)) / sum(joint)
    variance = sum(j * (p - mean) ** 2 for j, p in zip(joint, points, strict=True)) / sum(joint)
    return float(mean), float(variance)


@pytest.mark.parametrize("successes", [0, 1, 3, 8])
@pytest.mark.parametrize("failures", [0, 1, 5, 24])
def test_mean_and_variance_are_those_of_the_points(successes: int, failures: int) -> None:
    """Against fractions, in a run of prompts that never, always and sometimes succeed."""
    weights = fit_rates(*drawn(np.repeat([0.0, 1.0, 0.2, 0.6], 25), 8))
    alpha, beta = alone(weights, successes, failures)
    mean, variance = of_fractions(weights, successes, failures)
    total = alpha + beta
    assert alpha / total == pytest.approx(mean, rel=1e-11)
    assert alpha * beta / (total * total * (total + 1.0)) == pytest.approx(variance, rel=1e-9)


def test_each_round_of_the_fit_makes_the_evidence_more_likely() -> None:
    """More so than the weights it starts from, and than weights moved from there at random."""
    successes, failures = drawn(np.repeat([0.0, 0.05, 0.4], 60), 8)
    powers = np.array(PASSED) ** successes[:, None] * np.array(FAILED) ** failures[:, None]

    def likelihood(weights: np.ndarray) -> float:
        return float(np.log(powers @ weights).sum())

    fitted = np.array(fit_rates(successes, failures))
    start = np.sqrt(np.array(PASSED) * FAILED)
    rng = np.random.default_rng(1)
    others = [start, *(start * rng.gamma(2.0, 0.5, start.size) for _ in range(50))]
    assert all(likelihood(fitted) > likelihood(other / other.sum()) for other in others)
    assert fitted.sum() == pytest.approx(1.0)


def test_prompts_that_never_and_always_succeed_are_found_again() -> None:
    """Beside a narrow peak between them, which no Beta distribution has at once."""
    rates = np.concatenate([np.zeros(100), np.ones(50), np.full(350, 0.3)])
    weights = np.array(fit_rates(*drawn(rates, 24)))
    rate = np.array(PASSED)
    assert weights[rate < 0.05].sum() == pytest.approx(0.2, abs=0.02)
    assert weights[rate > 0.9].sum() == pytest.approx(0.1, abs=0.02)
    assert weights[(rate > 0.15) & (rate < 0.5)].sum() == pytest.approx(0.7, abs=0.04)


def test_what_a_failure_means_depends_on_the_run() -> None:
    """Six of six failed: hopeless where most such prompts are, bad luck where none is."""
    some_never = fit_rates(*drawn(np.concatenate([np.zeros(250), np.full(250, 0.4)]), 8))
    alike = fit_rates(*drawn(np.full(500, 0.2), 8))
    means = [a / (a + b) for a, b in (alone(weights, 0, 6) for weights in (some_never, alike))]
    assert means[0] < 0.05
    assert 0.1 < means[1] < 0.2
    alpha, beta = alone(some_never, 1, 5)
    assert alpha / (alpha + beta) > 0.2


@pytest.mark.parametrize("rate", [0.02, 0.37, 0.5, 0.9])
def test_much_evidence_is_believed(rate: float) -> None:
    """The points do not show: mean and weight are those of ten thousand rollouts."""
    weights = fit_rates(*drawn(np.random.default_rng(2).random(500), 8))
    alpha, beta = alone(weights, 10_000 * rate, 10_000 * (1 - rate))
    assert alpha / (alpha + beta) == pytest.approx(rate, abs=0.002)
    assert alpha + beta == pytest.approx(10_000, rel=0.01)


@pytest.mark.parametrize("successes", [0.0, 8.0])
def test_the_prior_never_gives_up(successes: float) -> None:
    """A run that always fails, or always passes, leaves a prompt some chance of the other."""
    weights = fit_rates(np.full(512, successes), np.full(512, 8.0 - successes))
    alpha, beta = alone(weights, 0, 0)
    assert 0.003 < min(alpha, beta) / (alpha + beta) < 0.03


EVIDENCE = st.lists(
    st.tuples(st.floats(0.0, 200.0), st.floats(0.0, 200.0)), min_size=1, max_size=70
)


@given(EVIDENCE)
@settings(max_examples=100, deadline=None)
def test_a_prompt_is_believed_the_same_in_any_company(evidence: list[tuple[float, float]]) -> None:
    """Bit by bit, and whatever the evidence, alpha and beta are finite and above 0."""
    successes, failures = np.array(evidence).T.copy()
    weights = fit_rates(successes, failures)
    alpha, beta = believed(weights, successes, failures)
    assert np.isfinite(alpha).all()
    assert np.isfinite(beta).all()
    assert (np.minimum(alpha, beta) > 0.0).all()
    for k, (passed, failed) in enumerate(evidence):
        assert alone(weights, passed, failed) == (alpha[k], beta[k])


def test_more_prompts_than_are_looked_at_at_once() -> None:
    """Every prompt of a great batch is as it is alone."""
    weights = fit_rates(*drawn(np.random.default_rng(5).random(100), 8))
    successes, failures = drawn(np.random.default_rng(6).random(70_000), 8)
    alpha, beta = believed(weights, successes, failures)
    for k in (0, 32_767, 32_768, 69_999):
        assert alone(weights, successes[k], failures[k]) == (alpha[k], beta[k])


def test_before_there_is_data_the_prior_is_one_half_one_half() -> None:
    """And the first prompts move it but little."""
    discounts = Discounts(0.5, 1.0, 32.0)
    nobody = np.zeros(0, np.int64)
    assert newest_prior(Visits(), nobody, 0, discounts) == Prior(0.5, 0.5, ())
    visits = Visits(1)
    merge_visits(visits, np.array([0]), 1, 0, np.array([4]), np.array([2]))
    prior = newest_prior(visits, np.array([0]), 0, discounts)
    assert prior.alpha == pytest.approx(0.5, abs=0.15)
    assert prior.beta == pytest.approx(prior.alpha, rel=1e-9)


def test_the_prior_is_fitted_to_discounted_evidence() -> None:
    """An older visit counts half, as it does for the prompt itself."""
    visits = Visits(2)
    for step, successes in ((1, 4), (2, 0)):
        counts = np.full(2, 4), np.full(2, successes)
        merge_visits(visits, np.array([0, 1]), step, 0, *counts)
    prior = newest_prior(visits, np.array([0, 1]), 0, Discounts(0.5, 1.0, 32.0))
    assert prior.weights == fit_rates(np.full(2, 2.0), np.full(2, 4.0))

"""Posteriors age as they should, and the prior is that of the run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.drift import Drift
from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.posterior import (
    Discounts,
    Prior,
    PriorStatistics,
    fit_prior,
    posterior,
)
from knapsack_scheduler.core.problem import Posterior
from knapsack_scheduler.core.rewardlevels import RewardLevels, relevel


def visited(*outcomes: tuple[int, int, int, int]) -> Visits:
    """Return windows whose row 0 has these (step, version, rollouts, successes)."""
    visits = Visits(1)
    for step, version, rollouts, successes in outcomes:
        merge_visits(
            visits, np.array([0]), step, version, np.array([rollouts]), np.array([successes])
        )
    return visits


def posterior_of(visits: Visits, newest: int, discounts: Discounts) -> tuple[float, float]:
    """Return alpha and beta of row 0 under Beta(1/2, 1/2)."""
    found = believed(visits, np.array([0]), newest, discounts, Prior(0.5, 0.5))
    return float(found.alpha[0]), float(found.beta[0])


def believed(
    visits: Visits,
    rows: np.ndarray,
    newest: int,
    discounts: Discounts,
    prior: Prior,
    step: int | None = None,
    drift: Drift | None = None,
) -> Posterior:
    """Return the posteriors of rows whose rewards are successes and failures."""
    levels = RewardLevels.none_yet(0.5, True)
    return posterior(visits, rows, step, newest, discounts, prior, levels, drift or Drift())


def test_counts_of_one_visit_are_added_to_the_prior() -> None:
    """A fresh visit counts in full."""
    assert posterior_of(visited((3, 0, 8, 2)), 0, Discounts(0.5, 1.0, 32.0)) == (2.5, 6.5)


def test_older_visits_count_half_each() -> None:
    """Three steps: weights 1, 1/2, 1/4; parts of one step age together."""
    visits = visited((1, 0, 4, 4), (5, 0, 4, 2), (9, 0, 2, 0), (9, 1, 2, 0))

    assert posterior_of(visits, 1, Discounts(0.5, 1.0, 32.0)) == (0.5 + 1.0 + 1.0, 0.5 + 4.0 + 1.0)


def test_distance_in_policy_versions_ages_too() -> None:
    """Evidence of 3 versions ago under a discount of 0.9 weighs 0.729."""
    alpha, beta = posterior_of(visited((1, 7, 10, 10)), 10, Discounts(0.5, 0.9, 32.0))

    assert alpha == pytest.approx(0.5 + 7.29)
    assert beta == 0.5


def test_versions_from_the_future_count_in_full() -> None:
    """A late answer about the newest version never weighs more than 1."""
    assert posterior_of(visited((1, 12, 2, 1)), 10, Discounts(0.5, 0.9, 32.0)) == (1.5, 1.5)


def test_evidence_is_capped() -> None:
    """64 rollouts weigh 32, at the same success rate."""
    assert posterior_of(visited((1, 0, 64, 16)), 0, Discounts(0.5, 1.0, 32.0)) == (8.5, 24.5)


def test_unseen_prompts_have_the_prior() -> None:
    """Row -1 is a prompt that nobody has visited, at any distance."""
    found = believed(
        visited((1, 0, 4, 4)), np.array([-1, 0]), 9, Discounts(0.5, 0.9, 32.0), Prior(0.3, 0.7)
    )

    assert (found.alpha[0], found.beta[0]) == (0.3, 0.7)
    assert found.alpha[1] > 1.0


def test_what_the_step_itself_brought_counts_in_full_beside_the_rest() -> None:
    """It neither ages the others nor is it capped or moved; they are, as if it were not there."""
    visits = visited((1, 0, 4, 0), (5, 0, 8, 2), (9, 0, 40, 0), (9, 1, 2, 2))
    discounts, prior = Discounts(0.5, 1.0, 32.0), Prior(0.5, 0.5)
    before = believed(visited((1, 0, 4, 0), (5, 0, 8, 2)), np.array([0]), 1, discounts, prior, 9)
    assert (before.alpha[0], before.beta[0]) == (2.5, 8.5)
    found = believed(visits, np.array([0]), 1, discounts, prior, 9)
    assert (found.alpha[0], found.beta[0]) == (2.5 + 2.0, 8.5 + 40.0)
    # A shift of ln 2 doubles the odds: 5/11 / (1 - ..) from 2.5 : 8.5 to 5 : 8.5.
    moved = believed(visits, np.array([0]), 1, discounts, prior, 9, Drift(np.log(2.0), 1.0))
    assert moved.alpha[0] == pytest.approx(11.0 * 5.0 / 13.5 + 2.0)
    assert moved.beta[0] == pytest.approx(11.0 * 8.5 / 13.5 + 40.0)


def test_drift_moves_levels_with_their_class() -> None:
    """Levels keep their shares within successes and within failures; unseen rows stay."""
    visits = Visits(1)
    rewards = np.array([0.0, 0.1, 0.1, 1.0, 2.0], np.float32)
    levels = RewardLevels.none_yet(0.5, True).with_rewards(rewards)
    relevel(visits, RewardLevels.none_yet(0.5, True), levels)
    counted = np.array([[1, 2, 1, 1]])
    merge_visits(visits, np.array([0]), 3, 0, np.array([5]), np.array([2]), counted)
    discounts, prior = Discounts(0.5, 1.0, 32.0), Prior(0.5, 1.5)
    drift = Drift(0.7, 0.9)
    plain = posterior(visits, np.array([0, -1]), 4, 0, discounts, prior, levels, Drift())
    moved = posterior(visits, np.array([0, -1]), 4, 0, discounts, prior, levels, drift)
    alpha, beta = drift.moved(plain.alpha[:1], plain.beta[:1])
    assert moved.alpha[0] == pytest.approx(alpha[0])
    assert moved.beta[0] == pytest.approx(beta[0])
    assert plain.levels is not None
    assert moved.levels is not None
    shares = [p.levels.concentration[0, :2] / p.beta[0] for p in (plain, moved) if p.levels]
    assert shares[0] == pytest.approx(shares[1])
    assert moved.levels.concentration[1].tolist() == plain.levels.concentration[1].tolist()


COUNTS = st.tuples(st.integers(0, 300), st.integers(0, 300)).map(
    lambda pair: (max(pair), min(pair))
)


@given(st.lists(st.tuples(COUNTS, COUNTS), max_size=30))
@settings(max_examples=100, deadline=None)
def test_sums_kept_up_to_date_are_those_of_a_fresh_pass(
    moves: list[tuple[tuple[int, int], tuple[int, int]]],
) -> None:
    """Moving every prompt from one visit to another leaves no trace of the first."""
    old = np.array([m[0] for m in moves], np.int64).reshape(-1, 2)
    new = np.array([m[1] for m in moves], np.int64).reshape(-1, 2)
    zero = np.zeros(len(moves), np.int64)
    empty = PriorStatistics()

    kept = empty.moved(zero, zero, old[:, 0], old[:, 1]).moved(
        old[:, 0], old[:, 1], new[:, 0], new[:, 1]
    )

    assert kept == empty.moved(zero, zero, new[:, 0], new[:, 1])


def test_before_there_is_data_the_prior_is_one_half_one_half() -> None:
    """An empty run assumes Beta(1/2, 1/2)."""
    assert fit_prior(PriorStatistics()) == Prior(0.5, 0.5)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.4), (0.3, 1.2), (1.5, 0.5), (2.0, 2.0)])
def test_prior_of_many_prompts_is_theirs(alpha: float, beta: float) -> None:
    """5,000 prompts with groups of unequal sizes: mean and strength are recovered."""
    rng = np.random.default_rng(1)
    rollouts = rng.integers(2, 30, 5000)
    successes = rng.binomial(rollouts, rng.beta(alpha, beta, 5000))
    zero = np.zeros(5000, np.int64)

    prior = fit_prior(PriorStatistics().moved(zero, zero, rollouts, successes))

    assert prior.alpha / (prior.alpha + prior.beta) == pytest.approx(
        alpha / (alpha + beta), abs=0.02
    )
    assert prior.alpha + prior.beta == pytest.approx(min(alpha + beta, 4.0), rel=0.15)


@pytest.mark.parametrize("successes", [0, 8])
def test_prior_never_gives_up(successes: int) -> None:
    """A run that always fails, or always passes, keeps a proper prior of bounded strength."""
    zero = np.zeros(10_000, np.int64)
    statistics = PriorStatistics().moved(zero, zero, np.full(10_000, 8), np.full(10_000, successes))

    prior = fit_prior(statistics)

    assert min(prior.alpha, prior.beta) >= 0.02 * 0.3
    assert 0.3 <= prior.alpha + prior.beta <= 4.0

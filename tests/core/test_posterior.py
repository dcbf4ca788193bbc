"""Posteriors age as they should, and levels keep their shares."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_scheduler.core.aging import Discounts
from knapsack_scheduler.core.drift import Drift
from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.posterior import Prior, posterior_apart
from knapsack_scheduler.core.problem import Posterior
from knapsack_scheduler.core.rates import believed as core_believed
from knapsack_scheduler.core.rates import fit_rates
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
    return posterior_apart(visits, rows, step, newest, discounts, prior, levels, drift or Drift())


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


def test_evidence_is_weighed_against_the_spread_of_the_run() -> None:
    """Older visits pick from it, discounted; what the step itself brought is added."""
    weights = fit_rates(np.repeat([0.0, 3.0], 40), np.repeat([6.0, 3.0], 40))
    alpha, beta = core_believed(weights, np.array([0.0, 1.0]), np.array([0.0, 5.0]))
    prior = Prior(float(alpha[0]), float(beta[0]), weights)
    visits = visited((1, 0, 4, 0), (5, 0, 4, 1), (9, 0, 7, 3))
    rows = np.array([-1, 0])
    found = believed(visits, rows, 0, Discounts(0.5, 1.0, 32.0), prior, 9)
    assert (found.alpha[0], found.beta[0]) == (alpha[0], beta[0])
    assert (found.alpha[1], found.beta[1]) == (alpha[1] + 3.0, beta[1] + 4.0)


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


@pytest.mark.parametrize("weights", [(), fit_rates(np.array([1.0, 3.0]), np.array([3.0, 1.0]))])
def test_drift_moves_levels_with_their_class(weights: tuple[float, ...]) -> None:
    """Levels keep their shares within successes and within failures; unseen rows stay."""
    visits = Visits(1)
    rewards = np.array([0.0, 0.1, 0.1, 1.0, 2.0], np.float32)
    levels = RewardLevels.none_yet(0.5, True).with_rewards(rewards)
    relevel(visits, RewardLevels.none_yet(0.5, True), levels)
    counted = np.array([[1, 2, 1, 1]])
    merge_visits(visits, np.array([0]), 3, 0, np.array([5]), np.array([2]), counted)
    discounts, prior = Discounts(0.5, 1.0, 32.0), Prior(0.5, 1.5, weights)
    drift = Drift(0.7, 0.9)
    plain = posterior_apart(visits, np.array([0, -1]), 4, 0, discounts, prior, levels, Drift())
    moved = posterior_apart(visits, np.array([0, -1]), 4, 0, discounts, prior, levels, drift)
    alpha, beta = drift.moved(plain.alpha[:1], plain.beta[:1])
    assert moved.alpha[0] == pytest.approx(alpha[0])
    assert moved.beta[0] == pytest.approx(beta[0])
    assert plain.levels is not None
    assert moved.levels is not None
    shares = [p.levels.concentration[0, :2] / p.beta[0] for p in (plain, moved) if p.levels]
    assert shares[0] == pytest.approx(shares[1])
    assert moved.levels.concentration[1].tolist() == plain.levels.concentration[1].tolist()


def test_a_row_that_nothing_was_seen_of_is_as_one_never_seen() -> None:
    """To the bit with levels too: what was only allocated wins no tie, and loses none."""
    draw = np.random.default_rng(0)
    discounts = Discounts(0.5, 1.0, 32.0)
    for _ in range(20):
        visits = Visits(2)
        rewards = draw.choice([0.0, 0.25, 0.5, 0.75, 1.0], 40).astype(np.float32)
        levels = RewardLevels.none_yet(0.5, True).with_rewards(rewards)
        relevel(visits, RewardLevels.none_yet(0.5, True), levels)
        prior = Prior(*draw.uniform(0.1, 3.0, 2).tolist())
        both = np.array([1, -1])
        found = posterior_apart(visits, both, 4, 0, discounts, prior, levels, Drift())
        assert found.levels is not None
        for column in (found.alpha, found.beta, found.levels.concentration):
            assert column[0].tobytes() == column[1].tobytes()

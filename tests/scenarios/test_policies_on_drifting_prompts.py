"""Whole runs in simulation: what the policies win when success rates drift.

A population of prompts from hopeless to solved whose logits wander upwards while the run
goes on; the policies see nothing but rewards. Value is the realised objective: the sum
of p (1-p)^2 over groups whose rewards differ, with the true p that the policies never
see. Seeds are fixed and draws are common to all policies.
"""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.policy import plan_allocation, plan_extension
from knapsack_scheduler.core.posterior import (
    Discounts,
    PriorStatistics,
    beta_posterior,
    fit_prior,
)
from knapsack_scheduler.core.problem import (
    Beliefs,
    Bounds,
    Budget,
    Posterior,
    WaveOutcomes,
    tie_keys,
)

PROMPTS, BATCH, EPOCHS, MEAN = 1536, 128, 5, 8
DISCOUNTS = Discounts(0.5, 0.999, 32.0)


class Run:
    """One policy's statistics, kept as the scheduler keeps them."""

    def __init__(self) -> None:
        self.visits = Visits(PROMPTS)
        self.statistics = PriorStatistics()
        self.keys = tie_keys([f"prompt-{k}" for k in range(PROMPTS)])

    def beliefs(self, rows: np.ndarray, step: int) -> Beliefs:
        """Return the posteriors of a batch."""
        prior = fit_prior(self.statistics)
        alpha, beta = beta_posterior(self.visits, rows, step, DISCOUNTS, prior)
        unseen = self.visits.rollouts[rows, 0] == 0
        return Beliefs(Posterior(alpha, beta), self.keys[rows], unseen, np.zeros(rows.size))

    def learn(self, rows: np.ndarray, step: int, n: np.ndarray, k: np.ndarray) -> None:
        """Record the outcomes of a wave."""
        old = self.visits.rollouts[rows, 0].copy(), self.visits.successes[rows, 0].copy()
        merge_visits(self.visits, rows, step, step, n, k)
        self.statistics = self.statistics.moved(
            *old, self.visits.rollouts[rows, 0], self.visits.successes[rows, 0]
        )


def simulate(policy: str, wave_fraction: float, seed: int) -> tuple[float, float]:
    """Return the mean realised value per step after the first epoch, and in the first."""
    rng = np.random.default_rng(seed)
    logits = rng.choice([-5.0, -0.5, 3.0], PROMPTS, p=[0.3, 0.4, 0.3])
    logits = logits + rng.normal(0, 1.0, PROMPTS)
    run, values = Run(), []
    bounds = Bounds(np.full(BATCH, 2), np.full(BATCH, 128))
    budget = Budget(BATCH * MEAN, 0, wave_fraction)
    step = 0
    for _ in range(EPOCHS):
        for rows in rng.permutation(PROMPTS).reshape(-1, BATCH):
            p = 1 / (1 + np.exp(-logits[rows]))
            draws = rng.random((BATCH, 256)) < p[:, None]
            plan = plan_allocation(policy, "paper", run.beliefs(rows, step), bounds, budget)
            n = plan.num_rollouts
            k = (draws & (np.arange(256) < n[:, None])).sum(axis=1)
            run.learn(rows, step, n, k)
            if plan.remaining:
                outcomes = WaveOutcomes(n, n, k, (k > 0) & (k < n))
                rest = plan_extension(
                    policy,
                    "paper",
                    run.beliefs(rows, step),
                    bounds,
                    Budget(BATCH * MEAN),
                    outcomes,
                    keep_outstanding=False,
                )
                whole = n + rest.num_rollouts
                all_k = (draws & (np.arange(256) < whole[:, None])).sum(axis=1)
                run.learn(rows, step, rest.num_rollouts, all_k - k)
                n, k = whole, all_k
            assert n.sum() == BATCH * MEAN
            mixed = (k > 0) & (k < n)
            values.append(float((p * (1 - p) ** 2)[mixed].sum()))
            step += 1
        logits = logits + rng.normal(0.25, 0.35, PROMPTS)
    first = PROMPTS // BATCH
    return float(np.mean(values[first:])), float(np.mean(values[:first]))


@pytest.fixture(scope="module")
def results() -> dict[str, np.ndarray]:
    """Run every policy on three seeds."""
    arms = {
        "uniform": ("uniform", 0.0),
        "posterior": ("posterior", 0.0),
        "waves": ("posterior", 0.5),
    }
    return {
        name: np.array([simulate(policy, fraction, seed) for seed in range(3)])
        for name, (policy, fraction) in arms.items()
    }


def test_posterior_wins_value_from_history(results: dict[str, np.ndarray]) -> None:
    """After the first epoch the posterior is above uniform on every seed."""
    assert (results["posterior"][:, 0] > results["uniform"][:, 0]).all()


def test_waves_win_more(results: dict[str, np.ndarray]) -> None:
    """Two waves are above the posterior alone on every seed."""
    assert (results["waves"][:, 0] > results["posterior"][:, 0]).all()


def test_waves_win_before_anything_is_known(results: dict[str, np.ndarray]) -> None:
    """In the first epoch only waves can know more than uniform."""
    assert (results["waves"][:, 1] > results["uniform"][:, 1]).all()
    assert results["posterior"][:, 1] == pytest.approx(results["uniform"][:, 1], rel=0.03)

"""Large batches: what is worked out once for prompts that are alike is what each would get."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from knapsack_scheduler.core import policy
from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.core.policy import plan_allocation
from knapsack_scheduler.core.problem import Beliefs, Bounds, Budget, Posterior
from knapsack_scheduler.core.rates import believed, fit_rates

COUNT = 3000


def batch(seed: int, kinds: int = 40) -> tuple[Beliefs, Bounds]:
    """Return a batch of few different posteriors, bounds that differ, and some equal keys."""
    rng = np.random.default_rng(seed)
    of = rng.integers(0, kinds, COUNT)
    alpha, beta = rng.random((2, kinds)) * 9 + 0.01
    beliefs = Beliefs(
        Posterior(alpha[of], beta[of]),
        rng.integers(0, COUNT, COUNT).astype(np.uint64),
        np.zeros(COUNT, bool),
        np.zeros(COUNT),
    )
    minimum = rng.integers(0, 3, COUNT)
    return beliefs, Bounds(minimum, minimum + rng.integers(0, 3, COUNT) * 20)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rule", ["posterior", "uniform"])
def test_a_batch_by_its_states_is_the_batch_prompt_by_prompt(
    rule: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, chances and reasons are the same to the last bit, whatever is maximised."""
    for seed, budget in enumerate((Budget(8 * COUNT, allow_partial=True), Budget(2 * COUNT + 1))):
        beliefs, bounds = batch(seed)
        by_state = plan_allocation(rule, objective, beliefs, bounds, budget)
        with monkeypatch.context() as patch:
            patch.setattr(policy, "find_states", lambda _columns: None)
            one_by_one = plan_allocation(rule, objective, beliefs, bounds, budget)
        assert by_state.num_rollouts.tolist() == one_by_one.num_rollouts.tolist()
        assert by_state.chances.tolist() == one_by_one.chances.tolist()
        assert astuple(by_state.reasons) == astuple(one_by_one.reasons)


@pytest.mark.parametrize("kinds", [40, 1500, 2900])
@pytest.mark.parametrize("of_all", [True, False])
def test_kinds_that_are_known_change_nothing(kinds: int, of_all: bool) -> None:
    """Whether or not it is known who is alike, also where two kinds are, and some are unused."""
    beliefs, bounds = batch(5, kinds)
    if of_all:
        bounds = Bounds(np.full(COUNT, 2), np.full(COUNT, 64))
    both = np.stack([beliefs.posterior.alpha, beliefs.posterior.beta])
    _, numbers = np.unique(both, axis=1, return_inverse=True)
    numbers = 3 * numbers.reshape(-1) + np.arange(COUNT) % 2
    known = replace(beliefs, posterior=replace(beliefs.posterior, kinds=numbers))
    budget = Budget(8 * COUNT + 1, allow_partial=True)
    a, b = (
        plan_allocation("posterior", "paper", each, bounds, budget) for each in (known, beliefs)
    )
    assert a.num_rollouts.tolist() == b.num_rollouts.tolist()
    assert a.chances.tolist() == b.chances.tolist()
    assert astuple(a.reasons) == astuple(b.reasons)


def test_a_large_batch_is_believed_what_its_parts_are() -> None:
    """Evidence that is the same in sixteenths of a rollout, and more than the histogram meets."""
    rng = np.random.default_rng(3)
    successes, failures = np.rint(rng.random((2, 5000)) * 60) / rng.choice([1.0, 7.0], 5000)
    weights = fit_rates(successes[:500], failures[:500])
    whole = believed(weights, successes, failures)
    for start in range(0, 5000, 500):
        part = slice(start, start + 500)
        some = believed(weights, successes[part], failures[part])
        assert [each.tolist() for each in some] == [each[part].tolist() for each in whole]

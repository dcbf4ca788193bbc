"""What a budget is expected to bring, beside what equal groups would."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_scheduler.core import outlook as module
from knapsack_scheduler.core.outlook import outlook
from knapsack_scheduler.core.policy import begun_groups, plan_allocation, plan_extension
from knapsack_scheduler.core.problem import Beliefs, Bounds, Budget, Posterior, WaveOutcomes

# Beta(1, 1): p is uniform, so E[p^n + q^n] = 2 / (n + 1).
FLAT = 1.0


def beliefs(count: int, sure: int = 0) -> Beliefs:
    """Return flat beliefs, but for the first prompts, which are sure to succeed."""
    alpha, beta = np.full(count, FLAT), np.full(count, FLAT)
    alpha[:sure], beta[:sure] = 1e9, 1e-9
    keys = np.arange(count, dtype=np.uint64)
    return Beliefs(Posterior(alpha, beta), keys, np.zeros(count, bool), np.zeros(count))


def bounds(count: int) -> Bounds:
    """Return 2 to 128 for every prompt."""
    return Bounds(np.full(count, 2), np.full(count, 128))


def test_uniform_groups_by_hand() -> None:
    """Two sure prompts and two open ones share 16 rollouts: 4 each, or 2 and 6."""
    believed, limits = beliefs(4, sure=2), bounds(4)
    decision = plan_allocation("posterior", "paper", believed, limits, Budget(16))
    found = outlook("paper", believed, limits, np.zeros(4, np.int64), decision)
    assert found is not None
    assert decision.num_rollouts.tolist() == [2, 2, 6, 6]
    assert (found.groups, found.rollouts) == (4, 16)
    assert found.uniform_effective_groups == pytest.approx(2 * (1 - 2 / 5), abs=1e-6)
    assert found.uniform_effective_rollouts == pytest.approx(8 * (1 - 2 / 5), abs=1e-6)
    assert found.effective_groups == pytest.approx(2 * (1 - 2 / 7), abs=1e-6)
    assert found.effective_rollouts == pytest.approx(12 * (1 - 2 / 7), abs=1e-6)
    assert found.value / found.uniform_value > 1.1


def test_a_budget_in_waves_is_judged_by_the_last_one_and_against_whole_uniform_groups() -> None:
    """Nothing while a wave is to come; then uniform is what it would have been from the start."""
    believed, limits = beliefs(4), bounds(4)
    budget = Budget(16, wave_fraction=0.5)
    first = plan_allocation("posterior", "paper", believed, limits, budget)
    assert outlook("paper", believed, limits, np.zeros(4, np.int64), first) is None
    came = WaveOutcomes(
        first.num_rollouts,
        first.num_rollouts,
        np.array([0, 1, 1, 2]),
        np.array([False, True, True, False]),
    )
    second = plan_extension(
        "posterior", "paper", believed, limits, Budget(16), came, keep_outstanding=False
    )
    found = outlook("paper", believed, limits, begun_groups(came, False).size, second)
    assert found is not None
    assert found.rollouts == 16
    assert found.effective_groups > 2
    # Of groups of 4 that nothing is known of but the flat beliefs.
    assert found.uniform_effective_groups == pytest.approx(4 * (1 - 2 / 5), abs=1e-6)


def test_a_large_batch_is_judged_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all prompts are alike it is exact; positions are spread over the batch."""
    monkeypatch.setattr(module, "SAMPLE", 10)
    believed, limits = beliefs(95), bounds(95)
    decision = plan_allocation("posterior", "paper", believed, limits, Budget(4 * 95))
    found = outlook("paper", believed, limits, np.zeros(95, np.int64), decision)
    assert found is not None
    assert found.uniform_effective_groups == pytest.approx(95 * (1 - 2 / 5), abs=1e-6)

"""Evidence that is summed when prompts are visited is that of all their visits, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_scheduler.core.aging import Discounts, Evidence, EvidenceOfAll, Weighed
from knapsack_scheduler.core.drift import Drift
from knapsack_scheduler.core.evidence import Visits, Windows, merge_visits
from knapsack_scheduler.core.posterior import Prior, newest_prior, posterior, posterior_apart
from knapsack_scheduler.core.rewardlevels import RewardLevels

PROMPTS = 3000
STEP = 40


def lived(seed: int, evidence: EvidenceOfAll, discounts: Discounts) -> Visits:
    """Return the windows of prompts that were visited at random, asked for now and then."""
    rng = np.random.default_rng(seed)
    visits = Visits(PROMPTS)
    evidence.grow(PROMPTS)
    for step in range(STEP):
        rows = rng.choice(PROMPTS, rng.integers(1, 700), replace=False)
        # Some are late, by steps and by versions.
        at, version = step - int(rng.integers(0, 4)), int(rng.integers(0, step + 1))
        rollouts = rng.integers(0, 40, rows.size)
        merge_visits(visits, rows, at, version, rollouts, rng.binomial(rollouts, 0.3))
        evidence.visited(rows)
        if step % 3 == 0:
            evidence.of(rng.integers(-1, PROMPTS, 500), visits, discounts)
        elif step % 3 == 1:
            evidence.prepare(visits, discounts)
    return visits


def same(a: Evidence, b: Evidence) -> bool:
    """Whether two are the same, bit by bit."""
    return all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes()
        for name in ("successes", "failures", "policy_version")
    )


@pytest.mark.parametrize("version_discount", [1.0, 0.999, 0.7])
def test_it_is_that_of_the_visits(version_discount: float) -> None:
    """Whenever it was asked for, and -1 has none."""
    discounts = Discounts(0.5, version_discount, 32.0)
    evidence = EvidenceOfAll()
    visits = lived(1, evidence, discounts)
    rows = np.arange(PROMPTS)
    anew = Weighed.of(Windows.of(visits, rows), discounts).evidence
    assert same(evidence.of(rows, visits, discounts), anew)
    nobody = evidence.of(np.array([-1]), visits, discounts)
    assert [each.item() for each in (nobody.successes, nobody.failures)] == [0.0, 0.0]


@pytest.mark.parametrize("cap", [4.0, 32.0, 100.0])
@pytest.mark.parametrize("size", [PROMPTS, 100])
def test_either_way_to_a_posterior_leads_to_the_same(cap: float, size: int) -> None:
    """From the sums, and from the windows of prompts of which the step itself saw nothing."""
    discounts, drift = Discounts(0.5, 0.99, cap), Drift(0.3, 0.9)
    evidence = EvidenceOfAll()
    visits = lived(2, evidence, discounts)
    prior = newest_prior(visits, np.arange(512), STEP, discounts)
    rows = np.maximum(np.random.default_rng(3).integers(-300, PROMPTS, size), -1)
    assert (rows < 0).any()
    levels = RewardLevels.none_yet(0.5, True)
    slow = posterior_apart(visits, rows, STEP, STEP, discounts, prior, levels, drift)
    fast = posterior(evidence.of(rows, visits, discounts), STEP, discounts, prior, drift)
    assert fast.alpha.tobytes() == slow.alpha.tobytes()
    assert fast.beta.tobytes() == slow.beta.tobytes()
    if fast.kinds is not None:
        of_kind: dict[int, tuple[float, float]] = {}
        for kind, *both in zip(fast.kinds.tolist(), fast.alpha, fast.beta, strict=True):
            assert of_kind.setdefault(kind, tuple(both)) == tuple(both)
    assert (fast.kinds is not None) == (size == PROMPTS and cap <= 32.0)


def test_without_anything_seen_everybody_has_the_prior() -> None:
    """In batches of any size."""
    nothing = np.zeros(PROMPTS)
    found = posterior(
        Evidence(nothing, nothing, np.zeros(PROMPTS, np.int64)),
        7, Discounts(0.5, 0.9, 32.0), Prior(0.4, 0.8), Drift(1.0, 0.5),
    )  # fmt: skip
    assert set(found.alpha.tolist()) == {0.4}
    assert set(found.beta.tolist()) == {0.8}

"""What a log says of success rates: against enumeration, and against rates that are known."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_scheduler.core.objective import EFFECTIVE, PAPER
from knapsack_scheduler.lab.drift import LOGITS, RATES, normal_kernel
from knapsack_scheduler.lab.hindsight import look_back


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 0.0), (0.25, 0.35), (-0.5, 1.0), (0.1, 0.0)])
def test_kernel_moves_by_its_mean_and_spread(mean: float, spread: float) -> None:
    """A step from the middle has the mean asked for, and its spread but for the grid's."""
    kernel = normal_kernel(mean, spread)
    step = kernel[LOGITS.size // 2]

    assert kernel.sum(axis=1) == pytest.approx(1.0)
    assert step @ LOGITS == pytest.approx(mean, abs=1e-9)
    variance = step @ LOGITS**2 - (step @ LOGITS) ** 2
    assert 0.0 <= variance - spread**2 <= (LOGITS[1] - LOGITS[0]) ** 2 / 4 + 1e-9


def test_smoothing_is_bayes_rule() -> None:
    """The rates at each of three visits are those that summing over all paths gives."""
    rollouts = np.array([4, 6, 2])
    successes = np.array([1, 5, 2])
    # Other prompts give the model something to be fitted to.
    rng = np.random.default_rng(0)
    more = np.repeat(np.arange(1, 200, dtype=np.int32), 3)
    seen = look_back(
        np.concatenate([np.zeros(3, np.int32), more]),
        np.concatenate([rollouts, np.full(more.size, 4)]),
        np.concatenate([successes, rng.binomial(4, rng.random(more.size))]),
    )

    start, kernel = seen.drift.start, seen.drift.kernel
    fit = RATES[None, :] ** successes[:, None] * (1 - RATES) ** (rollouts - successes)[:, None]
    paths = np.einsum("i,ij,jk,i,j,k->ijk", start, kernel, kernel, *fit)
    paths /= paths.sum()
    for visit, axes in enumerate([(1, 2), (0, 2), (0, 1)]):
        expected = paths.sum(axis=axes)
        assert seen.rates(np.array([visit])).weight[0] == pytest.approx(expected, abs=1e-6)


def test_change_is_the_chance_of_another_reward() -> None:
    """Of a rate p, m more rollouts change all failures by 1 - q^m, and gain I(p) then."""
    seen = look_back(np.zeros(1, np.int32), np.array([2]), np.array([0]))
    rates = seen.rates(np.array([0]))
    chance, gain = rates.change(np.array([0]), np.array([3]), PAPER)
    changed = 1 - (1 - RATES) ** 3

    assert chance[0] == pytest.approx(rates.weight[0] @ changed)
    assert gain[0] == pytest.approx(rates.weight[0] @ (changed * RATES * (1 - RATES) ** 2))
    assert rates.gain(EFFECTIVE)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("epochs", "drift", "walk"), [(5, 0.25, 0.35), (5, 0.0, 0.0), (5, 0.7, 0.9), (1, 0.0, 0.0)]
)
def test_extrapolation_covers_what_would_have_come(epochs: int, drift: float, walk: float) -> None:
    """Of groups of 8 with equal rewards, as many are said to change as would, within 12 %.

    The rates are a mixture of three kinds of prompts, which no model here is told, and
    move as no policy is told either.
    """
    rng = np.random.default_rng(5)
    prompts, size = 2000, 8
    logits = rng.choice([-4.0, -0.5, 2.5], prompts, p=[0.3, 0.4, 0.3]) + rng.normal(0, 1, prompts)
    rates = []
    for _ in range(epochs):
        rates.append(1 / (1 + np.exp(-logits)))
        logits = logits + rng.normal(drift, walk, prompts)
    p = np.concatenate(rates)
    successes = rng.binomial(size, p)
    seen = look_back(
        np.tile(np.arange(prompts, dtype=np.int32), epochs), np.full(p.size, size), successes
    )
    equal = np.flatnonzero((successes == 0) | (successes == size))
    k, of = successes[equal], p[equal]

    assert seen.drift.mean == pytest.approx(drift, abs=0.13)
    assert seen.drift.spread == pytest.approx(walk, abs=0.2)
    for further in (8, 32):
        chance, gain = seen.rates(equal).change(k, np.full(k.size, further), PAPER)
        would = np.where(k == 0, 1 - (1 - of) ** further, 1 - of**further)
        assert chance.sum() == pytest.approx(would.sum(), rel=0.12)
        assert gain.sum() == pytest.approx((would * of * (1 - of) ** 2).sum(), rel=0.2)
    mixed = np.flatnonzero((successes > 0) & (successes < size))
    worth = (p * (1 - p) ** 2)[mixed].sum()
    assert seen.rates(mixed).gain(PAPER).sum() == pytest.approx(worth, rel=0.04)


def test_extremes_stay_numbers() -> None:
    """Huge groups, and visits that contradict each other, give rates that sum to 1."""
    prompts = np.array([0, 0, 1], np.int32)
    seen = look_back(prompts, np.array([10**6, 10**6, 1]), np.array([0, 10**6, 1]))
    weight = seen.rates(slice(0, 3)).weight

    assert weight.sum(axis=1) == pytest.approx(1.0)
    assert weight[0] @ RATES < 0.01 < 0.99 < weight[1] @ RATES
    assert seen.revisits.tolist() == [True, True, False]

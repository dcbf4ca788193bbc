"""How success rates moved: the curve, the arithmetic below it, and whom it is learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.aging import Discounts
from knapsack_scheduler.core.drift import FEWEST_PROMPTS, Drift, fit_drift
from knapsack_scheduler.core.elementary import exp, log
from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.posterior import Prior, newest_drift
from knapsack_scheduler.core.problem import tie_keys
from knapsack_scheduler.core.recency import LastVisited


def test_elementary_functions_are_right_to_a_few_units_in_the_last_place() -> None:
    """Over the whole range that decisions use, and held at its ends."""
    x = np.concatenate([np.geomspace(1e-300, 1e300, 4001), np.linspace(0.5, 2.0, 4001)])
    assert log(x) == pytest.approx(np.log(x), rel=1e-15, abs=1e-16)
    y = np.linspace(-690, 690, 20001)
    assert exp(y) == pytest.approx(np.exp(y), rel=1e-13)
    small = np.linspace(-3, 3, 20001)
    assert exp(small) == pytest.approx(np.exp(small), rel=1e-15)
    assert exp(np.array([1e9, -1e9])).tolist() == exp(np.array([700.0, -700.0])).tolist()


def moved_rates(shift: float, slope: float, prompts: int, rollouts: int) -> Drift:
    """Return the curve found where the mean of the posterior is right but for this one."""
    rng = np.random.default_rng(4)
    odds = rng.normal(-0.5, 1.8, prompts)
    before, now = 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-(shift + slope * odds)))
    successes = rng.binomial(rollouts, now)
    weight = np.full(prompts, 20.0)
    return fit_drift(before * weight, (1 - before) * weight, np.full(prompts, rollouts), successes)


@pytest.mark.parametrize(("shift", "slope"), [(0.0, 1.0), (0.8, 1.0), (-0.4, 0.7), (0.5, 1.3)])
def test_the_curve_is_found_again(shift: float, slope: float) -> None:
    """From a thousand prompts with eight rollouts each, to within what they can tell."""
    found = moved_rates(shift, slope, 1024, 8)
    assert found.shift == pytest.approx(shift, abs=0.12)
    assert found.slope == pytest.approx(slope, abs=0.12)


def test_little_to_learn_from_leaves_the_identity() -> None:
    """Few prompts change nothing, some change little."""
    assert moved_rates(1.5, 1.0, FEWEST_PROMPTS - 1, 8) == Drift()
    assert 0.0 < moved_rates(1.5, 1.0, FEWEST_PROMPTS, 2).shift < 1.5


def test_it_is_the_highest_point_of_the_posterior() -> None:
    """Neighbouring curves are less probable, by a direct evaluation."""
    rng = np.random.default_rng(9)
    alpha, beta = rng.gamma(2.0, 2.0, 200) + 0.1, rng.gamma(2.0, 2.0, 200) + 0.1
    n = rng.integers(1, 20, 200)
    k = rng.binomial(n, 1 / (1 + (beta / alpha) ** 0.8 * np.exp(-0.4)))
    found = fit_drift(alpha, beta, n, k)

    def log_posterior(shift: float, slope: float) -> float:
        p = 1 / (1 + np.exp(-(shift + slope * np.log(alpha / beta))))
        each = (k * np.log(p) + (n - k) * np.log1p(-p)) / (1 + 0.2 * (n - 1))
        return float(each.sum() - shift**2 / 0.5 - (slope - 1) ** 2 / 0.125)

    best = log_posterior(found.shift, found.slope)
    for shift, slope in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert log_posterior(found.shift + shift, found.slope + slope) < best


def test_the_newest_visit_is_predicted_from_the_older_ones_alone() -> None:
    """Everybody failed four times, then passed four times: the curve leads upwards."""
    visits = Visits(100)
    rows, four, none = np.arange(100), np.full(100, 4), np.zeros(100, np.int64)
    merge_visits(visits, rows, 1, 1, four, none)
    merge_visits(visits, rows, 2, 2, four, four)
    up = newest_drift(visits, rows, Discounts(0.5, 1.0, 32.0), Prior(0.5, 0.5))
    assert up.shift > 1.0
    merge_visits(visits, rows, 3, 3, four, none)
    down = newest_drift(visits, rows, Discounts(0.5, 1.0, 32.0), Prior(0.5, 0.5))
    assert down.shift < -1.0


def test_steps_that_were_all_visited_again_are_forgotten() -> None:
    """A few prompts over many steps leave the newest step, and nothing to walk through."""
    visits, revisited = Visits(8), LastVisited(1024, twice=True)
    rows, one, keys = np.arange(8), np.ones(8, np.int64), np.arange(8, dtype=np.uint64)
    for step in range(300):
        merge_visits(visits, rows, step, step, one, one)
        revisited.add(rows, step, visits, keys)
        assert revisited.newest(visits, keys).size == 8 * (step > 0)
    assert len(revisited._by_step) == 1


def test_of_many_prompts_visited_at_one_step_few_are_held() -> None:
    """Those that are asked for and the reports since, also where nobody asks."""
    visits, last = Visits(600_000), LastVisited(512, twice=False)
    keys = np.random.default_rng(0).permutation(len(visits)).astype(np.uint64)
    for start in range(0, len(visits), 10_000):
        rows = np.arange(start, start + 10_000)
        merge_visits(visits, rows, 3, 0, np.ones(10_000), np.ones(10_000))
        last.add(rows, 3, visits, keys)
        assert last.columns()["rows"].size <= 512 + 2**16 + 10_000
    assert np.array_equal(last.newest(visits, keys), np.argsort(keys)[:512])
    assert last.columns()["rows"].size == 512


VISITS = st.lists(
    st.tuples(
        st.integers(0, 5),
        # From one policy version to enough to fill a window with a step.
        st.sampled_from([1, 2, 8]),
        st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True),
    ),
    max_size=20,
)


@given(VISITS, st.integers(1, 14), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_prompts_visited_last_are_those_of_a_full_search(
    waves: list[tuple[int, int, list[int]]], count: int, twice: bool, alike: bool, order: Any
) -> None:
    """In any order of arrival, whoever was asked for before, after a restart, with equal keys."""
    keys = tie_keys([f"p{k}" for k in range(12)]) >> np.uint64(63 if alike else 0)
    reports = [(step, version, rows) for step, n, rows in waves for version in range(n)]
    answers = []
    for ask in (False, True):
        visits, last = Visits(12), LastVisited(count, twice=twice)
        for step, version, rows in reports:
            at = np.array(sorted(rows))
            one = np.ones(at.size, np.int64)
            merge_visits(visits, at, step, version, one, one)
            last.add(at, step, visits, keys)
            if ask and order.random() < 0.5:
                last.newest(visits, keys)
                last = LastVisited.from_columns(last.columns(), count, twice=twice)
        answers.append(last.newest(visits, keys).tolist())
        order.shuffle(reports)
    steps = [{step for step, _, rows in reports if row in rows} for row in range(12)]
    newest = {row: max(seen) for row, seen in enumerate(steps) if len(seen) > twice}
    chosen: list[int] = []
    for step in sorted(set(newest.values()), reverse=True):
        if len(chosen) < count:
            chosen += [row for row, last_step in newest.items() if last_step == step]
    expected = sorted(chosen, key=lambda row: keys[row])[:count]
    assert answers == [expected, expected]

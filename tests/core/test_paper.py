"""The rule of the paper's release: what it gives to whom, and that it always answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_scheduler.core.evidence import Visits, merge_visits
from knapsack_scheduler.core.paper import paper_sizes, recent_outcomes
from knapsack_scheduler.core.problem import Bounds, Recent, tie_keys
from knapsack_scheduler.core.solve import solve


def sizes(
    rollouts: list[float], successes: list[float], total: int, low: int = 2, high: int = 128
) -> list[int]:
    """Return the rule's answer for prompts p0, p1 .."""
    count = len(rollouts)
    recent = Recent(np.array(rollouts, float), np.array(successes, float))
    bounds = Bounds(np.full(count, low), np.full(count, high))
    keys = tie_keys([f"p{k}" for k in range(count)])
    return paper_sizes(recent, bounds, total, keys).tolist()


def test_effective_prompts_are_divided_by_the_knapsack() -> None:
    """Solved and failed prompts get the minimum while the others can use the rest."""
    p = np.array([4, 8, 12, 1]) / 16
    answer = sizes([16] * 6, [4, 8, 12, 1, 0, 16], 44)
    # 4 x 2 + 12 more would be useful at most 8 + 3 + 8 + 35 beyond the minimums: no surplus.
    assert answer[4:] == [2, 2]
    assert answer[:4] == solve(p, 40).tolist()


def test_surplus_goes_to_those_that_never_succeeded() -> None:
    """At p = 1/2 three rollouts are effective with 90 %, floor(log 0.1 / log 0.5) = 3."""
    assert sizes([16] * 3, [8, 0, 16], 24) == [5, 17, 2]
    # Nobody failed: the surplus is levelled among all that are not effective.
    answer = sizes([16] * 3, [8, 16, 16], 24)
    assert (answer[0], sorted(answer[1:])) == (5, [9, 10])


def test_little_known_prompts_get_an_even_share() -> None:
    """Fewer than eight rewards tell nothing; unseen is not the same as failed."""
    assert sizes([0, 0, 0, 0], [0, 0, 0, 0], 32) == [8, 8, 8, 8]
    assert sizes([7, 7, 7, 7], [0, 7, 3, 1], 32) == [8, 8, 8, 8]
    answer = sizes([0, 16, 16, 16], [0, 16, 16, 0], 32)
    assert answer[0] == 8
    assert sum(answer) == 32


def test_the_releases_failures_are_not_repeated() -> None:
    """All effective with budget to spare crashed it, and its fallback passed max_rollouts."""
    assert sizes([16] * 4, [8] * 4, 32) == [8, 8, 8, 8]
    answer = sizes([16] * 64, [16.0] * 63 + [0.0], 512)
    assert answer[-1] == 128
    assert sum(answer) == 512


CASES = st.lists(st.tuples(st.integers(0, 24), st.floats(0, 1)), min_size=1, max_size=12)


@given(CASES, st.integers(1, 3), st.integers(0, 20), st.floats(0, 1))
def test_the_budget_is_spent_within_bounds_in_any_order(
    cases: list[tuple[int, float]], low: int, more: int, share: float
) -> None:
    """Whatever is known of the prompts; permuted prompts get the same."""
    count = len(cases)
    n = np.array([rollouts for rollouts, _ in cases], float)
    k = np.floor(n * np.array([rate for _, rate in cases]))
    bounds = Bounds(np.full(count, low), np.full(count, low + more))
    total = int(bounds.minimum.sum() + share * (bounds.maximum - bounds.minimum).sum())
    keys = tie_keys([f"p{i}" for i in range(count)])
    answer = paper_sizes(Recent(n, k), bounds, total, keys)
    assert answer.sum() == total
    assert (answer >= bounds.minimum).all()
    assert (answer <= bounds.maximum).all()
    order = np.random.default_rng(0).permutation(count)
    again = paper_sizes(Recent(n[order], k[order]), bounds, total, keys[order])
    assert again.tolist() == answer[order].tolist()


def test_rates_are_of_the_newest_rewards() -> None:
    """A visit of 20 alone; else the newest 16, of which an old visit gives its share."""
    visits = Visits(3)
    for step, n, k in ((0, 8, 8), (1, 12, 3), (2, 6, 3)):
        merge_visits(visits, np.array([0]), step, step, np.array([n]), np.array([k]))
    merge_visits(visits, np.array([1]), 0, 0, np.array([9]), np.array([9]))
    merge_visits(visits, np.array([1]), 1, 1, np.array([20]), np.array([5]))
    recent = recent_outcomes(visits, np.array([0, 1, 2, -1]))
    assert recent.rollouts.tolist() == [16, 20, 0, 0]
    # 6 of the newest with 3 successes, and 10 of 12 with 3.
    assert recent.successes == pytest.approx([3 + 10 * 3 / 12, 5, 0, 0])

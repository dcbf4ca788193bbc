"""Windows of visits do not depend on the order or the cut of what was reported."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.evidence import WINDOW, Visits, group_outcomes, merge_visits

OUTCOMES = st.lists(
    st.tuples(
        st.integers(0, 3),  # row
        st.integers(0, 14),  # step
        st.integers(0, 2),  # policy version
        st.integers(0, 5),  # rollouts
        st.integers(0, 5),  # successes, cut to the rollouts
    ),
    max_size=60,
)


def merged(outcomes: list[tuple[int, int, int, int, int]]) -> Visits:
    """Return the windows after merging the outcomes one by one."""
    visits = Visits(4)
    for row, step, version, rollouts, successes in outcomes:
        merge_visits(
            visits,
            np.array([row]),
            step,
            version,
            np.array([rollouts]),
            np.array([min(successes, rollouts)]),
        )
    return visits


def contents(visits: Visits, row: int) -> list[tuple[int, int, int, int]]:
    """Return the filled slots of a row, newest first."""
    return [
        (
            int(visits.step[row, slot]),
            int(visits.policy_version[row, slot]),
            int(visits.rollouts[row, slot]),
            int(visits.successes[row, slot]),
        )
        for slot in range(WINDOW)
        if visits.rollouts[row, slot]
    ]


@given(OUTCOMES, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_window_is_the_newest_visits_whatever_the_order(
    outcomes: list[tuple[int, int, int, int, int]], random: object
) -> None:
    """Against a dictionary of sums, cut to the newest keys."""
    sums: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(
        lambda: defaultdict(lambda: [0, 0])
    )
    for row, step, version, rollouts, successes in outcomes:
        if rollouts:
            sums[row][step, version][0] += rollouts
            sums[row][step, version][1] += min(successes, rollouts)
    shuffled = list(outcomes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    for order in (outcomes, shuffled):
        visits = merged(order)
        for row in range(4):
            newest = sorted(sums[row].items(), reverse=True)[:WINDOW]
            assert contents(visits, row) == [(*key, *counts) for key, counts in newest]


def test_rows_are_merged_together_as_one_by_one() -> None:
    """A report of many prompts is the same as many reports of one."""
    rng = np.random.default_rng(0)
    together, apart = Visits(50), Visits(50)
    for _ in range(200):
        rows = rng.permutation(50)[: rng.integers(1, 50)]
        step, version = int(rng.integers(20)), int(rng.integers(3))
        rollouts = rng.integers(0, 4, rows.size)
        successes = rng.integers(0, rollouts + 1)
        merge_visits(together, rows, step, version, rollouts, successes)
        for row, n, k in zip(rows, rollouts, successes, strict=True):
            merge_visits(apart, np.array([row]), step, version, np.array([n]), np.array([k]))

    for name in ("step", "policy_version", "rollouts", "successes"):
        filled = together.rollouts[:50] > 0
        assert (getattr(together, name)[:50] == getattr(apart, name)[:50])[filled].all()
    assert (together.rollouts[:50] == apart.rollouts[:50]).all()


def test_growing_keeps_what_is_there() -> None:
    """New rows are empty, old ones unchanged."""
    visits = merged([(1, 5, 0, 3, 2)])
    visits.grow(10_000)

    assert len(visits) == 10_000
    assert contents(visits, 1) == [(5, 0, 3, 2)]
    assert not visits.rollouts[2:10_000].any()


def test_outcomes_of_groups() -> None:
    """Successes lie above the threshold, and the extremes say whether rewards differ."""
    outcomes = group_outcomes(
        np.array([1.0, 0.0, 0.5, 0.5, 0.25], np.float32), np.array([0, 0, 2, 2, 3]), 4, 0.5
    )

    assert outcomes.rollouts.tolist() == [2, 0, 2, 1]
    assert outcomes.successes.tolist() == [1, 0, 0, 0]
    assert (outcomes.reward_min < outcomes.reward_max).tolist() == [True, False, False, False]

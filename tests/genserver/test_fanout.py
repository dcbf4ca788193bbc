"""Which rollouts start now: bounds, fairness, and nobody forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knapsack_genserver.fanout import Waiting, next_batch

GROUPS = st.lists(
    st.builds(
        Waiting,
        request=st.integers(0, 3),
        rollouts=st.integers(1, 200),
        tokens=st.integers(1, 100),
        priority=st.integers(0, 2),
    ),
    max_size=12,
)


@given(GROUPS, st.integers(1, 64), st.integers(1, 5000))
def test_a_batch_keeps_its_bounds(waiting: list[Waiting], rollouts: int, tokens: int) -> None:
    """No more rollouts than wait or fit; at least one if any waits; the soonest first."""
    batch = next_batch(waiting, rollouts, tokens)
    assert [at for at, _ in batch] == sorted({at for at, _ in batch})
    assert all(1 <= count <= waiting[at].rollouts for at, count in batch)
    total = sum(count for _, count in batch)
    assert total <= rollouts
    held = sum(count * waiting[at].tokens for at, count in batch)
    assert held <= tokens or total == 1
    assert bool(batch) == bool(waiting)
    if waiting:
        soonest = min(group.priority for group in waiting)
        assert {waiting[at].priority for at, _ in batch} == {soonest}


@given(GROUPS, st.integers(1, 64), st.integers(1, 5000))
def test_every_rollout_is_started_in_the_end(
    waiting: list[Waiting], rollouts: int, tokens: int
) -> None:
    """Batch after batch until none waits; each batch starts something."""
    left = {at: group.rollouts for at, group in enumerate(waiting)}
    while left:
        now = [
            Waiting(waiting[at].request, n, waiting[at].tokens, waiting[at].priority)
            for at, n in left.items()
        ]
        places = list(left)
        batch = next_batch(now, rollouts, tokens)
        assert batch
        for at, count in batch:
            left[places[at]] -= count
            assert left[places[at]] >= 0
        left = {at: n for at, n in left.items() if n}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 60))
def test_a_batch_is_filled(sizes: list[int], rollouts: int) -> None:
    """If tokens do not bind, the batch holds all that wait or as many as it may."""
    waiting = [Waiting(request, n, 1) for request, n in enumerate(sizes)]
    total = sum(count for _, count in next_batch(waiting, rollouts, 10**6))
    assert total == min(sum(sizes), rollouts)


def test_requests_share_and_the_longest_group_goes_first() -> None:
    """A large request leaves half to a small one; within it the largest group begins."""
    waiting = [Waiting(1, 10, 5), Waiting(1, 500, 5), Waiting(2, 4, 5), Waiting(2, 3, 5)]
    assert next_batch(waiting, 12, 10**6) == [(1, 6), (2, 4), (3, 2)]
    # What one request does not need, the other gets.
    assert next_batch(waiting, 100, 10**6) == [(1, 93), (2, 4), (3, 3)]
    # Tokens bind: each request gets what fits.
    assert next_batch(waiting, 100, 20) == [(1, 4)]


def test_something_starts_however_large() -> None:
    """A rollout that may outgrow the cache is started alone rather than never."""
    assert next_batch([Waiting(1, 3, 9999)], 8, 100) == [(0, 1)]
    assert next_batch([], 8, 100) == []

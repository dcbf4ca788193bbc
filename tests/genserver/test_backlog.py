"""What a call has asked for: longest first, in chunks, nothing twice and nothing forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from knapsack_genserver.backlog import Backlog

ASKED = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 100), st.integers(1, 4)), min_size=1, max_size=12
)


def filled(asked: list[tuple[int, int, int]]) -> tuple[Backlog, dict[int, int]]:
    """Return a backlog with (position, rollouts, expected tokens), and totals by position."""
    backlog, totals = Backlog(), dict[int, int]()
    for position, rollouts, expected in asked:
        backlog.add(position, totals.get(position, 0), rollouts, expected)
        totals[position] = totals.get(position, 0) + rollouts
    return backlog, totals


@given(ASKED, st.integers(1, 40))
def test_everything_is_taken_once_longest_first(
    asked: list[tuple[int, int, int]], most: int
) -> None:
    """In chunks within the limit; expected tokens never rise from one chunk to the next."""
    backlog, totals = filled(asked)
    expected_of = {}
    first = dict.fromkeys(totals, 0)
    for position, rollouts, expected in asked:
        for index in range(first[position], first[position] + rollouts):
            expected_of[position, index] = expected
        first[position] += rollouts
    taken: list[tuple[int, int]] = []
    order: list[int] = []
    while backlog.rollouts:
        position, start, count = backlog.take(most)
        assert 1 <= count <= most
        taken += [(position, index) for index in range(start, start + count)]
        order.append(expected_of[position, start])
        assert {expected_of[position, index] for index in range(start, start + count)} == {
            order[-1]
        }
    assert sorted(taken) == sorted(expected_of)
    assert order == sorted(order, reverse=True)


@given(ASKED, st.integers(1, 40), st.integers(0, 8), st.sets(st.integers(0, 6)))
def test_what_is_dropped_is_what_had_not_been_taken(
    asked: list[tuple[int, int, int]], most: int, takes: int, positions: set[int]
) -> None:
    """Of the prompts that were named, and of no other; the rest is still taken."""
    backlog, totals = filled(asked)
    left = {(at, index) for at, total in totals.items() for index in range(total)}
    for _ in range(takes):
        if backlog.rollouts:
            position, start, count = backlog.take(most)
            left -= {(position, index) for index in range(start, start + count)}
    dropped = {
        (position, index)
        for position, parts in backlog.drop(positions).items()
        for part in parts
        for index in part
    }
    assert dropped == {(at, index) for at, index in left if at in positions}
    left -= dropped
    assert backlog.rollouts == len(left)
    while backlog.rollouts:
        position, start, count = backlog.take(most)
        left -= {(position, index) for index in range(start, start + count)}
    assert not left


def test_equally_long_work_goes_by_the_size_of_the_group() -> None:
    """A cut group goes on before a smaller one begins; equals go as they came."""
    backlog, _ = filled([(0, 3, 7), (1, 40, 7), (2, 3, 7), (3, 1, 9)])
    chunks = []
    while backlog.rollouts:
        chunks.append(backlog.take(16))
    assert chunks == [(3, 0, 1), (1, 0, 16), (1, 16, 16), (1, 32, 8), (0, 0, 3), (2, 0, 3)]

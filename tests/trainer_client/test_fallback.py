"""The allocation without a scheduler."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_trainer_client.arguments import AllocationAsk
from knapsack_trainer_client.fallback import uniform_allocation, uniform_extension

# min, max, total, expected; the BLAKE2b hashes of the ids are in the order c, a, b, d
TABLE = [
    ((), (), 8, [2, 2, 2, 2]),
    ((), (), 9, [2, 2, 3, 2]),
    ((), (), 10, [3, 2, 3, 2]),
    ((), (), 3, [1, 1, 1, 0]),
    ((2,), (), 9, [2, 2, 3, 2]),
    ((), (2, 9, 9, 9), 12, [2, 3, 4, 3]),
    ((5, 1, 1, 1), (), 8, [5, 1, 1, 1]),
    ((5, 1, 1, 1), (), 10, [5, 2, 2, 1]),
    ((0,), (), 4, [2, 0, 2, 0]),
    ((0,), (), 5, [2, 0, 3, 0]),
    ((0,), (), 1, [0, 0, 1, 0]),
    ((0,), (), 12, [3, 3, 3, 3]),
    ((0,), (1,), 3, [1, 1, 1, 0]),
]


@pytest.mark.parametrize(("low", "high", "total", "expected"), TABLE)
def test_budget_is_divided_evenly(
    low: tuple[int, ...], high: tuple[int, ...], total: int, expected: list[int]
) -> None:
    """The lowest group goes first, then the lowest hash; a skipped prompt gets 0 or 2."""
    ask = AllocationAsk(("a", "b", "c", "d"), total, 3, low, high)

    allocation = uniform_allocation(ask, "run")

    assert allocation.num_rollouts == expected
    assert allocation.is_fallback
    assert allocation.summary.policy == "uniform"
    assert allocation.summary.largest_group == max(expected)
    assert (allocation.step, allocation.run_id, allocation.allocation_id) == (3, "run", "")


@st.composite
def asks(draw: st.DrawFn, least: int = 0, unique: bool = False) -> AllocationAsk:
    """Draw a feasible request."""
    names = st.text(min_size=1, max_size=3)
    ids = draw(st.lists(names, min_size=1, max_size=12, unique=unique))
    low = draw(st.lists(st.integers(least, 5), min_size=len(ids), max_size=len(ids)))
    room = draw(st.lists(st.integers(0, 9), min_size=len(ids), max_size=len(ids)))
    high = [a + b for a, b in zip(low, room, strict=True)]
    total = draw(st.integers(sum(low), sum(high)))
    fraction = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    waves = draw(st.sampled_from([0, 2])) if fraction == 0.0 else 0
    return AllocationAsk(tuple(ids), total, 0, tuple(low), tuple(high), fraction, waves=waves)


@given(ask=asks())
def test_fallback_spends_exactly_the_budget_within_bounds(ask: AllocationAsk) -> None:
    """All waves together spend the budget, whatever the share of the first."""
    first = uniform_allocation(ask, "run")
    second = uniform_extension(first, 0.0)

    sizes = second.rollouts_so_far
    assert first.allocated_rollouts == sum(first.num_rollouts)
    assert first.remaining_rollouts == ask.total_rollouts - first.allocated_rollouts
    assert sum(sizes) == ask.total_rollouts
    assert second.remaining_rollouts == 0
    assert all(
        a <= n <= b for a, n, b in zip(ask.min_rollouts, sizes, ask.max_rollouts, strict=True)
    )


@given(ask=asks(unique=True), data=st.data())
def test_fallback_does_not_depend_on_the_order_of_prompts(
    ask: AllocationAsk, data: st.DataObject
) -> None:
    """A shuffled batch gets the shuffled allocation."""
    order = data.draw(st.permutations(range(len(ask.prompt_ids))))
    shuffled = replace(
        ask,
        prompt_ids=tuple(ask.prompt_ids[i] for i in order),
        min_rollouts=tuple(ask.min_rollouts[i] for i in order),
        max_rollouts=tuple(ask.max_rollouts[i] for i in order),
    )

    straight = uniform_allocation(ask, "run").num_rollouts
    mixed = uniform_allocation(shuffled, "run").num_rollouts

    assert [straight[i] for i in order] == mixed


@given(ask=asks(least=1))
def test_groups_are_level_within_their_bounds(ask: AllocationAsk) -> None:
    """No group could give a rollout to one that is smaller by two, bounds allowing."""
    sizes = uniform_allocation(replace(ask, wave_fraction=0.0), "run").num_rollouts
    for i, n in enumerate(sizes):
        for j, m in enumerate(sizes):
            movable = n > ask.min_rollouts[i] and m < ask.max_rollouts[j]
            assert not (movable and n > m + 1)


def test_partial_budget_says_what_was_not_given() -> None:
    """Bounds that cannot hold the budget give the closest total and the difference."""
    ask = AllocationAsk(("a", "b"), 10, 0, (2,), (3,), allow_partial=True)
    assert uniform_allocation(ask, "run").unallocated_rollouts == 4
    assert uniform_allocation(replace(ask, total_rollouts=1), "run").unallocated_rollouts == -3


def test_extension_of_a_scheduled_wave_evens_the_groups_out() -> None:
    """What is left goes to the smallest groups, within the bounds, and belongs to nobody."""
    ask = AllocationAsk(("a", "b", "c", "d"), 12, 0, (1,), (5,))
    wave = replace(
        uniform_allocation(ask, "run"),
        num_rollouts=[5, 1, 1, 1],
        rollouts_so_far=(5, 1, 1, 1),
        remaining_rollouts=4,
        allocation_id="a1",
        is_fallback=False,
    )

    extension = uniform_extension(wave, 0.0)

    assert extension.num_rollouts == [0, 1, 2, 1]
    assert extension.rollouts_so_far == (5, 2, 3, 2)
    assert (extension.allocation_id, extension.wave, extension.is_fallback) == ("", 2, True)
    half = uniform_extension(wave, 0.25)
    assert (half.allocated_rollouts, half.remaining_rollouts) == (3, 1)


def test_budget_in_tokens_is_divided_by_the_mean_length() -> None:
    """Known lengths turn tokens into rollouts; unknown ones give the minimum, or 2."""
    ask = AllocationAsk(("a", "b"), 0, 0, total_tokens=1000)
    assert uniform_allocation(ask, "run", 100.0).allocated_rollouts == 10
    assert uniform_allocation(ask, "run").num_rollouts == [2, 2]
    assert uniform_allocation(replace(ask, min_rollouts=(3,)), "run").num_rollouts == [3, 3]
    assert uniform_allocation(replace(ask, total_rollouts=6), "run", 100.0).allocated_rollouts == 6

"""Advantages, repeated items and loss weights of ragged groups."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knapsack_trainer_client import (
    Allocation,
    AllocationSummary,
    InvalidRequest,
    group_advantages,
    loss_weights,
    repeat_by_allocation,
)

ROOT_HALF = math.sqrt(0.5)
ROOT_3 = math.sqrt(3)

# rewards of one group, method, scale, epsilon, expected
TABLE = [
    ([1.0, 0.0], "dr_grpo", None, 0.0, [0.5, -0.5]),
    ([1.0, 0.0], "rloo", None, 0.0, [1.0, -1.0]),
    ([1.0, 0.0], "grpo", None, 0.0, [ROOT_HALF, -ROOT_HALF]),
    ([1.0, 0.0], "grpo", "none", 0.0, [0.5, -0.5]),
    ([1.0, 0.0, 0.0, 1.0], "rloo", None, 0.0, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
    ([3.0, 0.0, 0.0], "dr_grpo", None, 0.0, [2.0, -1.0, -1.0]),
    ([3.0, 0.0, 0.0], "rloo", None, 0.0, [3.0, -1.5, -1.5]),
    # std of 3, 0, 0 is sqrt(3)
    ([3.0, 0.0, 0.0], "grpo", None, 0.0, [2 / ROOT_3, -1 / ROOT_3, -1 / ROOT_3]),
    # with epsilon = std the advantage is halved
    ([3.0, 0.0, 0.0], "grpo", None, ROOT_3, [1 / ROOT_3, -0.5 / ROOT_3, -0.5 / ROOT_3]),
    ([3.0, 0.0, 0.0], "rloo", "std", 0.0, [ROOT_3, -1.5 / ROOT_3, -1.5 / ROOT_3]),
    ([1.0], "grpo", None, 0.0, [0.0]),
    ([1.0], "rloo", None, 0.0, [0.0]),
    ([], "grpo", None, 0.0, []),
    ([1.0, None, 0.0], "dr_grpo", None, 0.0, [0.5, 0.0, -0.5]),
    ([1.0, math.nan, 0.0], "rloo", None, 0.0, [1.0, 0.0, -1.0]),
    ([None, 1.0], "grpo", None, 0.0, [0.0, 0.0]),
    ([1e-200, 0.0], "grpo", None, 0.0, [ROOT_HALF, -ROOT_HALF]),
]  # fmt: skip


@pytest.mark.parametrize(("rewards", "method", "scale", "epsilon", "expected"), TABLE)
def test_advantages_of_one_group(
    rewards: list[Any], method: Any, scale: Any, epsilon: float, expected: list[float]
) -> None:
    """Each method gives what its formula gives by hand."""
    answer = group_advantages([rewards], method=method, scale=scale, epsilon=epsilon)

    assert answer == [pytest.approx(expected, abs=1e-15)]


def test_large_group_is_clipped() -> None:
    """One success among 93 is worth 9.54 spreads, and clip bounds it."""
    rewards = [[1.0] + [0.0] * 92]

    assert group_advantages(rewards, epsilon=0)[0][0] == pytest.approx(9.54, abs=0.01)
    assert group_advantages(rewards, clip=5.0)[0][0] == 5.0


def test_std_is_bounded_from_below() -> None:
    """min_std divides a group of small spread by less, and leaves the others alone."""
    rewards = [[3.0, 0.0, 0.0], [0.3, 0.0, 0.0]]

    answer = group_advantages(rewards, epsilon=0.0, min_std=1.0)

    assert answer[0] == pytest.approx([2 / ROOT_3, -1 / ROOT_3, -1 / ROOT_3])
    assert answer[1] == pytest.approx([0.2, -0.1, -0.1])


def test_population_std_divides_by_n() -> None:
    """The std of 1 and 0 divided by N is 1/2."""
    answer = group_advantages([[1.0, 0.0]], scale="population_std", epsilon=0.0)

    assert answer == [pytest.approx([1.0, -1.0])]


def _oracle(group: list[float], method: str) -> list[float]:
    """Return advantages by exact arithmetic."""
    exact = [Fraction(r) for r in group]
    if len(set(exact)) < 2:
        return [0.0] * len(group)
    answer = []
    for i, r in enumerate(exact):
        others = exact[:i] + exact[i + 1 :]
        if method == "rloo":
            answer.append(float(r - sum(others) / len(others)))
        else:
            answer.append(float(r - statistics.mean(exact)))
    if method == "grpo":
        std = math.sqrt(statistics.variance(exact))
        answer = [a / (std + 1e-6) for a in answer]
    return answer


REWARDS = st.floats(-10, 10, width=32)


@given(
    groups=st.lists(st.lists(REWARDS, max_size=6), max_size=6),
    method=st.sampled_from(["grpo", "dr_grpo", "rloo"]),
)
def test_advantages_agree_with_exact_arithmetic(groups: list[list[float]], method: Any) -> None:
    """Ragged groups get what rational arithmetic gives, and sum to zero."""
    answer = group_advantages(groups, method=method)

    for group, advantages in zip(groups, answer, strict=True):
        assert advantages == pytest.approx(_oracle(group, method), rel=1e-9, abs=1e-9)
        assert sum(advantages) == pytest.approx(0.0, abs=1e-6)


@given(
    reward=REWARDS, size=st.integers(1, 300), method=st.sampled_from(["grpo", "dr_grpo", "rloo"])
)
def test_constant_group_is_exactly_zero(reward: float, size: int, method: Any) -> None:
    """A constant group gives exactly 0.0 whatever the residue of its sum."""
    assert group_advantages([[reward] * size], method=method) == [[0.0] * size]
    tensor = torch.full((1, size), reward, dtype=torch.float32)
    assert torch.count_nonzero(group_advantages(tensor, method=method)) == 0


def test_float32_residue_does_not_become_an_advantage() -> None:
    """Float32 sums of 0.1 leave a residue, which must not be divided by a tiny spread."""
    rewards = np.full(93, 0.1, np.float32)
    residue = rewards - np.cumsum(rewards)[-1] / np.float32(93)
    assert residue[0] != 0.0

    answer = group_advantages(rewards, group_sizes=[93], epsilon=0.0)

    assert answer.tolist() == [0.0] * 93


@pytest.mark.parametrize(
    ("rewards", "kind"),
    [
        (np.array([1.0, 0.0, 0.0, 3.0, 0.0], np.float32), np.float32),
        (np.array([1, 0, 0, 3, 0]), np.float64),
        (torch.tensor([1.0, 0.0, 0.0, 3.0, 0.0]), torch.float32),
        (torch.tensor([1.0, 0.0, 0.0, 3.0, 0.0], dtype=torch.bfloat16), torch.bfloat16),
        (torch.tensor([1, 0, 0, 3, 0]), torch.float32),
    ],
)
@pytest.mark.parametrize("sizes", [[2, 3], np.array([2, 3]), torch.tensor([2, 3])])
def test_flat_container_comes_back_in_kind(rewards: Any, kind: Any, sizes: Any) -> None:
    """A flat array or tensor gives the same container, type and device."""
    answer = group_advantages(rewards, sizes, method="dr_grpo")

    assert type(answer) is type(rewards)
    assert answer.dtype == kind
    assert answer.tolist() == [0.5, -0.5, -1.0, 2.0, -1.0]
    if isinstance(rewards, torch.Tensor):
        assert answer.device == rewards.device


def test_other_shapes_come_back_in_kind() -> None:
    """Lists of arrays, matrices, flat lists and nested lists keep their shape."""
    arrays = group_advantages([np.array([1.0, 0.0]), torch.tensor([2.0])], method="dr_grpo")
    assert isinstance(arrays[0], np.ndarray)
    assert isinstance(arrays[1], torch.Tensor)
    matrix = group_advantages(np.array([[1.0, 0.0], [0.0, 0.0]]), method="dr_grpo")
    assert matrix.tolist() == [[0.5, -0.5], [0.0, 0.0]]
    assert group_advantages([1, 0, 5], [2, 1], method="dr_grpo") == [0.5, -0.5, 0.0]
    assert group_advantages([[1, 0], [5]], [2, 1], method="dr_grpo") == [[0.5, -0.5], [0.0]]
    assert group_advantages([torch.tensor(1.0), torch.tensor(0.0)], [2]) != [0.0, 0.0]
    assert group_advantages([]) == []
    assert group_advantages([[]]) == [[]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1.0, 0.0],), "group_sizes"),
        (([1.0, 0.0], [3]), "rewards = '2 numbers'"),
        (([[1.0], [0.0]], [1]), "rewards = '2 groups'"),
        (([[1.0, math.inf]],), "rewards[0][1]"),
        (([[1.0, "x"]],), "rewards[0][1]"),
        (([[1.0, 10**400]],), "rewards[0][1]"),
        (("10",), "rewards = '10'"),
        (([1.0], [-1]), "counts[0]"),
    ],
)
def test_wrong_groups_are_refused(arguments: Any, said: str) -> None:
    """A wrong shape or value is refused by name."""
    with pytest.raises(InvalidRequest) as caught:
        group_advantages(*arguments)

    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "options",
    [{"method": "ppo"}, {"scale": "max"}, {"clip": 0.0}, {"epsilon": -1.0}, {"min_std": -1.0}],
)
def test_wrong_options_are_refused(options: Any) -> None:
    """An unknown method or a senseless number is refused by name."""
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        group_advantages([[1.0, 0.0]], **options)


def test_items_are_repeated_in_order() -> None:
    """Every kind of sequence is repeated by its first dimension."""
    assert repeat_by_allocation(["a", "b", "c"], [2, 0, 1]) == ["a", "a", "c"]
    array = repeat_by_allocation(np.array([[1, 2], [3, 4]]), [1, 2])
    assert array.tolist() == [[1, 2], [3, 4], [3, 4]]
    tensor = repeat_by_allocation(torch.tensor([5, 6]), np.array([2, 1]))
    assert tensor.tolist() == [5, 5, 6]
    with pytest.raises(InvalidRequest, match="items"):
        repeat_by_allocation(["a"], [1, 1])


def test_loss_weights_by_hand() -> None:
    """Groups of 4 and 1 weigh as their formulas say."""
    assert loss_weights([4, 1], "sample") == [1.0] * 5
    assert loss_weights([4, 1], "prompt") == [0.625] * 4 + [2.5]
    # sqrt(4) + sqrt(1) = 3, 5 / (2 * 3) and 5 / (1 * 3)
    assert loss_weights([4, 1], "sqrt") == pytest.approx([5 / 6] * 4 + [5 / 3])
    assert loss_weights([0, 2]) == [1.0, 1.0]
    assert loss_weights([]) == []
    assert loss_weights(torch.tensor([2, 1])).dtype == torch.float32
    assert loss_weights(np.array([2, 1])).dtype == np.float64
    with pytest.raises(InvalidRequest, match="mode"):
        loss_weights([1], "other")  # type: ignore[arg-type]


@given(
    counts=st.lists(st.integers(0, 50), min_size=1).filter(any),
    mode=st.sampled_from(["sample", "prompt", "sqrt"]),
)
def test_loss_weights_have_mean_one(counts: list[int], mode: Any) -> None:
    """There is one weight per rollout and their mean is 1."""
    weights = loss_weights(counts, mode)

    assert len(weights) == sum(counts)
    assert sum(weights) / len(weights) == pytest.approx(1.0)


def test_an_allocation_gives_the_counts() -> None:
    """An allocation can stand for its counts everywhere."""
    allocation = Allocation(
        num_rollouts=[2, 1],
        prompt_ids=("a", "b"),
        step=0,
        wave=1,
        allocated_rollouts=3,
        remaining_rollouts=0,
        unallocated_rollouts=0,
        is_fallback=False,
        summary=AllocationSummary("posterior"),
        allocation_id="x",
        run_id="r",
        total_rollouts=3,
        rollouts_so_far=(2, 1),
    )

    assert repeat_by_allocation("ab", allocation) == ["a", "a", "b"]
    assert loss_weights(allocation, "sample") == [1.0, 1.0, 1.0]
    assert group_advantages([1, 0, 1], allocation, method="dr_grpo") == [0.5, -0.5, 0.0]

"""Wrong groups are found, named, and right ones pass, for the code shape of each trainer.

The functions below cut a batch as the trainers named do at the versions named; see
trainer_client/RECIPES.md.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knapsack_trainer_client import (
    InvalidRequest,
    WrongGroups,
    group_advantages,
    repeat_by_allocation,
    verify_groups,
)

SIZES = [2, 7, 3, 4]
"""Unequal, and 16 in all: exactly four groups of four."""
REWARDS = [1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1]
EQUAL = [4, 4, 4, 4]


def trl(rewards: torch.Tensor) -> torch.Tensor:
    """TRL 1.16: view by num_generations, mean and std repeated."""
    groups = rewards.view(-1, 4)
    mean = groups.mean(dim=1).repeat_interleave(4)
    return (rewards - mean) / (groups.std(dim=1).repeat_interleave(4) + 1e-4)


def slime(rewards: torch.Tensor) -> torch.Tensor:
    """slime 624b824: reshape where the total fits, else one group."""
    groups = rewards.reshape(-1, 4) if rewards.shape[-1] == 16 else rewards.view(-1, len(rewards))
    centred = groups - groups.mean(dim=-1, keepdim=True)
    return (centred / (centred.std(dim=-1, keepdim=True) + 1e-6)).flatten()


def areal(rewards: torch.Tensor) -> torch.Tensor:
    """AReaL 4aef98d: a slice of group_size after the other, in float64."""
    answer = torch.zeros_like(rewards)
    for i in range(len(rewards) // 4):
        rows = slice(i * 4, (i + 1) * 4)
        group = rewards[rows].double()
        answer[rows] = ((group - group.mean()) / (group.std() + 1e-5)).float()
    return answer


def roll(rewards: torch.Tensor) -> torch.Tensor:
    """ROLL 8eb27cc: reshape by num_return_sequences."""
    groups = rewards.reshape(*rewards.size()[:-1], -1, 4)
    std = torch.std(groups, dim=-1, keepdim=True)
    return ((groups - groups.mean(dim=-1, keepdim=True)) / (std + 1e-6)).reshape(*rewards.size())


def openrlhf_rloo(rewards: torch.Tensor) -> torch.Tensor:
    """OpenRLHF 3c3be62 with rloo: reshape, and the mean of the others."""
    groups = rewards.reshape(-1, 4)
    return (groups - (groups.sum(-1, keepdim=True) - groups) / 3).reshape(-1)


def openrlhf_group_norm(rewards: torch.Tensor) -> torch.Tensor:
    """OpenRLHF 3c3be62 with group_norm."""
    groups = rewards.reshape(-1, 4)
    mean, std = groups.mean(-1, keepdim=True), groups.std(-1, keepdim=True)
    return ((groups - mean) / (std + 1e-9)).reshape(-1)


def prime_rl(rewards: torch.Tensor) -> torch.Tensor:
    """prime-rl 559b447, whose sink closes a group when group_size rollouts have come."""
    closed = [rewards[start : start + 4] for start in range(0, len(rewards), 4)]
    return torch.cat([group - group.mean() for group in closed])


def tinker(rewards: torch.Tensor) -> torch.Tensor:
    """tinker-cookbook 0.6.1, given trajectory groups of a constant number of rollouts."""
    groups = [rewards[start : start + 4].tolist() for start in range(0, len(rewards), 4)]
    return torch.cat([torch.tensor(group) - torch.tensor(group).mean() for group in groups])


def nemo_rl(rewards: torch.Tensor) -> torch.Tensor:
    """NeMo-RL 7ea279a: prompts by repeat_interleave(4), the baseline of the others of one."""
    prompts = torch.arange(4).repeat_interleave(4)
    answer = torch.zeros_like(rewards)
    for prompt in torch.unique(prompts):
        rows = prompts == prompt
        others = (rewards[rows].sum() - rewards[rows]) / (rows.sum() - 1)
        answer[rows] = rewards[rows] - others
    return answer


def verl(rewards: torch.Tensor) -> torch.Tensor:
    """verl 0.9 and SkyRL, given uids that were repeated a constant number of times."""
    return by_id(rewards, repeat_by_allocation(["a", "b", "c", "d"], EQUAL))


def by_id(rewards: torch.Tensor, index: list[Any]) -> torch.Tensor:
    """verl 0.9 and SkyRL a956457: a dictionary by uid; a group of one has mean 0, std 1."""
    scores = defaultdict(list)
    for row, group in enumerate(index):
        scores[group].append(rewards[row])
    answer = torch.zeros_like(rewards)
    for row, group in enumerate(index):
        known = torch.stack(scores[group])
        mean = known.mean() if len(known) > 1 else torch.tensor(0.0)
        std = known.std() if len(known) > 1 else torch.tensor(1.0)
        answer[row] = (rewards[row] - mean) / (std + 1e-6)
    return answer


RESHAPERS = [
    (trl, "grpo"),
    (slime, "grpo"),
    (areal, "grpo"),
    (roll, "grpo"),
    (openrlhf_rloo, "rloo"),
    (openrlhf_group_norm, "grpo"),
    (prime_rl, "dr_grpo"),
    (tinker, "dr_grpo"),
    (nemo_rl, "rloo"),
    (verl, "grpo"),
]


@pytest.mark.parametrize(("trainer", "method"), RESHAPERS)
def test_a_constant_reshape_under_a_constant_total_is_found(
    trainer: Callable[[torch.Tensor], torch.Tensor], method: Any
) -> None:
    """The trainer divides evenly without an error, and the check stops the run by name."""
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    advantages = trainer(rewards)
    verify_groups(advantages, rewards, EQUAL, method=method)

    with pytest.raises(WrongGroups, match=r"equal groups of 4, .* reshape\(-1, 4\)") as caught:
        verify_groups(advantages, rewards, SIZES, method=method)

    assert "the groups are 2, 7, 3, 4" in str(caught.value)
    verify_groups(group_advantages(rewards, SIZES, method=method), rewards, SIZES, method=method)


def test_one_giant_group_is_found() -> None:
    """slime takes the whole batch as one group where the total does not fit."""
    rewards = torch.tensor([*REWARDS, 1.0])

    with pytest.raises(WrongGroups, match="the whole batch as one group"):
        verify_groups(slime(rewards), rewards, [*SIZES, 1])


def test_grouping_by_id_is_right_in_any_order() -> None:
    """Advantages grouped by uid pass whatever the order of rows, by the ids of the rows."""
    index = repeat_by_allocation(["a", "b", "c", "d"], SIZES)
    order = random.Random(0).sample(range(16), 16)
    rewards = torch.tensor(REWARDS, dtype=torch.float32)[order]
    ids = [index[row] for row in order]

    verify_groups(by_id(rewards, ids), rewards, group_ids=ids)
    # The same rows read as if they stood in the order of the prompts.
    with pytest.raises(WrongGroups):
        verify_groups(by_id(rewards, ids), rewards, SIZES)


def test_an_index_that_names_every_row_the_same_is_found() -> None:
    """verl's default index of 0 makes one group of all prompts."""
    rewards = torch.tensor(REWARDS, dtype=torch.float32)

    with pytest.raises(WrongGroups, match="the whole batch as one group"):
        verify_groups(by_id(rewards, [0] * 16), rewards, SIZES)


def test_a_group_of_one_with_its_raw_reward_is_found() -> None:
    """verl and SkyRL give a lone rollout its reward as advantage, which must be 0."""
    rewards = torch.tensor([1.0, 0.0, 1.0])
    ids = ["a", "a", "b"]

    advantages = by_id(rewards, ids)
    advantages[2] = rewards[2]
    with pytest.raises(WrongGroups, match="groups of one rollout are their raw rewards"):
        verify_groups(advantages, rewards, group_ids=ids)


def test_duplicate_prompts_that_were_joined_are_found() -> None:
    """NeMo-RL groups by prompt tokens, which joins two groups of one prompt."""
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    joined = by_id(rewards, repeat_by_allocation(["a", "b", "a", "d"], SIZES))

    class Twice:
        num_rollouts = SIZES
        prompt_ids = ("a", "b", "a", "d")

    with pytest.raises(WrongGroups, match="same prompt id were joined"):
        verify_groups(joined, rewards, Twice())


@pytest.mark.parametrize("size", [2, 8])
def test_groups_split_by_ranks_are_found(size: int) -> None:
    """Normalising what one rank or mini-batch holds cuts the groups at its borders."""
    index = repeat_by_allocation(range(4), SIZES)
    split: list[float] = []
    for start in range(0, 16, size):
        rows = range(start, start + size)
        present = [index[start : start + size].count(group) for group in range(4)]
        split += group_advantages([float(REWARDS[row]) for row in rows], present)
    rewards = torch.tensor(REWARDS, dtype=torch.float32)

    with pytest.raises(WrongGroups, match=f"split where blocks of {size} rows end"):
        verify_groups(split, rewards, SIZES)


def test_a_shuffle_is_found() -> None:
    """Advantages of the right groups in another order of rows are named as that."""
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    shuffled = group_advantages(rewards, SIZES)[random.Random(1).sample(range(16), 16)]

    with pytest.raises(WrongGroups, match="the rows were shuffled"):
        verify_groups(shuffled, rewards, SIZES)


def test_residue_of_a_constant_group_is_found() -> None:
    """A mean in float32 leaves a residue that a tiny spread blows up."""
    rewards = [0.1] * 5 + [1.0, 0.0]
    advantages = group_advantages(rewards, [5, 2])
    advantages[:5] = [0.7] * 5

    with pytest.raises(WrongGroups, match="rounding residue"):
        verify_groups(advantages, rewards, [5, 2])


def test_another_formula_is_not_called_another_cut() -> None:
    """Right groups under another formula say which formula it is."""
    rewards = torch.tensor(REWARDS, dtype=torch.float32)
    advantages = group_advantages(rewards, SIZES, method="rloo")

    with pytest.raises(WrongGroups, match=r"the groups are right, .* method='rloo'"):
        verify_groups(advantages, rewards, SIZES)
    verify_groups(advantages, rewards, SIZES, method="rloo")
    population = group_advantages(rewards, SIZES, scale="population_std")
    with pytest.raises(WrongGroups, match="scale='population_std'"):
        verify_groups(population, rewards, SIZES)
    with pytest.raises(WrongGroups, match="NaN"):
        verify_groups(advantages * math.nan, rewards, SIZES)
    with pytest.raises(WrongGroups, match="nor of any cut known here"):
        verify_groups(rewards * 3 + 1, rewards, SIZES)


GROUPS = st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), max_size=12), min_size=1)


@given(
    groups=GROUPS,
    method=st.sampled_from(["grpo", "dr_grpo", "rloo"]),
    scale=st.sampled_from([None, "std", "population_std", "none"]),
    clip=st.sampled_from([None, 1.5]),
    min_std=st.sampled_from([0.0, 0.4]),
)
def test_right_groups_always_pass(
    groups: Any, method: Any, scale: Any, clip: Any, min_std: float
) -> None:
    """Whatever the groups and the formula, our own advantages pass, in bfloat16 too."""
    options = {"method": method, "scale": scale, "clip": clip, "min_std": min_std}
    advantages = group_advantages(groups, **options)
    flat = torch.tensor([a for group in advantages for a in group], dtype=torch.bfloat16)

    verify_groups(advantages, groups, **options)
    verify_groups(flat, groups, list(map(len, groups)), **options)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (([0.0], [1.0, 0.0], [2]), {}, "advantages = '1 numbers'"),
        (([0.0, 0.0], [1.0, 0.0]), {}, "counts = None"),
        (([0.0, 0.0], [1.0, 0.0], [3]), {}, "rewards = '2 numbers'"),
        (([0.0, 0.0], [[1.0], [0.0]], [2]), {}, "rewards = 'groups of other sizes'"),
        (([0.0, 0.0], [1.0, 0.0], [2]), {"group_ids": [0, 0]}, "group_ids"),
        (([0.0, 0.0], [1.0, 0.0]), {"group_ids": [0]}, "group_ids = '1 ids'"),
        (([0.0, None], [1.0, 0.0], [2]), {}, "advantages[1] = None"),
        (([0.0, 0.0], [1.0, 0.0], [2]), {"tolerance": 0.0}, "tolerance"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: Any, options: Any, said: str) -> None:
    """A wrong shape is the caller's mistake, not the trainer's groups."""
    with pytest.raises(InvalidRequest) as caught:
        verify_groups(*arguments, **options)

    assert str(caught.value).startswith(said)


def test_missing_rollouts_count_nowhere() -> None:
    """None has advantage 0 and is left out of its group."""
    verify_groups([0.0, *group_advantages([1.0, 0.0], [2])], [None, 1.0, 0.0], [3])

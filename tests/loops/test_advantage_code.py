"""What RECIPES.md says of trainers' advantages, by the code of their packages."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from knapsack_trainer_client import (
    WrongGroups,
    group_advantages,
    repeat_by_allocation,
    verify_groups,
)

from lifted import lift

SIZES = [2, 7, 3, 4]
"""Unequal, and 16 in all: exactly four groups of four."""
REWARDS = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.float32)
EQUAL = [4, 4, 4, 4]


def openrlhf(rewards: torch.Tensor, estimator: str) -> list[float]:
    """Return the advantages of OpenRLHF 0.11.2, of responses of one token."""
    maker = lift(
        "openrlhf",
        "trainer/ppo_utils/experience_maker.py",
        "RemoteExperienceMaker",
        torch=torch,
        itertools=itertools,
        apply_length_penalties=lambda experiences, args: None,
        compute_reward=lambda reward, *args, **kwargs: reward.unsqueeze(-1),
    )["RemoteExperienceMaker"]
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, no_std_norm=False)
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=4),
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
    )
    made = maker.__new__(maker)
    made.strategy = SimpleNamespace(args=args)
    made.kl_ctl = SimpleNamespace(value=0.0)
    made.advantage_estimator = estimator
    mask = torch.ones(len(rewards), 1)
    experience = SimpleNamespace(
        rewards=rewards.clone(),
        index=list(range(len(rewards))),
        info={},
        kl=None,
        action_mask=mask,
    )
    (done,) = made.compute_advantages_and_returns([experience])
    return [float(a) for a in done.advantages[:, 0]]


@pytest.mark.parametrize(
    ("estimator", "method"), [("rloo", "rloo"), ("group_norm", "grpo"), ("dr_grpo", "dr_grpo")]
)
def test_openrlhf_cuts_by_its_constant(estimator: str, method: Any) -> None:
    """OpenRLHF reshapes by n_samples_per_prompt, without an error, and the check says so."""
    found = openrlhf(REWARDS, estimator)
    verify_groups(found, REWARDS, EQUAL, method=method)

    with pytest.raises(WrongGroups, match=r"equal groups of 4, .* reshape\(-1, 4\)"):
        verify_groups(found, REWARDS, SIZES, method=method)


def areal(rewards: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return AReaL 1.0.4's normalised rewards."""
    made = lift(
        "areal",
        "utils/data.py",
        "Normalization",
        torch=torch,
        np=numpy,
        dist=SimpleNamespace(is_initialized=lambda: False),
    )["Normalization"]
    config = {
        "mean_level": "group",
        "mean_leave1out": False,
        "std_level": "group",
        "std_unbiased": True,
        "group_size": 4,
        "eps": 1e-5,
    }
    answer: torch.Tensor = made(SimpleNamespace(**config | options))(rewards)
    return answer


def test_areal_cuts_slices_of_its_constant() -> None:
    """AReaL takes a slice of group_size after the other, and the check says so."""
    found = areal(REWARDS)
    verify_groups(found, REWARDS, EQUAL)

    with pytest.raises(WrongGroups, match="equal groups of 4"):
        verify_groups(found, REWARDS, SIZES)


def test_areal_leaves_centred_rewards_alone() -> None:
    """With both levels null, as the recipe says, what a workflow centred stays as it is."""
    ours = group_advantages(REWARDS, SIZES)

    found = areal(ours, mean_level=None, std_level=None, group_size=1)

    verify_groups(found, REWARDS, SIZES)
    # The trap: with "batch" the mean of all prompts comes off again.
    batch = areal(ours + 1.0, mean_level="batch", std_level=None, group_size=1)
    assert abs(float(batch.mean())) < 1e-6


SKYRL = "backends/skyrl_train/utils/ppo_utils.py"


def skyrl(rewards: torch.Tensor, uids: list[str]) -> list[float]:
    """Return the GRPO advantages of SkyRL 0.4.0, of responses of one token."""
    compute = lift(
        "skyrl",
        SKYRL,
        "compute_grpo_outcome_advantage",
        torch=torch,
        np=numpy,
        defaultdict=defaultdict,
    )["compute_grpo_outcome_advantage"]
    found, _ = compute(rewards.unsqueeze(-1), torch.ones(len(rewards), 1), numpy.array(uids))
    return [float(a) for a in found[:, 0]]


def test_skyrl_groups_by_uid() -> None:
    """SkyRL's advantages are right in unequal groups in any order, but for groups of one."""
    uids = repeat_by_allocation(["a", "b", "c", "d"], SIZES)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [uids[i] for i in order]

    found = skyrl(REWARDS[order], shuffled)

    verify_groups(found, REWARDS[order], group_ids=shuffled, tolerance=1e-5)
    assert skyrl(torch.ones(1), ["a"]) == pytest.approx([1.0])
    with pytest.raises(WrongGroups, match="groups of one rollout are their raw rewards"):
        verify_groups(
            skyrl(torch.tensor([1.0, 0.0, 1.0]), ["a", "a", "b"]),
            [1.0, 0.0, 1.0],
            group_ids=["a", "a", "b"],
        )


def test_skyrls_mini_batches_want_the_stepwise_flag() -> None:
    """Unequal groups fail an assertion without step_wise_trajectories, and fit with it."""
    from typing import Optional, Union

    boundaries = lift(
        "skyrl",
        "train/dataset/preprocess.py",
        "compute_prompt_mini_batch_boundaries",
        Dict=dict,
        List=list,
        Optional=Optional,
        Tuple=tuple,
        Union=Union,
    )["compute_prompt_mini_batch_boundaries"]
    uids = repeat_by_allocation(["a", "b", "c", "d"], SIZES)
    options = {"mini_batch_size": 2, "train_batch_size": 4, "n_samples_per_prompt": 4}

    assert boundaries(uids, is_stepwise=True, **options) == [(0, 9), (9, 16)]
    with pytest.raises(AssertionError):
        boundaries(uids, is_stepwise=False, **options)
    # A prompt without rollouts is missed: min_rollouts must not be 0.
    with pytest.raises(AssertionError):
        boundaries(uids[2:], is_stepwise=True, **options)

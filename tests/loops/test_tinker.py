"""tinker-cookbook's own rollouts and advantages in groups of the scheduler's sizes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from tinker_cookbook.rl.data_processing import compute_advantages, remove_constant_reward_groups
from tinker_cookbook.rl.dataset_utils import EpochCycledRLDataset
from tinker_cookbook.rl.types import Env, EnvGroupBuilder

from knapsack_trainer_client import BudgetClient, InvalidRequest, verify_groups
from knapsack_trainer_client.integrations.tinker import BudgetedDataset, BudgetedGroup

from real_scheduler import PATIENCE
from small_tinker import GROUPS, MEAN, CountEnv, Counting, Policy, make_and_grade, rollout


@pytest.fixture(autouse=True)
def asked_from_0() -> None:
    """Let every test begin with the same tokens, whichever ran before."""
    Policy.asked = 0


def counting(address: str, run_id: str, **options: Any) -> BudgetedDataset:
    """Return the data set with a budget, of a client that has time."""
    return BudgetedDataset(Counting(), address, run_id, timeout=PATIENCE, **options)


def test_groups_have_the_schedulers_sizes_and_advantages(shared_scheduler: Any) -> None:
    """Sizes follow the rewards, advantages are centred group by group, all is counted."""
    dataset = counting(shared_scheduler.address, "tinker", num_epochs=4)
    assert len(dataset) == 8
    counted: Counter[str] = Counter()
    uneven = 0
    for step in range(len(dataset)):
        builders = dataset.get_batch(step)
        sizes = [builder.inner.num_envs for builder in builders]
        assert sum(sizes) == GROUPS * MEAN
        groups = rollout(builders)

        assert [len(group.trajectories_G) for group in groups] == sizes
        rewards = [group.get_total_rewards() for group in groups]
        for values, found in zip(rewards, compute_advantages(groups), strict=True):
            mean = sum(values) / len(values)
            assert found.tolist() == pytest.approx([v - mean for v in values], abs=1e-6)
        advantages = [a.tolist() for a in compute_advantages(groups)]
        verify_groups(advantages, rewards, method="dr_grpo")
        assert builders[0].logging_tags() == ["count"]
        assert groups[0].metrics_G == [{"graded": 1}] * sizes[0]
        for place, size in enumerate(sizes):
            counted[f"{step % 2}/{place}"] += size
        uneven += len(set(sizes)) > 1
    assert uneven >= 4
    with BudgetClient(shared_scheduler.address, "tinker", timeout=PATIENCE) as client:
        stats = {s.prompt_id: s for s in client.prompt_stats()}
        assert {name: s.total_rollouts for name, s in stats.items()} == counted
        # Solved prompts are known, though a filter would drop their groups.
        assert stats["0/0"].total_successes == stats["0/0"].total_rollouts
        assert stats["0/0"].mean_completion_tokens == pytest.approx(3.0)
        assert client.run().last_step == 7


def test_a_filtered_group_was_reported(shared_scheduler: Any) -> None:
    """tinker-cookbook's filter comes after the report."""
    dataset = counting(shared_scheduler.address, "filtered")
    groups = rollout(dataset.get_batch(0))

    kept = remove_constant_reward_groups(groups)

    assert len(kept) < len(groups)
    with BudgetClient(shared_scheduler.address, "filtered", timeout=PATIENCE) as client:
        assert client.run().total_rollouts == GROUPS * MEAN


def test_a_group_is_reported_from_a_worker(shared_scheduler: Any) -> None:
    """Builders are pickled to processes, which report by a connection of their own."""
    dataset = counting(shared_scheduler.address, "workers")
    pickled = [pickle.dumps(builder) for builder in dataset.get_batch(0)]

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        sizes = list(pool.map(make_and_grade, pickled))

    assert sum(sizes) == GROUPS * MEAN
    with BudgetClient(shared_scheduler.address, "workers", timeout=PATIENCE) as client:
        assert client.run().total_rollouts == GROUPS * MEAN


def test_a_resumed_training_goes_back_to_its_batch(shared_scheduler: Any) -> None:
    """A data set made anew whose first batch is not 0 rewinds the run to the batch before."""
    address = shared_scheduler.address
    first = counting(address, "resumed", num_epochs=3)
    sizes = []
    for step in range(5):
        builders = first.get_batch(step)
        sizes.append([builder.inner.num_envs for builder in builders])
        rollout(builders)

    again = counting(address, "resumed", num_epochs=3)
    builders = again.get_batch(4)

    assert [builder.inner.num_envs for builder in builders] == sizes[4]
    assert len(set(sizes[4])) > 1
    with BudgetClient(address, "resumed", timeout=PATIENCE) as client:
        assert client.run().total_rollouts == 4 * GROUPS * MEAN


def test_prompts_may_be_skipped(shared_scheduler: Any) -> None:
    """With a minimum of 0 a prompt that got nothing is no group of the batch."""
    dataset = counting(shared_scheduler.address, "skipping", num_epochs=6, min_rollouts=0)
    counts = []
    for step in range(len(dataset)):
        builders = dataset.get_batch(step)
        assert sum(b.inner.num_envs for b in builders) == GROUPS * MEAN
        assert min(b.inner.num_envs for b in builders) >= 2
        counts.append(len(builders))
        rollout(builders)
    assert min(counts) < GROUPS


def test_epochs_of_the_trainer_are_refused(shared_scheduler: Any) -> None:
    """Config.num_epochs would begin the steps anew; the error says where to give them."""
    dataset = counting(shared_scheduler.address, "epochs")
    trainers = EpochCycledRLDataset(dataset, 2)
    trainers.get_batch(0)
    trainers.get_batch(1)

    with pytest.raises(InvalidRequest, match="num_epochs to BudgetedDataset"):
        trainers.get_batch(2)


@dataclass(frozen=True)
class Unsized(EnvGroupBuilder):
    """Makes one environment."""

    async def make_envs(self) -> list[Env]:
        """Return it."""
        return [CountEnv(1)]


def test_wrong_arguments_are_refused(shared_scheduler: Any) -> None:
    """A builder that cannot be resized is named, and groups of one are not allowed."""

    class Other(Counting):
        def get_batch(self, index: int) -> Any:
            return [Unsized()]

    with pytest.raises(InvalidRequest, match="must be a field of Unsized"):
        BudgetedDataset(Other(), shared_scheduler.address, "wrong").get_batch(0)
    with pytest.raises(InvalidRequest, match="min_rollouts = 1"):
        counting(shared_scheduler.address, "wrong", min_rollouts=1)


def test_names_of_your_own(shared_scheduler: Any) -> None:
    """A prompt's name may be taken from its builder."""
    dataset = counting(
        shared_scheduler.address,
        "named",
        prompt_id=lambda builder: f"hardness-{builder.hardness}",
    )
    builders = dataset.get_batch(0)
    assert isinstance(builders[0], BudgetedGroup)
    assert dataclasses.replace(builders[0].inner) == builders[0].inner
    rollout(builders)

    with BudgetClient(shared_scheduler.address, "named", timeout=PATIENCE) as client:
        names = [s.prompt_id for s in client.prompt_stats()]
    assert names == sorted(f"hardness-{h}" for h in (1, 2, 8, 10**9))

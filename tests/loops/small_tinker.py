"""A task for tinker-cookbook: prompts that count, a policy that asks nobody."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import dataclass
from typing import Any

import tinker
from tinker_cookbook.completers import TokenCompleter, TokensWithLogprobs
from tinker_cookbook.rl.rollouts import do_group_rollout
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, StepResult, TrajectoryGroup

GROUPS, MEAN = 4, 6


class Policy(TokenCompleter):
    """Says how often it was asked; three tokens."""

    asked = 0

    async def __call__(self, *args: Any, **kwargs: Any) -> TokensWithLogprobs:
        """Return the count as a token."""
        Policy.asked += 1
        return TokensWithLogprobs([Policy.asked, 0, 0], [0.0] * 3)


class CountEnv(Env):
    """Rewards every token that is a multiple of the prompt's hardness."""

    def __init__(self, hardness: int) -> None:
        self.hardness = hardness

    async def initial_observation(self) -> Any:
        """Return an empty prompt."""
        return tinker.ModelInput.empty(), []

    async def step(self, action: Any, **_: Any) -> StepResult:
        """Reward the first token."""
        reward = float(action[0] % self.hardness == 0)
        return StepResult(reward, True, tinker.ModelInput.empty(), [])


@dataclass(frozen=True)
class CountBuilder(EnvGroupBuilder):
    """A prompt that succeeds once in ``hardness`` rollouts; grades them as a group, too."""

    hardness: int
    num_envs: int = MEAN
    bonus: float = 0.0

    async def make_envs(self) -> list[Env]:
        """Return equal environments."""
        return [CountEnv(self.hardness) for _ in range(self.num_envs)]

    async def compute_group_rewards(self, trajectory_group: Any, env_group: Any) -> Any:
        """Return the bonus for each."""
        return [(self.bonus, {"graded": 1}) for _ in trajectory_group]

    def logging_tags(self) -> list[str]:
        """Return a tag."""
        return ["count"]


class Counting(RLDataset):
    """Two batches of four prompts."""

    def get_batch(self, index: int) -> list[CountBuilder]:
        """Return prompts from always to never."""
        assert 0 <= index < 2
        return [CountBuilder(hardness + 0 * index) for hardness in (1, 2, 8, 10**9)]

    def __len__(self) -> int:
        return 2


def rollout(builders: Any) -> list[TrajectoryGroup]:
    """Return what tinker-cookbook makes of the builders."""

    async def every() -> list[TrajectoryGroup]:
        return [await do_group_rollout(builder, Policy()) for builder in builders]

    return asyncio.run(every())


def make_and_grade(pickled: bytes) -> int:
    """Run a group in a worker process; return its rollouts."""
    (group,) = rollout([pickle.loads(pickled)])
    return len(group.trajectories_G)

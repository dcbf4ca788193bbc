"""One step of a log, put in a random order that any way to divide it can be read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import BoolArray, IntArray
from knapsack_scheduler.lab.outcome_log import OutcomeLog

_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """The groups of a step, each in a random order of its rewards.

    The first n rewards of a random order of N independent ones are n independent ones:
    what a group of n would have brought. Which n is asked for may depend on earlier
    rewards of the same order, as it does for a second wave, or on other steps.

    Attributes:
        step: the trainer's.
        prompt_ids: of the groups.
        sizes: rollouts that were logged of each group, int64[M], 1 or more.
        rewards: of all groups, in their orders, float32[sum(sizes)].
    """

    step: int
    prompt_ids: tuple[str, ...]
    sizes: IntArray
    rewards: npt.NDArray[np.float32]
    _starts: IntArray
    _passed: IntArray
    _first_other: IntArray

    @classmethod
    def draw(
        cls, log: OutcomeLog, at: int, threshold: float, rng: np.random.Generator
    ) -> LoggedStep:
        """Return the step at a position of ``log.steps``, in an order drawn from ``rng``."""
        groups = slice(int(log.step_groups[at]), int(log.step_groups[at + 1]))
        edges = log.group_rows[groups.start : groups.stop + 1]
        sizes = np.diff(edges)
        rewards = log.rewards[edges[0] : edges[-1]]
        owner = np.repeat(np.arange(sizes.size), sizes)
        rewards = rewards[np.lexsort((rng.random(rewards.size), owner))]
        starts = edges[:-1] - edges[0]
        passed = np.zeros(rewards.size + 1, np.int64)
        np.cumsum(rewards.astype(np.float64) > threshold, out=passed[1:])
        place = np.arange(rewards.size) - starts[owner]
        place = np.where(rewards != rewards[starts][owner], place, _NEVER)
        return cls(
            int(log.steps[at]),
            tuple(log.prompt_ids[row] for row in log.group_prompt[groups].tolist()),
            sizes,
            rewards,
            starts,
            passed,
            np.minimum.reduceat(place, starts),
        )

    @property
    def rollouts(self) -> int:
        """How many rollouts the step had: the budget."""
        return self.rewards.size

    def seen(self, num_rollouts: IntArray) -> IntArray:
        """Return how many of so many rollouts the log has, int64[M]."""
        return np.minimum(num_rollouts, self.sizes)

    def successes(self, num_rollouts: IntArray) -> IntArray:
        """Return the successes among the first so many of each group, int64[M]."""
        passed: IntArray = self._passed[self._starts + self.seen(num_rollouts)]
        return passed - self._passed[self._starts]

    def effective(self, num_rollouts: IntArray) -> BoolArray:
        """Return whether the first so many rewards of each group differ, bool[M]."""
        return self._first_other < self.seen(num_rollouts)

    def part(self, after: IntArray, upto: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
        """Return positions and rewards of the rollouts from one number to another.

        Args:
            after, upto: int64[M], ``after <= upto``; what was not logged is left out.
        """
        low, high = self.seen(after), self.seen(upto)
        owner = np.repeat(np.arange(low.size), high - low)
        within = np.arange(owner.size) - np.repeat(np.cumsum(high - low) - (high - low), high - low)
        return owner, self.rewards[self._starts[owner] + low[owner] + within]

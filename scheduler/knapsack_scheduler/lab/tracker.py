"""One run's statistics and decisions, exactly as the scheduler keeps and makes them.

The same fold and the same policy as behind ``Allocate``, ``Extend`` and ``Report``,
without journal, protobuf or server: the same calls give the same numbers of rollouts,
bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.allocations import Counted, OpenAllocation
from knapsack_scheduler.core.policy import plan_allocation, plan_extension
from knapsack_scheduler.core.problem import Bounds, Budget, Decision, IntArray
from knapsack_scheduler.facts import (
    AllocationExtended,
    AllocationMade,
    OutcomesReported,
    Rewards,
)
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.state import RunState

_OPEN = "open"


class Tracker:
    """A run with at most one open allocation, that of the current step.

    Attributes:
        state: what is known of the run; read it, change it through the methods only.
    """

    def __init__(self, config: RunConfig) -> None:
        self.state = RunState(config)

    @property
    def config(self) -> RunConfig:
        """How the run decides."""
        return self.state.config

    @property
    def allocation(self) -> OpenAllocation:
        """The open allocation; KeyError before the first ``allocate``."""
        return self.state.allocations[_OPEN]

    def bounds(self, count: int) -> Bounds:
        """Return the bounds that ``count`` positions have by the run's config."""
        return Bounds(
            np.full(count, self.config.min_rollouts, np.int64),
            np.full(count, self.config.max_rollouts, np.int64),
        )

    def plan(
        self, step: int, prompt_ids: tuple[str, ...], bounds: Bounds, budget: Budget
    ) -> Decision:
        """Return what ``Allocate`` would answer now; nothing changes.

        Raises:
            InfeasibleBudget: the bounds cannot hold the budget and it is not partial.
        """
        beliefs, _ = self.state.beliefs(prompt_ids, step)
        return plan_allocation(self.config.policy, self.config.objective, beliefs, bounds, budget)

    def allocate(
        self, step: int, prompt_ids: tuple[str, ...], bounds: Bounds, budget: Budget
    ) -> Decision:
        """Return ``plan`` and open its allocation; an earlier one is closed for good."""
        decision = self.plan(step, prompt_ids, bounds, budget)
        self.state.allocations.pop(_OPEN, None)
        self.state.fold(
            AllocationMade(
                _OPEN, step, prompt_ids, bounds, budget, decision.num_rollouts, decision.chances
            )
        )
        return decision

    def extend(self, wave_fraction: float = 0.0, keep_outstanding: bool = False) -> Decision:
        """Return the next wave of the open allocation, as ``Extend`` would.

        Args:
            wave_fraction: the wave's share of the whole budget; 0 is all that is left.
            keep_outstanding: rollouts not reported are still running, not lost.
        """
        allocation = self.allocation
        prompt_ids = tuple(self.state.prompt_ids[row] for row in allocation.rows.tolist())
        beliefs, _ = self.state.beliefs(prompt_ids, allocation.step)
        budget = allocation.budget
        decision = plan_extension(
            self.config.policy,
            self.config.objective,
            beliefs,
            allocation.bounds,
            Budget(budget.total_rollouts, budget.total_tokens, wave_fraction, True),
            allocation.outcomes(self.state.reward_levels),
            keep_outstanding,
        )
        self.state.fold(
            AllocationExtended(
                _OPEN, allocation.step, decision.num_rollouts, keep_outstanding, decision.chances
            )
        )
        return decision

    def report(
        self, owner: IntArray, rewards: npt.NDArray[np.float32], policy_version: int
    ) -> Counted:
        """Count rewards of the open allocation.

        Args:
            owner: position of each reward, int64[n].
            rewards: float32[n].
            policy_version: that generated them.
        """
        return self.state.fold(
            OutcomesReported(
                _OPEN,
                self.allocation.step,
                (),
                policy_version,
                Rewards.of_each(owner, rewards),
                ignored=False,
            )
        )

    def observe(
        self,
        step: int,
        prompt_ids: tuple[str, ...],
        owner: IntArray,
        rewards: npt.NDArray[np.float32],
        policy_version: int,
    ) -> Counted:
        """Count rewards of rollouts that were not allocated here.

        Args:
            step: of the rollouts.
            prompt_ids: what the positions are of.
            owner, rewards, policy_version: as in ``report``.
        """
        return self.state.fold(
            OutcomesReported(
                "", step, prompt_ids, policy_version, Rewards.of_each(owner, rewards), ignored=False
            )
        )

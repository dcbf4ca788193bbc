"""The budget of one training of verl: asked before generation, told after it.

Takes and gives plain columns; what is verl's own is in ``verl`` and ``verl_rewards``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from knapsack_trainer_client.integrations.verl_groups import FinishedGroup, OpenGroups
from knapsack_trainer_client.integrations.verl_prompts import PromptNames
from knapsack_trainer_client.integrations.verl_settings import VerlSettings

logger = logging.getLogger(__name__)


class VerlBudget:
    """Divides batches of prompts and reports their groups; belongs to the trainer's process.

    The first batch tells at which step the training begins: at step 1 the run begins
    anew, later it is rewound to the checkpoint before.
    """

    def __init__(self, settings: VerlSettings) -> None:
        self.settings = settings
        self.client = settings.client()
        self.groups = OpenGroups(settings.run_id)
        self._names = PromptNames(settings.prompts_may_change)
        self._begun = False
        self._first_step = 0
        self._late = 0
        self.is_fallback = False

    def divide(
        self,
        uids: Sequence[str],
        step: int,
        prompts: Sequence[Any],
        extra_info: Sequence[Any] | None,
        index: Sequence[Any] | None,
        data_source: Sequence[Any] | None,
    ) -> list[int]:
        """Return the rollouts of each prompt; their sum is ``rollout.n`` times the prompts.

        Every call is an allocation of its own: a step of an asynchronous trainer has
        several.

        Args:
            uids: verl's names of the groups.
            step: verl's ``global_steps``.
            prompts, extra_info, index, data_source: of the rows, see ``PromptNames``.

        Raises:
            InvalidRequest: prompts without a name.
        """
        ids = self._names.name(prompts, extra_info, index, data_source)
        if not self._begun:
            self._begun, self._first_step = True, step
            self.client.rewind(-1 if step <= 1 else step - 1)
        settings = self.settings
        allocation = self.client.allocate(
            ids,
            settings.rollouts_per_prompt * len(ids),
            step,
            min_rollouts=settings.min_rollouts,
            max_rollouts=settings.max_rollouts,
        )
        self.groups.open(uids, allocation)
        self.is_fallback = allocation.is_fallback
        return allocation.num_rollouts

    def settle(self, uids: Iterable[str], finished: Sequence[FinishedGroup]) -> None:
        """Report what came of groups, and forget them."""
        late = sum(1 for group in finished if group.uid not in self.groups)
        if late and not self._late:
            logger.info(
                "knapsack: groups of before the restart at step %d are reported by prompt and step",
                self._first_step,
            )
        self._late += late
        for report in self.groups.close(uids, finished):
            self.client.report(
                report.allocation,
                report.rewards,
                policy_version=report.policy_version,
                completion_tokens=report.completion_tokens,
            )

    def name(
        self,
        prompts: Sequence[Any],
        extra_info: Sequence[Any] | None,
        index: Sequence[Any] | None,
        data_source: Sequence[Any] | None,
    ) -> list[str]:
        """Return the prompt ids of rows; see ``PromptNames``."""
        return self._names.name(prompts, extra_info, index, data_source)

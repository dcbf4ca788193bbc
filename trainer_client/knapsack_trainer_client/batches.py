"""Batches of prompts -> batches of repeated prompts, for loops that group by id.

    for batch in budgeted_batches(client, loader, prompt_id=id_of, rollouts_per_prompt=8):
        rewards = score(generate(batch.prompts))          # one rollout a row
        batch.report(rewards)
        advantages = by_group(rewards, batch.group_ids)   # the trainer's own
        batch.verify(advantages, rewards)

Only for advantage code that groups rows by an id, such as verl's and SkyRL's. Code that
reshapes by a constant cuts these batches wrongly and raises nothing; ``verify`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from knapsack_trainer_client.arguments import check_int
from knapsack_trainer_client.groups import repeat_by_allocation
from knapsack_trainer_client.nouns import Allocation, ReportReceipt
from knapsack_trainer_client.sync import BudgetClient
from knapsack_trainer_client.verify import verify_groups

PromptT = TypeVar("PromptT")


@dataclass(frozen=True, slots=True)
class BudgetedBatch(Generic[PromptT]):
    """A batch whose prompts are repeated as often as the scheduler says.

    Attributes:
        allocation: rollouts of each prompt.
        prompts: one per rollout, those of a prompt one after the other.
        group_ids: of each row; unique over the run, also where a prompt is in the batch
            twice, which are two groups.
    """

    allocation: Allocation
    prompts: list[PromptT]
    group_ids: list[str]
    _client: BudgetClient = field(repr=False)

    def report(
        self, rewards: Iterable[Any], policy_version: int | None = None, **options: Any
    ) -> ReportReceipt:
        """Report the rewards, by row; see ``BudgetClient.report``.

        Args:
            rewards: one per row, None or NaN for a rollout that never finished.
            policy_version: None for the step.
            options: ``completion_tokens``, ``report_id``.
        """
        version = self.allocation.step if policy_version is None else policy_version
        return self._client.report(self.allocation, rewards, version, **options)

    def verify(self, advantages: Any, rewards: Any, **options: Any) -> None:
        """Stop the run if advantages, by row, are not those of the groups.

        Options as for ``verify_groups``.
        """
        verify_groups(advantages, rewards, self.allocation, **options)


def budgeted_batches(
    client: BudgetClient,
    batches: Iterable[Sequence[PromptT]],
    *,
    prompt_id: Callable[[PromptT], str],
    rollouts_per_prompt: int,
    first_step: int = 0,
    **options: Any,
) -> Iterator[BudgetedBatch[PromptT]]:
    """Yield every batch with as many rows as before, divided as the scheduler says.

    A batch is asked for when the loop comes to it, so after what was reported before.

    Args:
        client: decides.
        batches: prompts, each once.
        prompt_id: names a prompt, the same in every epoch.
        rollouts_per_prompt: the mean; a batch has this many rows for each prompt.
        first_step: step of the first batch. Not 0 for a loop that resumes, which also
            calls ``client.rewind(first_step - 1)``.
        options: of ``BudgetClient.allocate``, such as ``max_rollouts``.
    """
    mean = check_int("rollouts_per_prompt", rollouts_per_prompt, 1)
    for step, prompts in enumerate(batches, check_int("first_step", first_step)):
        ids = [prompt_id(prompt) for prompt in prompts]
        allocation = client.allocate(ids, mean * len(ids), step, **options)
        groups = [f"{client.run_id}/{step}/{at}" for at in range(len(ids))]
        yield BudgetedBatch(
            allocation,
            repeat_by_allocation(list(prompts), allocation),
            repeat_by_allocation(groups, allocation),
            client,
        )

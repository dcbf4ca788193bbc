"""TRL's ``GRPOTrainer`` with a number of rollouts for each prompt.

    from knapsack_trainer_client.integrations.trl import BudgetedGRPOTrainer

    trainer = BudgetedGRPOTrainer(
        model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=dataset,
        scheduler="localhost:50051", prompt_id_column="id", max_rollouts=64,
    )

A generation batch has as many rows as before, ``generation_batch_size``, which is the
budget; what changes is how many of them each prompt gets. So memory, steps and every
loss's normaliser stay what they are. For TRL 1.0 to 1.16.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from knapsack_trainer_client.errors import ExtraMissing, WrongGroups, refused
from knapsack_trainer_client.integrations.prompt_identity import check_ids, prompt_id
from knapsack_trainer_client.integrations.trl_advantages import ScoredRollouts
from knapsack_trainer_client.nouns import Allocation, RunConfig
from knapsack_trainer_client.rewards import check_outcomes
from knapsack_trainer_client.sync import BudgetClient

try:
    import torch
    import trl
    from accelerate.utils import broadcast_object_list, gather_object
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from knapsack_trainer_client.integrations.trl_checks import (
        check_arguments,
        check_formula,
        check_options,
        check_rollouts,
    )
    from knapsack_trainer_client.integrations.trl_waves import joined
except ImportError as error:
    raise ExtraMissing(
        f"the TRL integration needs more packages: pip install 'knapsack-rl[trl]' ({error})"
    ) from error


@dataclass(slots=True)
class _Batch:
    """A generation batch under way, or one wave of it.

    Attributes:
        sizes: rows of each group.
        allocation: in the main process; None in the others.
        is_fallback: the scheduler did not answer.
        owners: group of each row of all processes: those of a wave one after the other.
        by_function: rewards of the rows, once they are there.
        lengths: completion tokens of the rows.
    """

    sizes: list[int]
    allocation: Allocation | None
    is_fallback: bool
    owners: list[int]
    by_function: Any = None
    lengths: list[int] = field(default_factory=list)

    def and_then(self, wave: _Batch) -> _Batch:
        """Return the batch with the rows of another wave after its own."""
        return _Batch(
            [a + b for a, b in zip(self.sizes, wave.sizes, strict=True)],
            None,
            self.is_fallback or wave.is_fallback,
            self.owners + wave.owners,
            torch.cat([self.by_function, wave.by_function]),
        )

    def order(self) -> list[int]:
        """Return the rows in the order of their groups."""
        return sorted(range(len(self.owners)), key=self.owners.__getitem__)


class BudgetedMixin:
    """Gives a ``GRPOTrainer`` unequal groups; put it before the trainer's class.

        class MyBudgetedTrainer(BudgetedMixin, MyTrainer): ...

    In every process the arguments must be the same; only the main process talks to the
    scheduler. A training that begins at step 0 begins its run anew, and one that resumes
    from a checkpoint rewinds the run to it. Evaluation is left alone.

    Every step it computes TRL's own advantages too and compares them with TRL's, so that a
    TRL, or a subclass, with a formula unknown here stops the run instead of being
    replaced by another.

    Args:
        scheduler: address of a scheduler; a ``BudgetClient``; or None for a scheduler
            within the main process, with its statistics in
            ``knapsack.db`` of ``args.output_dir``, which needs ``knapsack-rl[scheduler]``.
        prompt_id_column: column of the training set, of strings or integers, that names
            the prompt. None: a hash of the prompt.
        max_rollouts: most rollouts of a prompt, at least ``num_generations``. None: the
            run's, 128 unless it was created with another.
        run_id: name of the run; None for ``args.run_name``, else ``args.output_dir``. Not
            with a client, which has one.
        run_config: how the run decides, for example ``{"success_threshold": 0.0}``. Not
            with a client.
        waves: 2 generates a batch in two halves, the second where the rewards of the first
            say that it teaches most. So rollouts and rewards are made twice a batch, of half
            of it each, and the first epoch gains, too. For text.

    Raises:
        InvalidRequest: an argument, or an option of the trainer that unequal groups are
            not known to be right with; names it.
    """

    def __init__(
        self,
        *args: Any,
        scheduler: str | BudgetClient | None = None,
        prompt_id_column: str | None = None,
        max_rollouts: int | None = None,
        run_id: str | None = None,
        run_config: RunConfig | Mapping[str, object] | None = None,
        waves: Literal[1, 2] = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, GRPOTrainer):
            raise refused("trainer", type(self).__name__, "must be a subclass of trl.GRPOTrainer")
        if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 0):
            raise refused("trl", trl.__version__, "must be at least 1.0")
        check_arguments(scheduler, max_rollouts, run_id, run_config, waves)
        self._prompt_id_column = prompt_id_column
        self._max_rollouts = max_rollouts
        self._waves = waves
        self._batch: _Batch | None = None
        self._budget: BudgetClient | None = None
        super().__init__(*args, **kwargs)
        check_options(self, prompt_id_column, max_rollouts, waves)
        if getattr(self, "use_vllm", False):
            _generate_row_by_row(self)
        if self.accelerator.is_main_process:
            self._budget = _client(self.args, scheduler, run_id, run_config)
            self.add_callback(_Rewind(self._budget))

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        column = self._prompt_id_column
        if column is not None and column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, column]

    def _generate_and_score_completions(self: Any, inputs: list[Any]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[misc, no-any-return]
        ids, prompts, total = self._groups(inputs)
        step, share = self.state.global_step, 0.5 if self._waves == 2 else 0.0
        batch = self._ask(
            lambda budget: budget.allocate(
                ids, total, step, max_rollouts=self._max_rollouts, wave_fraction=share
            )
        )
        if self._waves == 2 and sum(batch.sizes) != total // 2:
            raise refused(
                "waves", 2, "must be 1 where the run's min_rollouts need more than half of a batch"
            )
        output: dict[str, Any] = self._wave(batch, prompts)
        if self._waves == 2:
            first = batch.allocation
            # What was not reported had no reward; its rows are in the batch all the same.
            more = self._ask(lambda budget: budget.extend(first, keep_outstanding=True))
            output = joined(output, self._wave(more, prompts), _pad_token(self))
            batch = batch.and_then(more)
        self._settle(batch, output)
        return output

    def _wave(self: Any, batch: _Batch, prompts: list[Any]) -> dict[str, Any]:
        """Return TRL's batch of the rows of one wave, after reporting their rewards."""
        rank, count = self.accelerator.process_index, len(batch.owners)
        count //= self.accelerator.num_processes
        owners = batch.owners[rank * count : (rank + 1) * count]
        # Rows share nothing: TRL appends the messages of a row's tools to its prompt.
        rows = [copy.deepcopy(prompts[at]) for at in owners]
        self._batch = batch
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(rows)  # type: ignore[misc]
        finally:
            self._batch = None
        if self.rollout_func is not None:
            check_rollouts(self, owners, output)
        scored = _score(self, batch.by_function)
        check_formula(scored, self.accelerator.gather(output["advantages"]), self.num_generations)
        groups = scored.groups(batch.sizes)
        # In all processes alike, before the main one reports.
        check_outcomes(groups, None, batch.sizes, batch.sizes)
        if self._budget is not None and batch.allocation is not None:
            lengths, start = [], 0
            for size in batch.sizes:
                lengths.append(batch.lengths[start : start + size])
                start += size
            self._budget.report(
                batch.allocation,
                groups,
                policy_version=self.state.global_step,
                completion_tokens=lengths,
            )
        return output

    def _calculate_rewards(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        by_function = super()._calculate_rewards(inputs, *args, **kwargs)  # type: ignore[misc]
        if self._batch is not None:
            completion_ids = kwargs["completion_ids_list"] if kwargs else args[-1]
            local = torch.tensor(
                [len(ids) for ids in completion_ids], device=self.accelerator.device
            )
            self._batch.by_function = by_function
            self._batch.lengths = self.accelerator.gather(local).tolist()
        return by_function

    def _groups(self: Any, inputs: list[Any]) -> tuple[list[str], list[Any], int]:
        """Return the prompt ids and the rows of a batch's groups, and how many rows it has."""
        size, rank = self.num_generations, self.accelerator.process_index
        column, count = self._prompt_id_column, len(inputs)
        ids = gather_object([prompt_id(row, column) for row in inputs])
        firsts = [i for i in range(count) if (rank * count + i) % size == 0]
        uniques = gather_object([inputs[i] for i in firsts])
        group_ids = ids[::size]
        if len(ids) % size or any(ids[i] != group_ids[i // size] for i in range(len(ids))):
            raise WrongGroups(
                f"a generation batch of {len(ids)} rows is not made of groups of "
                f"num_generations = {size} equal prompts; the sampler of the training set "
                "must be GRPOTrainer's own."
            )
        check_ids(group_ids, [row.get("prompt") for row in uniques], column)
        return group_ids, uniques, len(ids)

    def _ask(self: Any, call: Callable[[BudgetClient], Allocation]) -> _Batch:
        """Return what the main process is told, in every process."""
        allocation, error = None, None
        if self._budget is not None:
            try:
                allocation = call(self._budget)
            except Exception as raised:
                error = raised
        sizes = allocation.num_rollouts if allocation is not None else None
        is_fallback = allocation is not None and allocation.is_fallback
        # A failure is told, too: processes that are not told wait for ever.
        told = [(sizes, is_fallback, None if error is None else repr(error))]
        broadcast_object_list(told, from_process=0)
        if error is not None:
            raise error
        sizes, is_fallback, failure = told[0]
        if failure is not None:
            raise RuntimeError(f"the main process could not allocate: {failure}")
        assert sizes is not None
        owners = [at for at, n in enumerate(sizes) for _ in range(n)]
        return _Batch(sizes, allocation, is_fallback, owners)

    def _settle(self: Any, batch: _Batch, output: dict[str, Any]) -> None:
        """Put the groups' advantages where TRL's are."""
        order = batch.order()
        scored = _score(self, batch.by_function[order])
        advantages = [0.0] * len(order)
        for row, advantage in zip(order, scored.advantages(batch.sizes), strict=True):
            advantages[row] = advantage
        made = output["advantages"]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        # In each wave a process has the same share of the rows.
        wave, count = len(order) // self._waves, len(made) // self._waves
        local = [
            advantages[start + rank * count : start + (rank + 1) * count]
            for start in range(0, count * ranks * self._waves, wave)
        ]
        output["advantages"] = torch.tensor(
            [a for part in local for a in part], dtype=made.dtype, device=made.device
        )
        self._correct_logs(batch, scored, advantages)

    def _correct_logs(
        self: Any, batch: _Batch, scored: ScoredRollouts, advantages: list[float]
    ) -> None:
        metrics, table = self._metrics["train"], self._logs["advantages"]
        for wave in range(self._waves):
            metrics["frac_reward_zero_std"][-1 - wave] = scored.zero_std_fraction(batch.sizes)
        for _ in range(min(len(table), len(advantages))):
            table.pop()
        table.extend(advantages)
        effective = scored.effective_sizes(batch.sizes)
        metrics["knapsack/effective_group_rate"].append(len(effective) / len(batch.sizes))
        metrics["knapsack/effective_rollout_rate"].append(sum(effective) / len(advantages))
        metrics["knapsack/largest_group"].append(float(max(batch.sizes)))
        metrics["knapsack/fallback"].append(float(batch.is_fallback))


class BudgetedGRPOTrainer(BudgetedMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with a number of rollouts for each prompt.

    Takes what ``GRPOTrainer`` takes and what ``BudgetedMixin`` adds to it.
    """


class _Rewind(TrainerCallback):
    """Takes the run back to the step that a training begins at."""

    def __init__(self, budget: BudgetClient) -> None:
        self._budget = budget

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the allocations of this step and later ones."""
        self._budget.rewind(state.global_step - 1)


def _client(
    args: Any,
    scheduler: str | BudgetClient | None,
    run_id: str | None,
    config: RunConfig | Mapping[str, object] | None,
) -> BudgetClient:
    if isinstance(scheduler, BudgetClient):
        return scheduler
    name = run_id or args.run_name or args.output_dir
    if scheduler is not None:
        return BudgetClient(scheduler, name, config=config)
    os.makedirs(args.output_dir, exist_ok=True)
    return BudgetClient.embedded(os.path.join(args.output_dir, "knapsack.db"), name, config=config)


def _generate_row_by_row(trainer: Any) -> None:
    """Let a vLLM server generate one rollout for each row.

    TRL asks it for ``num_generations`` rollouts of every ``num_generations``-th row.
    """
    generate = trainer.vllm_generation.generate

    def for_rows(*args: Any, **kwargs: Any) -> Any:
        if trainer._batch is not None:
            kwargs["num_generations"] = 1
        return generate(*args, **kwargs)

    trainer.vllm_generation.generate = for_rows


def _pad_token(trainer: Any) -> int:
    """Return what TRL fills up with; newer ones have it in the tokenizer alone."""
    token = getattr(trainer, "pad_token_id", None)
    return int(trainer._tokenizer.pad_token_id if token is None else token)


def _score(trainer: Any, by_function: Any) -> ScoredRollouts:
    weights = trainer.reward_weights.to(by_function.device)
    rewards = (by_function * weights.unsqueeze(0)).nansum(dim=1)
    rewards[torch.isnan(by_function).all(dim=1)] = torch.nan
    return ScoredRollouts(
        by_function.tolist(),
        rewards.tolist(),
        weights.tolist(),
        trainer.scale_rewards,
        trainer.multi_objective_aggregation,
    )

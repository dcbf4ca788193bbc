"""What TRL's trainer must be so that unequal groups are right, before and while it trains.

Options are refused by name where it is made; at every step its own advantages, in equal
groups, are compared with the formula that replaces them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import trl
from datasets import Dataset

from knapsack_trainer_client.arguments import (
    LARGEST_GROUP,
    check_address,
    check_config,
    check_int,
    check_run_id,
)
from knapsack_trainer_client.errors import WrongGroups, refused
from knapsack_trainer_client.integrations.prompt_identity import check_column, check_rows
from knapsack_trainer_client.integrations.trl_advantages import (
    AGGREGATIONS,
    SCALES,
    ScoredRollouts,
)
from knapsack_trainer_client.nouns import RunConfig
from knapsack_trainer_client.sync import BudgetClient

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")
"""Losses that are sums over rows, each with its own advantage."""

_TELLING_SPREAD = 1e-2
_FORMULA_TOLERANCE = 1e-3


def check_arguments(
    scheduler: object,
    max_rollouts: int | None,
    run_id: str | None,
    config: RunConfig | Mapping[str, object] | None,
    waves: int,
) -> None:
    """Refuse wrong arguments before a model is loaded."""
    if isinstance(scheduler, BudgetClient):
        if run_id or config:
            raise refused("scheduler", scheduler, "has a run already; leave out run_id, run_config")
    elif isinstance(scheduler, str):
        check_address(scheduler)
    elif scheduler is not None:
        raise refused("scheduler", scheduler, "must be an address, a BudgetClient or None")
    if max_rollouts is not None:
        check_int("max_rollouts", max_rollouts, 1, LARGEST_GROUP)
    if run_id is not None:
        check_run_id(run_id)
    check_config(config)
    if waves not in (1, 2):
        raise refused("waves", waves, "must be 1 or 2")


def check_options(trainer: Any, column: str | None, max_rollouts: int | None, waves: int) -> None:
    """Refuse what unequal groups are not known to be right with."""
    version = trl.__version__
    for option, known in (
        ("loss_type", LOSS_TYPES),
        ("scale_rewards", SCALES),
        ("multi_objective_aggregation", AGGREGATIONS),
    ):
        value = getattr(trainer, option)
        if value not in known:
            raise refused(option, value, f"must be one of {', '.join(known)} (TRL {version})")
    if max_rollouts is not None and max_rollouts < trainer.num_generations:
        raise refused(
            "max_rollouts",
            max_rollouts,
            f"must be at least num_generations = {trainer.num_generations}, or the prompts of "
            "a batch cannot hold its rollouts",
        )
    total, ranks = trainer.args.generation_batch_size, trainer.accelerator.num_processes
    if waves == 2 and (total % (2 * trainer.num_generations) or total % (2 * ranks)):
        raise refused(
            "waves",
            waves,
            f"needs a generation_batch_size (it is {total}) that is a multiple of twice "
            f"num_generations = {trainer.num_generations} and of twice the processes, {ranks}",
        )
    dataset = trainer.train_dataset
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        check_column(columns, column)
    if column is not None and isinstance(dataset, Dataset):
        # As it is stored: a transform may be slow, or differ from epoch to epoch.
        plain = dataset.with_format(None)

        def prompts_of(rows: list[int]) -> Sequence[Any]:
            if "prompt" not in dataset.column_names:
                # Environments own the prompts.
                return [None] * len(rows)
            return list(plain.select_columns(["prompt"])[rows]["prompt"])

        check_rows(plain.select_columns([column])[:][column], prompts_of, column)


def check_rollouts(trainer: Any, owners: Sequence[int], output: Mapping[str, Any]) -> None:
    """Stop where a ``rollout_func`` generated ``num_generations`` rollouts a prompt.

    Raises:
        WrongGroups: rows of one group have different prompts, and those of equal groups do not.
    """
    prompts = [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
    ]
    first, size = trainer.accelerator.process_index * len(prompts), trainer.num_generations
    blocks = [(first + row) // size for row in range(len(prompts))]
    if len(set(zip(blocks, prompts, strict=True))) == len(set(blocks)) and len(
        set(zip(owners, prompts, strict=True))
    ) > len(set(owners)):
        raise WrongGroups(
            f"rollout_func made {size} rollouts of every {size}-th prompt; it must make one of "
            "each prompt that it is given, in their order."
        )


def check_formula(scored: ScoredRollouts, found: Any, size: int) -> None:
    """Stop where TRL's own advantages are not those of its formula in equal groups.

    Left out are groups of which float32 says nothing, their spread being small beside their
    rewards, and those with rows without a reward, which TRL before 1.8 takes for failures.

    Raises:
        WrongGroups: says which advantage was not as it should be.
    """
    rewards = scored.rewards
    if found.dim() != 1 or len(found) != len(rewards):
        raise WrongGroups(
            f"advantages of shape {tuple(found.shape)} where one per rollout ({len(rewards)}) "
            "was expected; a subclass that makes others must come before BudgetedMixin."
        )
    separate = scored.aggregation == "normalize_then_sum"
    columns = list(zip(*scored.by_function, strict=True)) if separate else [rewards]
    groups = range(0, len(rewards), size)
    telling = [all(_is_telling(c[at : at + size]) for c in columns) for at in groups]
    # There one group's rounding, or its rows without a reward, reach all the others.
    if (separate or scored.scale_rewards == "batch") and not all(telling):
        return
    expected = scored.advantages([size] * len(groups))
    for row, (a, b) in enumerate(zip(found.tolist(), expected, strict=True)):
        if telling[row // size] and not abs(a - b) <= _FORMULA_TOLERANCE * (1.0 + abs(b)):
            raise WrongGroups(
                f"TRL {trl.__version__} or a subclass computes advantages by a formula that is "
                f"not known here: rollout {row} has {a:.6g} where {b:.6g} was expected with "
                f"scale_rewards={scored.scale_rewards!r} and multi_objective_aggregation="
                f"{scored.aggregation!r}. A subclass that changes advantages must come before "
                "BudgetedMixin, so that it changes ours."
            )


def _is_telling(rewards: Sequence[float]) -> bool:
    if any(map(math.isnan, rewards)):
        return False
    largest, spread = max(map(abs, rewards)), max(rewards) - min(rewards)
    return spread > _TELLING_SPREAD * largest or (spread == 0.0 and largest <= 1.0)

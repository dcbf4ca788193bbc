"""GRPO with groups of any size: the loop a trainer runs around the budget client.

Per step: allocate, generate, reward, report, and one gradient step on the rollouts whose
advantage is not zero. On-policy, so the importance ratio is 1 and there is no clipping;
no KL penalty; the loss is the mean over completion tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knapsack_trainer_client import Allocation, BudgetClient, group_advantages
from knapsack_trainer_client.demo.model import (
    MAX_TOKENS,
    exact_accuracy,
    greedy_accuracy,
    response_logprobs,
    save,
)
from knapsack_trainer_client.demo.task import END, Problem
from knapsack_trainer_client.rollouts import RolloutClient, RolloutGroups


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long to train and on how much.

    Attributes:
        steps: gradient steps.
        prompts: prompts a step.
        total_rollouts: rollouts a step, the same for every arm.
        learning_rate: of AdamW, after the first ten steps.
        evaluate_every: steps between two looks at the held-out problems.
        seed: of the order of the prompts and of the sampling.
    """

    steps: int
    prompts: int
    total_rollouts: int
    learning_rate: float
    evaluate_every: int
    seed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out accuracy after ``rollouts`` rollouts.

    Attributes:
        rollouts: generated so far.
        exact: mean probability of the right chain, by teacher forcing.
        greedy: share of problems that the most probable response solves.
    """

    rollouts: int
    exact: float
    greedy: float


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step's rollouts were, by position of the batch.

    Attributes:
        prompt_ids: the batch.
        num_rollouts: rollouts of each prompt that came back.
        num_successes: those of them with reward 1.
        success_rates: probability that the model, as it was, writes each right chain.
        fallback_waves: waves that were uniform because the scheduler did not answer.
    """

    prompt_ids: list[str]
    num_rollouts: list[int]
    num_successes: list[int]
    success_rates: list[float]
    fallback_waves: int


@dataclass(frozen=True, slots=True)
class History:
    """What one arm did: its steps in order, and its evaluations, the first before step 0."""

    steps: list[StepOutcome]
    evaluations: list[Evaluation]


def train(
    model: Any,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    schedule: Schedule,
    budget: BudgetClient,
    rollouts: RolloutClient,
    folder: Path,
    *,
    wave_fraction: float = 0.0,
    on_step: Callable[[Evaluation], object] | None = None,
) -> History:
    """Train the model in place and return what happened.

    Args:
        model: a causal language model; the generation server is brought up to it first.
        problems: to train on, drawn anew each epoch without replacement.
        held_out: to evaluate on.
        schedule: steps, sizes and seed.
        budget: decides how many rollouts each prompt gets.
        rollouts: generates them.
        folder: where weights are handed over; on a disk in memory if there is one.
        wave_fraction: share of a step's rollouts in its first wave; 0 for a single wave.
        on_step: called after each step with the newest evaluation.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.0)
    history = History([], [_evaluate(model, held_out, 0)])
    batches = _batches(len(problems), schedule)
    folder.mkdir(parents=True, exist_ok=True)
    spent = 0
    for step, batch in enumerate(batches):
        _hand_over(model, folder, rollouts, step)
        chosen = [problems[i] for i in batch]
        success_rates = exact_accuracy(model, chosen)
        groups, rewards, fallback_waves = _collect(
            chosen, step, schedule, budget, rollouts, wave_fraction
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * min(1.0, (step + 1) / 10)
        _learn(model, optimizer, chosen, groups, group_advantages(rewards))
        spent += sum(map(len, rewards))
        history.steps.append(
            StepOutcome(
                [p.prompt_id for p in chosen],
                [len(group) for group in rewards],
                [int(sum(group)) for group in rewards],
                success_rates.tolist(),
                fallback_waves,
            )
        )
        if (step + 1) % schedule.evaluate_every == 0 or step + 1 == schedule.steps:
            history.evaluations.append(_evaluate(model, held_out, spent))
        if on_step is not None:
            on_step(history.evaluations[-1])
    return history


def _batches(count: int, schedule: Schedule) -> list[list[int]]:
    """Return the positions of each step's prompts: a new order each epoch."""
    rng = np.random.default_rng(schedule.seed)
    need = schedule.steps * schedule.prompts
    order = np.concatenate([rng.permutation(count) for _ in range(-(-need // count))])[:need]
    return [list(map(int, part)) for part in order.reshape(schedule.steps, schedule.prompts)]


def _collect(
    problems: Sequence[Problem],
    step: int,
    schedule: Schedule,
    budget: BudgetClient,
    rollouts: RolloutClient,
    wave_fraction: float,
) -> tuple[RolloutGroups, list[list[float]], int]:
    """Return groups and rewards, all waves together, and how many waves were fallbacks."""
    prompt_ids = [problem.prompt_id for problem in problems]
    allocation = budget.allocate(
        prompt_ids, schedule.total_rollouts, step, wave_fraction=wave_fraction
    )
    groups = RolloutGroups(len(problems))
    rewards: list[list[float]] = [[] for _ in problems]
    fallback_waves = 0
    while True:
        fallback_waves += allocation.is_fallback
        came = _generate(problems, allocation, schedule.seed, rollouts)
        new_rewards = [
            [problem.reward(r.token_ids) for r in group]
            for problem, group in zip(problems, came, strict=True)
        ]
        budget.report(
            allocation,
            new_rewards,
            policy_version=step,
            completion_tokens=[[len(r.token_ids) for r in group] for group in came],
        )
        for at in range(len(problems)):
            groups[at].extend(came[at])
            rewards[at].extend(new_rewards[at])
        if not allocation.remaining_rollouts:
            return groups, rewards, fallback_waves
        allocation = budget.extend(allocation)


def _generate(
    problems: Sequence[Problem], allocation: Allocation, seed: int, rollouts: RolloutClient
) -> RolloutGroups:
    return rollouts.generate(
        [problem.prompt for problem in problems],
        allocation.num_rollouts,
        max_tokens=MAX_TOKENS,
        stop_token_ids=[END],
        seed=seed * 1_000_000 + allocation.step * 100 + allocation.wave,
    )


def _learn(
    model: Any,
    optimizer: torch.optim.Optimizer,
    problems: Sequence[Problem],
    groups: RolloutGroups,
    advantages: list[list[float]],
) -> None:
    """Take one gradient step; rollouts with advantage zero cost no forward pass."""
    tokens = sum(len(r.token_ids) for group in groups for r in group)
    rows = [
        (problem.prompt, rollout.token_ids, advantage)
        for problem, group, values in zip(problems, groups, advantages, strict=True)
        for rollout, advantage in zip(group, values, strict=True)
        if advantage != 0.0
    ]
    if not rows:
        return
    prompts, responses, weights = zip(*rows, strict=True)
    logprobs, mask = response_logprobs(model, prompts, responses)
    loss = -(logprobs * mask * torch.tensor(weights)[:, None]).sum() / tokens
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _hand_over(model: Any, folder: Path, rollouts: RolloutClient, step: int) -> None:
    weights = folder / f"step-{step}"
    save(model, weights)
    rollouts.update_weights(weights, step)
    shutil.rmtree(weights)


def _evaluate(model: Any, problems: Sequence[Problem], rollouts: int) -> Evaluation:
    return Evaluation(
        rollouts, float(exact_accuracy(model, problems).mean()), greedy_accuracy(model, problems)
    )

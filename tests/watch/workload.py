"""A run as a trainer makes one: prompts of all kinds that are learned, through the real client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from knapsack_trainer_client import BudgetClient

ROLLOUTS = 8
"""Per prompt, on average."""


def learning_run(
    client: BudgetClient,
    steps: int,
    *,
    prompts: int = 400,
    batch: int = 64,
    waves: bool = False,
    seed: int = 0,
    speed: float = 1.0,
) -> Iterator[int]:
    """Train an imaginary policy; yields after every step.

    Success rates are logistic in a skill that is the prompt's own and rises with every visit.

    Args:
        client: of the run.
        steps: of the training.
        prompts: of the data set, drawn in epochs.
        batch: prompts of a step.
        waves: spend the budget in two.
        seed: of everything random.
        speed: of learning.
    """
    random = np.random.default_rng(seed)
    # Many that never succeed and many that always do.
    skill = random.normal(-1.5, 3.5, prompts)
    order = np.zeros(0, np.int64)
    for step in range(steps):
        if order.size < batch:
            order = random.permutation(prompts)
        rows, order = order[:batch], order[batch:]
        rates = 1.0 / (1.0 + np.exp(-skill[rows]))
        allocation = client.allocate(
            [f"prompt-{row}" for row in rows],
            ROLLOUTS * batch,
            step,
            wave_fraction=0.5 if waves else 0,
        )
        groups = [random.random(n) < p for n, p in zip(allocation.num_rollouts, rates, strict=True)]
        client.report(allocation, [list(map(float, group)) for group in groups], step)
        if waves:
            more = client.extend(allocation)
            rest = [random.random(n) < p for n, p in zip(more.num_rollouts, rates, strict=True)]
            client.report(more, [list(map(float, group)) for group in rest], step)
        skill += 0.004 * speed
        skill[rows] += 0.1 * speed * random.random(batch)
        yield step

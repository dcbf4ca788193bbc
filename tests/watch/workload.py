"""A run as a trainer makes one: prompts of all kinds that are learned, through the real client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from knapsack_trainer_client import TLS, BudgetClient, GeneratorUnavailable, RolloutClient

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


def train_until(address: str, folder: Path, stop: threading.Event, tls: TLS | None = None) -> None:
    """Train at a scheduler, some six steps a second, with one rewind; outbox in the folder."""
    outbox = folder / "outbox.db"
    with BudgetClient(address, "exp1", outbox=outbox, timeout=60, tls=tls) as client:
        for step in learning_run(client, 100_000, prompts=300):
            if step == 10:
                client.rewind(10)
            if stop.wait(0.15):
                return


def generate_until(address: str, folder: Path, stop: threading.Event) -> None:
    """Generate unequal groups at a generation server, and hand over weights every fifth time."""
    client = RolloutClient(address)
    step = 0
    while not stop.wait(0.2):
        step += 1
        try:
            client.generate([[1, 2, 3]] * 8, [2, 2, 2, 4, 4, 8, 16, 32], max_tokens=32, seed=step)
            if step % 5 == 0:
                client.update_weights(folder, step)
        except GeneratorUnavailable:
            if not stop.is_set():
                raise

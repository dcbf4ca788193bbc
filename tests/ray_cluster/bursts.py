"""Bursts of unequal groups through the real client, and the server that answers them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from knapsack_trainer_client.rollouts import Rollout, RolloutClient

SIZES = [2, 96, 5, 64, 3, 40, 2, 2]
PROMPTS = [[k + 1] * (k + 1) for k in range(len(SIZES))]


def flags(nodes: Any, model_folder: Path, *more: str) -> list[str]:
    """Return what a server with two replicas of the small model is started with."""
    return [
        "--engine=ray",
        f"--ray-address={nodes.address}",
        "--replicas=2",
        "--replica-engine=transformers",
        f"--model={model_folder}",
        "--threads=1",
        # Small batches, so that the burst lasts.
        "--max-batch-rollouts=8",
        "--replica-rollouts=24",
        "--piece-rollouts=8",
        *more,
    ]


def burst(client: RolloutClient, kill: Callable[[], None] | None = None) -> list[Any]:
    """Return the tokens and versions of all groups; what arrives is checked as it does."""
    came: list[Rollout] = []

    def arrived(rollout: Rollout) -> None:
        came.append(rollout)
        if len(came) == 20 and kill is not None:
            kill()

    groups = client.generate(PROMPTS, SIZES, max_tokens=40, seed=5, on_rollout=arrived)
    assert Counter((r.prompt_index, r.rollout_index) for r in came) == Counter(
        (at, k) for at, size in enumerate(SIZES) for k in range(size)
    )
    assert not groups.failed
    return [[(r.token_ids, r.weight_version) for r in group] for group in groups]


def wait_for(client: RolloutClient, replicas: int) -> None:
    """Return when so many replicas serve."""
    for _ in range(2400):
        if client.status().replicas == replicas:
            return
        time.sleep(0.1)
    raise AssertionError(f"{client.status().replicas} replicas serve, not {replicas}")

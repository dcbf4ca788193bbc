"""Real vLLM engines as replicas on a Ray cluster, one of which is killed in a burst."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from knapsack_trainer_client.rollouts import RolloutClient

from bursts import PROMPTS, SIZES, burst, wait_for
from vllm_models import greedy, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that differ in their weights alone."""
    made = [tmp_path_factory.mktemp(name) for name in ("old", "new")]
    for seed, folder in enumerate(made):
        tiny_model(seed).save_pretrained(folder)
    return made


def test_a_vllm_replica_killed_in_a_burst_costs_nothing(
    nodes: Any, serve: Callable[..., str], folders: list[Path]
) -> None:
    """Unequal groups arrive whole on the weights that both were given, also while one dies."""
    address = serve(
        "--engine=ray",
        f"--ray-address={nodes.address}",
        "--replicas=2",
        "--replica-engine=vllm",
        "--replica-gpus=0",
        f"--model={folders[0]}",
        "--replica-rollouts=32",
        "--piece-rollouts=8",
        # vLLM's own: Hugging Face's arithmetic, and a burst that lasts.
        "--dtype=float32",
        "--max-num-seqs=8",
    )
    with RolloutClient(address, timeout=400) as client:
        wait_for(client, 2)
        old = burst(client)
        client.update_weights(folders[1], 4)
        new = burst(client)
        assert {version for group in new for _, version in group} == {4}
        assert new != old
        drawn = client.generate(PROMPTS, [2] * len(SIZES), max_tokens=12, temperature=0.0)
        wanted = greedy(folders[1], PROMPTS, 12)
        assert [[r.token_ids for r in group] for group in drawn] == [[t, t] for t in wanted]
        killed: list[psutil.Process] = []

        def kill() -> None:
            victim = psutil.Process(nodes.replicas()[0])
            killed.extend([victim, *victim.children(recursive=True)])
            victim.kill()

        assert burst(client, kill) == new
        # vLLM's engine runs in a process of its own, which holds the GPU's memory.
        assert len(killed) > 1
        assert not psutil.wait_procs(killed, timeout=30)[1]
        wait_for(client, 2)
        assert burst(client) == new
        assert {r.weight_version for group in drawn for r in group} == {4}

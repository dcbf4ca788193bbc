"""The real generation server in front of servers that are killed, called by the real client."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapsack_trainer_client.rollouts import Rollout, RolloutClient

import vllm_like

SIZES = [2, 128, 5, 300, 40]


class Backend:
    """A vLLM-like server in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, vllm_like.__file__], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    """Three of them."""
    made = [Backend() for _ in range(3)]
    yield made
    for backend in made:
        backend.kill()


def test_servers_killed_in_a_burst_cost_nothing_that_is_seen(
    start_generator, backends: list[Backend], tmp_path: Path
) -> None:
    """Every rollout arrives once, with the tokens that it has when nobody is killed."""
    generator = start_generator(
        "--engine=remote",
        *[f"--remote={backend.url}" for backend in backends],
        "--replica-rollouts=32",
        "--piece-rollouts=8",
    )
    prompts = [[k + 1] for k in range(len(SIZES))]
    came: list[Rollout] = []

    def arrived(rollout: Rollout) -> None:
        came.append(rollout)
        if len(came) in (30, 200):
            backends[len(came) // 200].process.kill()

    with RolloutClient(generator.addresses["listen"], timeout=100) as client:
        calm = client.generate(prompts, SIZES, max_tokens=6, seed=1)
        stormy = client.generate(prompts, SIZES, max_tokens=6, seed=1, on_rollout=arrived)
        assert Counter((r.prompt_index, r.rollout_index) for r in came) == Counter(
            (at, k) for at, size in enumerate(SIZES) for k in range(size)
        )
        for before, after in zip(calm, stormy, strict=True):
            assert [r.token_ids for r in before] == [r.token_ids for r in after]
        assert not stormy.failed
        # The one that is left takes weights and says so.
        (tmp_path / "new").mkdir()
        client.update_weights(tmp_path / "new", 3)
        again = client.generate(prompts, SIZES, max_tokens=6, seed=1)
        assert {r.weight_version for group in again for r in group} == {3}
        assert client.status().replicas == 1
    assert generator.end() == 0

"""TRL's completions from our generation server, with unequal groups."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knapsack_trainer_client import GeneratorUnavailable, InvalidRequest, WeightUpdateFailed
from knapsack_trainer_client.integrations.trl_generation import ServedRollouts
from knapsack_trainer_client.rollouts import RolloutClient

from tiny_trl import by_hand, groups_of, new_model, new_trainer


@pytest.fixture(scope="module")
def genserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real generation server with the tiny model."""
    tmp_path = tmp_path_factory.mktemp("genserver")
    new_model().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "knapsack_genserver.cli", "serve"]
    listen = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
    with (tmp_path / "genserver.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--model", str(tmp_path / "model"), *listen],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (tmp_path / "genserver.log").read_text()
    yield json.loads(line)["listen"]
    process.kill()
    process.wait(20)
    process.stdout.close()


def test_served_rollouts_train(shared_scheduler: Any, genserver: str, tmp_path: Path) -> None:
    """Groups as allocated, advantages by hand, each step on its own weights, none left over."""
    served = ServedRollouts(genserver, tmp_path / "weights", timeout=60)
    more = {"rollout_func": served}
    trainer = new_trainer(tmp_path / "out", shared_scheduler.address, more=more, max_steps=6)

    trainer.train()

    for batch in trainer.batches:
        expected = by_hand(groups_of(batch["ids"]), batch["rewards"])
        assert batch["advantages"] == pytest.approx(expected, abs=1e-6)
        assert len(batch["ids"]) == 8
    assert any(len(set(map(len, groups_of(b["ids"])))) > 1 for b in trainer.batches)
    with RolloutClient(genserver) as client:
        assert client.status().weight_version == 5
    assert not list((tmp_path / "weights").iterdir())


def test_rollouts_of_other_weights_stop_the_run(genserver: str, tmp_path: Path) -> None:
    """A server that was started anew, or that a second training uses, has others."""
    new_model().save_pretrained(tmp_path / "others")

    def stranger(completion_ids: list[list[int]], **_: Any) -> list[float]:
        with RolloutClient(genserver) as client:
            client.update_weights(tmp_path / "others", 77)
        return [float(ids[0] % 2) for ids in completion_ids]

    # The second batch of a step finds the weights of the first replaced.
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    more = {"rollout_func": ServedRollouts(genserver, tmp_path / "weights")}
    trainer = new_trainer(tmp_path / "out", None, reward_funcs=stranger, more=more, **options)

    with pytest.raises(WeightUpdateFailed, match="version 77 where those of step 0 were handed"):
        trainer.train()


def test_a_training_after_another_hands_over_its_own_weights(
    genserver: str, tmp_path: Path
) -> None:
    """Also where both are at the same step."""
    served = ServedRollouts(genserver, tmp_path / "weights")
    updates: list[Path] = []
    update = served._client.update_weights

    def counted(path: Path, version: int) -> str:
        updates.append(path)
        return update(path, version)

    served._client.update_weights = counted  # type: ignore[method-assign,assignment]
    for name in ("a", "b"):
        new_trainer(tmp_path / name, None, more={"rollout_func": served}, max_steps=1).train()

    assert len({path.name for path in updates}) == len(updates) == 2
    assert not list((tmp_path / "weights").iterdir())


def test_what_the_server_cannot_do_is_refused(genserver: str, tmp_path: Path) -> None:
    """Options without a counterpart, and a server that is not there, stop the run by name."""
    more = {"rollout_func": ServedRollouts(genserver, tmp_path / "weights"), "scheduler": None}
    with pytest.raises(InvalidRequest, match=r"repetition_penalty = 1\.2"):
        new_trainer(tmp_path / "a", None, more=more, repetition_penalty=1.2).train()

    client = RolloutClient("127.0.0.1:1", timeout=0.5)
    absent = ServedRollouts(genserver, tmp_path / "weights")
    absent._client = client
    more = {"rollout_func": absent, "scheduler": None}
    with pytest.raises(GeneratorUnavailable, match=r"no generation server answered"):
        new_trainer(tmp_path / "b", None, more=more).train()

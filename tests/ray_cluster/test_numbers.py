"""An operator changes the number of replicas on a real cluster, in the middle of bursts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc
from knapsack_trainer_client.rollouts import RolloutClient

from bursts import burst, flags, wait_for
from small_engines import small_model


def replicas(address: str, *more: str) -> list[list[str]]:
    """Return the rows of the command's table."""
    command = [sys.executable, "-m", "knapsack_genserver.cli", "replicas"]
    done = subprocess.run(
        [*command, f"--address={address}", *more], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()[2:]]


def test_replicas_come_and_go_as_they_are_told(
    nodes: Any, serve: Callable[..., str], model_folder: Path, tmp_path: Path
) -> None:
    """A burst that sees it is a burst that does not, and each has the weights that serve."""
    address = serve(*flags(nodes, model_folder), "--replicas=1")
    small_model(seed=1).save_pretrained(tmp_path / "new")
    with RolloutClient(address, timeout=400) as client:
        client.update_weights(tmp_path / "new", 4)
        # What a newcomer starts with is not what it is to serve.
        alone = burst(client)
        assert {version for group in alone for _, version in group} == {4}
        assert burst(client, lambda: replicas(address, "--set=2", "--wait=200")) == alone
        assert len(nodes.replicas()) == 2
        held: list[int] = []
        with grpc.insecure_channel(address) as channel:
            stub = rpc.RolloutGeneratorStub(channel)  # type: ignore[no-untyped-call]

            def look() -> None:
                status = stub.GetStatus(pb.GetStatusRequest(), timeout=60)
                held.extend(each.running_rollouts for each in status.members)

            assert burst(client, look) == alone
        assert len(held) == 2
        assert all(held)
        told: list[list[list[str]]] = []
        assert burst(client, lambda: told.append(replicas(address, "--set=1"))) == alone
        assert sorted(row[1] for row in told[0]) == ["draining", "serving"]
        ((_, state, *_),) = replicas(address, "--wait=60")
        assert state == "serving"
        wait_for(client, 1)
        # Its room is another's.
        replicas(address, "--set=2", "--wait=200")
        assert burst(client) == alone

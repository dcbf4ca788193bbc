"""Servers that end well or badly, and a cluster that ends under one: nothing stays behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from knapsack_trainer_client import GeneratorUnavailable
from knapsack_trainer_client.rollouts import RolloutClient

from bursts import PROMPTS, SIZES, flags, wait_for


def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Return when something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@contextmanager
def groups_of(nodes: Any) -> Iterator[Callable[[], set[str]]]:
    """A function that returns the states of the cluster's placement groups, of those there are."""
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield lambda: {
            str(group["state"])
            for group in placement_group_table().values()
            if group["state"] != "REMOVED"
        }
    finally:
        ray.shutdown()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_frees_the_cluster(
    nodes: Any, begin: Callable[..., Any], model_folder: Path, number: signal.Signals
) -> None:
    """Told to or killed, in mid-burst: its actors end, and their room is the next one's."""
    server = begin(*flags(nodes, model_folder, "--drain-seconds=0"))
    client = RolloutClient(server.address(), timeout=400)
    wait_for(client, 2)
    actors = nodes.replicas()
    assert len(actors) == 2
    codes: list[int] = []
    with pytest.raises(GeneratorUnavailable):
        client.generate(
            PROMPTS,
            SIZES,
            max_tokens=40,
            on_rollout=lambda _: codes or codes.append(server.end(number)),
        )
    assert codes == [0 if number is signal.SIGTERM else -number]
    client.close()
    with groups_of(nodes) as groups:
        until(lambda: not set(actors) & set(nodes.replicas()), "the actors end")
        until(lambda: not groups(), f"the placement groups are removed: {groups()}")


def test_a_server_that_waits_for_room_can_be_told_to_end(
    nodes: Any, begin: Callable[..., Any], model_folder: Path
) -> None:
    """What it has asked the cluster for is not asked for any more."""
    with groups_of(nodes) as groups:
        server = begin(*flags(nodes, model_folder, "--replica-cpus=99"))
        until(lambda: groups() == {"PENDING"}, "it asks for room", 120)
        assert server.end() == 0
        until(lambda: not groups(), "it asks for nothing")
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("told", [True, False], ids=["told to end", "left alone"])
def test_a_server_whose_head_node_is_lost_ends(
    begin: Callable[..., Any], model_folder: Path, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not stay half alive, and lets itself be ended meanwhile."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    arguments = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **arguments})
    try:
        server = begin(*flags(cluster, model_folder))
        with RolloutClient(server.address(), timeout=60) as client:
            wait_for(client, 2)
            cluster.head_node.kill_gcs_server()
            if not told:
                until(lambda: server.process.poll() is not None, "it ends by itself")
        code = server.end()
        # Ray itself ends a process that has been without its head node for so long.
        assert code == (0 if told else 1), server.log()
    finally:
        cluster.shutdown()

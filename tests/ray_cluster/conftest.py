"""A Ray cluster of several nodes on this machine, and generation servers on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A node that is gone is known to be so after two seconds.
os.environ["RAY_health_check_period_ms"] = "500"  # noqa: SIM112
os.environ["RAY_health_check_failure_threshold"] = "4"  # noqa: SIM112

from ray.cluster_utils import Cluster

from small_engines import small_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A busy machine starts Ray's processes slowly."""
    for item in items:
        item.add_marker(pytest.mark.timeout(600))


class Nodes:
    """A head without room for replicas, and nodes with room for one each."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args=self._arguments(0))
        self.nodes = [self.add(), self.add()]

    @staticmethod
    def _arguments(cpus: int) -> dict[str, Any]:
        return {"num_cpus": cpus, "object_store_memory": 80 * 2**20, "include_dashboard": False}

    @property
    def address(self) -> str:
        """Where the cluster is joined."""
        return str(self.cluster.address)

    def add(self) -> Any:
        """Add a node."""
        return self.cluster.add_node(**self._arguments(1))

    def kill_node(self) -> None:
        """Kill a node and all that runs on it."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def replicas(self) -> list[int]:
        """Return the process ids of all replicas."""
        raylets = {
            process.process.pid for node in self.nodes for process in node.all_processes["raylet"]
        }
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                name = (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent in raylets and name.startswith(b"ray::Replica"):
                found.append(int(folder.name))
        return found

    def kill_replica(self) -> int:
        """Kill the process of a replica; returns its id."""
        victim = self.replicas()[0]
        os.kill(victim, signal.SIGKILL)
        return victim


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """The cluster that all tests share; whoever kills a node adds one."""
    made = Nodes()
    yield made
    made.cluster.shutdown()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the replicas."""
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that starts a generation server and returns its address."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> str:
        ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "knapsack_genserver.cli", "serve", *flags, *ports],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / "log").read_text()
        return str(json.loads(line)["listen"])

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(120) == 0
        finally:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()

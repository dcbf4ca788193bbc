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


class Served:
    """A generation server in a process of its own."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
        with log.open("a") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "knapsack_genserver.cli", "serve", *flags, *ports],
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def address(self) -> str:
        """Wait until it serves; return where."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        return str(json.loads(line)["listen"])

    def log(self) -> str:
        """Return what it has written to stderr so far."""
        return self._log.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal, unless it has ended; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """A function that starts generation servers, which need not end well."""
    begun: list[Served] = []

    def start(*flags: str) -> Served:
        begun.append(Served(tmp_path / f"log{len(begun)}", *flags))
        return begun[-1]

    yield start
    for served in begun:
        served.end(signal.SIGKILL)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A function that starts a generation server and returns its address; it must end well."""
    started: list[Served] = []

    def start(*flags: str) -> str:
        started.append(Served(tmp_path / "log", *flags))
        return started[-1].address()

    yield start
    for served in started:
        assert served.end() == 0, served.log()

"""A real scheduler as a process: to be killed and started again, and as fixtures.

A conftest that imports the fixtures has them for its folder.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from held_port import HeldPort

PATIENCE = 60.0
"""Seconds that a client waits for a scheduler that is there, however busy the machine."""


class SchedulerProcess:
    """A real ``knapsack-scheduler serve``, to be killed and started on the same port.

    In a ``with`` block it serves from the beginning, and ends with the block.

    Attributes:
        address: where it listens.
        admin, health_address: where its other two ports are, of its newest start.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process: subprocess.Popen[str] | None = None
        self._port = HeldPort()
        self.address = self._port.address
        self.admin = ""
        self.health_address = ""

    def __enter__(self) -> SchedulerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._port.close()

    def lose_store(self) -> None:
        """Let the next start begin with an empty store."""
        self._store = self._store.with_name(f"new-{self._store.name}")

    def start(self) -> None:
        """Start it and wait until it serves."""
        listen = ["--listen", self.address]
        others = ["--admin-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
        command = [sys.executable, "-m", "knapsack_scheduler.cli", "serve", *listen, *others]
        log = self._store.with_suffix(".log").open("a")
        self._process = subprocess.Popen(
            [*command, "--store", f"sqlite:///{self._store}"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            assert selector.select(PATIENCE), "the scheduler says nothing"
        line = self._process.stdout.readline()
        assert line, self._store.with_suffix(".log").read_text()
        serving = json.loads(line)
        self.health_address = serving["health"]
        self.admin = serving["admin"]

    def kill(self) -> None:
        """Kill it with signal 9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end."""
        if self._process is not None:
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freeze it: it accepts connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(PATIENCE)
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    """A real scheduler that serves."""
    with SchedulerProcess(tmp_path / "stats.db") as process:
        yield process


@pytest.fixture(scope="module")
def shared_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerProcess]:
    """A real scheduler for all tests of a module, each with runs of its own."""
    with SchedulerProcess(tmp_path_factory.mktemp("shared") / "stats.db") as process:
        yield process


@pytest.fixture(autouse=True)
def outbox_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of default outboxes, apart for every test."""
    folder = tmp_path / "outboxes"
    monkeypatch.setenv("KNAPSACK_RL_OUTBOX", str(folder))
    return folder

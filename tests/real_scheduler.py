"""A scheduler process for tests, to be killed and started again."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path


class SchedulerProcess:
    """A real ``knapsack-scheduler serve``, to be killed and started on the same port."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.admin = ""
        self.health_address = ""

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def lose_store(self) -> None:
        """Let the next start begin with an empty store."""
        self._store = self._store.with_name(f"new-{self._store.name}")

    def start(self) -> None:
        """Start it and wait until it serves."""
        listen = ["--listen", f"127.0.0.1:{self.port}"]
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
            assert selector.select(30), "the scheduler said nothing for 30 s"
        line = self._process.stdout.readline()
        assert line, self._store.with_suffix(".log").read_text()
        serving = json.loads(line)
        self.port = int(serving["listen"].rsplit(":", 1)[1])
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
            process.wait(20)
            assert process.stdout is not None
            process.stdout.close()

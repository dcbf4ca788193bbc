"""Server processes of the demo: started, watched, started again, stopped."""

from __future__ import annotations

import collections
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO

from knapsack_trainer_client.closing import Closing
from knapsack_trainer_client.errors import KnapsackError

# Runs a module as `python -m` does, in a process that the kernel ends when the demo itself is
# killed: prctl(2), PR_SET_PDEATHSIG with SIGTERM.
_LAUNCH = """
import ctypes, runpy, sys
ctypes.CDLL(None).prctl(1, 15)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
_STOP_SECONDS = 10.0
_KEPT_LINES = 20


class ServerFailed(KnapsackError):
    """A server process could not be started; the message holds its last words."""


class Server(Closing):
    """One server process, which comes back on the same address when it is killed.

    Its standard output must begin with one JSON line that has its address as ``listen``,
    written once it serves.

    Attributes:
        address: where its API listens; the same after a restart.
        admin: where its HTTP pages are.

    Args:
        name: what to call it in messages.
        command: a module that is a program, and its arguments but the address.
        say: called with a line when the process was lost and when it is back; from a
            thread of its own.
    """

    def __init__(self, name: str, command: Sequence[str], say: Callable[[str], object]) -> None:
        self.name = name
        self.address = ""
        self.admin = ""
        self._command = [sys.executable, "-c", _LAUNCH, *command]
        self._say = say
        self._stopping = threading.Event()
        self._last_words: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._process = self._start("127.0.0.1:0")
        self._watcher = threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Process id, which changes when the process was killed."""
        return self._process.pid

    def _start(self, listen: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*self._command, "--listen", listen],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Of its own group, so that Ctrl-C reaches the demo alone and it can stop in order.
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        threading.Thread(target=self._drain, args=(process.stderr,), daemon=True).start()
        first = process.stdout.readline()
        if not first:
            process.stdout.close()
            process.wait()
            raise ServerFailed(
                f"the {self.name} did not start (exit code {process.returncode}): "
                + " | ".join(self._last_words)
            )
        addresses = json.loads(first)
        self.address, self.admin = addresses["listen"], addresses["admin"]
        threading.Thread(target=self._drain, args=(process.stdout,), daemon=True).start()
        return process

    def _drain(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._last_words.append(line.strip())

    def _watch(self) -> None:
        while True:
            code = self._process.wait()
            if self._stopping.is_set():
                return
            try:
                self._process = self._start(self.address)
            except ServerFailed as error:
                self._say(str(error))
                return
            if self._stopping.is_set():
                # Stopped while it came back: nobody else knows of this process.
                self._process.terminate()
                continue
            why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._say(
                f"the {self.name} died ({why}) and was started again, pid {self._process.pid}"
            )

    def close(self) -> None:
        """Ask the process to drain, and kill it if it does not."""
        self._stopping.set()
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._watcher.join(_STOP_SECONDS)


def scheduler(store: str, say: Callable[[str], object]) -> Server:
    """Start a scheduler on a store such as sqlite:////tmp/stats.db."""
    return Server(
        "scheduler",
        ["knapsack_scheduler.cli", "serve", "--store", store, *_any_port(), *_quiet()],
        say,
    )


def generation_server(model: str, say: Callable[[str], object]) -> Server:
    """Start a generation server of a model folder."""
    return Server(
        "generation server",
        ["knapsack_genserver.cli", "serve", "--model", model, *_any_port(), *_quiet()],
        say,
    )


def _any_port() -> list[str]:
    return ["--admin-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]


def _quiet() -> list[str]:
    return ["--log-level", "error", "--log-format", "text"]

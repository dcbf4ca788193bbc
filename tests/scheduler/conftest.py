"""A service in this process, and a scheduler as a process of its own."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.cli import main
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.service import SchedulerService

from gates import Gate
from held_port import HeldPort

ANY_PORT = "127.0.0.1:0"


class Calls:
    """Short forms of requests, each with an id of its own unless one is given."""

    def __init__(self, run_id: str = "run") -> None:
        self.run_id = run_id
        self._numbers = itertools.count()

    def _id(self, given: str) -> str:
        return given or f"id-{next(self._numbers)}"

    def allocate(
        self,
        prompt_ids: Sequence[str] = ("a", "b"),
        total_rollouts: int = 8,
        step: int = 0,
        request_id: str = "",
        **more: Any,
    ) -> pb.AllocateRequest:
        """Return a request for a first wave."""
        return pb.AllocateRequest(
            run_id=self.run_id,
            step=step,
            request_id=self._id(request_id),
            prompt_ids=prompt_ids,
            total_rollouts=total_rollouts,
            **more,
        )

    def extend(self, allocation_id: str, request_id: str = "", **more: Any) -> pb.ExtendRequest:
        """Return a request for a further wave."""
        return pb.ExtendRequest(
            run_id=self.run_id,
            allocation_id=allocation_id,
            request_id=self._id(request_id),
            **more,
        )

    def report(
        self,
        allocation_id: str,
        rewards: Sequence[Sequence[float]],
        report_id: str = "",
        **more: Any,
    ) -> pb.ReportRequest:
        """Return a report of rewards per position."""
        return pb.ReportRequest(
            run_id=self.run_id,
            allocation_id=allocation_id,
            report_id=self._id(report_id),
            prompt_indices=range(len(rewards)),
            num_rewards=[len(group) for group in rewards],
            rewards=[r for group in rewards for r in group],
            **more,
        )

    def own_report(
        self,
        prompt_ids: Sequence[str],
        rewards: Sequence[Sequence[float]],
        step: int = 0,
        **more: Any,
    ) -> pb.ReportRequest:
        """Return a report of rollouts that the scheduler did not allocate."""
        return self.report("", rewards, prompt_ids=prompt_ids, step=step, **more)

    def rewind(self, step: int, request_id: str = "") -> pb.RewindRunRequest:
        """Return a request to forget what came after a step."""
        return pb.RewindRunRequest(run_id=self.run_id, step=step, request_id=request_id)


@pytest.fixture
def calls() -> Calls:
    """Short forms of requests to the run "run"."""
    return Calls()


@pytest.fixture
def gate() -> Any:
    """A gate, open at the end whatever happens."""
    made = Gate()
    yield made
    made.open()


@pytest.fixture
async def service() -> AsyncIterator[SchedulerService]:
    """A service on a database in memory, which creates runs as they are used."""
    async with open_service("sqlite://") as opened:
        yield opened


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(capsys) -> Callable[..., Done]:
    """A function that runs a command in this process."""

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Done(ended.value.code, shown.out, shown.err)

    return run


class Scheduler:
    """A real ``knapsack-scheduler serve``, at one address however often it is started."""

    def __init__(self, store: str, log: Path, *flags: str, prefix: Sequence[str] = ()) -> None:
        self._command = [*prefix, sys.executable, "-m", "knapsack_scheduler.cli", "serve"]
        self._command += ["--store", store, *flags]
        self._log = log
        self._port = HeldPort()
        self.addresses: dict[str, str] = {}
        self.process: subprocess.Popen[str] | None = None
        self._channel: grpc.Channel | None = None

    def start(self) -> None:
        """Start it and wait for its first line."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [
                    *self._command,
                    *("--listen", self._port.address),
                    *("--admin-listen", ANY_PORT),
                    *("--health-listen", ANY_PORT),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        self.addresses = json.loads(line)

    def log(self) -> str:
        """Return what it has written to stderr so far."""
        return self._log.read_text()

    @property
    def stub(self) -> Any:
        """A stub on an open channel."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                self.addresses["listen"],
                [("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 50)],
            )
        return rpc.BudgetSchedulerStub(self._channel)  # type: ignore[no-untyped-call]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        code = process.wait(60)
        assert process.stdout is not None
        process.stdout.close()
        return code

    def close(self) -> None:
        """Let go of the channel, the process and the port."""
        if self._channel is not None:
            self._channel.close()
        self.end(signal.SIGKILL)
        self._port.close()


@pytest.fixture
def start_scheduler(tmp_path: Path) -> Iterator[Callable[..., Scheduler]]:
    """A function that starts schedulers with some flags, on a file or on a database's URL."""
    started: list[Scheduler] = []

    def start(*flags: str, store: str = "stats.db", prefix: Sequence[str] = ()) -> Scheduler:
        url = store if "://" in store else f"sqlite:///{tmp_path / store}"
        log = tmp_path / f"scheduler-{len(started)}.log"
        scheduler = Scheduler(url, log, *flags, prefix=prefix)
        started.append(scheduler)
        scheduler.start()
        return scheduler

    yield start
    for scheduler in started:
        scheduler.close()

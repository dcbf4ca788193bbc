"""A scheduler that is killed again and again under load, and a store that fails now and then.

Whatever happens: a client that repeats what was not answered gets its answer, and every
acknowledged rollout is counted exactly once.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import sqlalchemy as sa

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler import service as service_module
from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.inspection import check_store
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.service import SchedulerService

from held_port import HeldPort

KILLS = int(os.environ.get("CHAOS_KILLS", "200"))
WORKERS, RUNS = 6, 3
REPEATED = {
    *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED),
    *(grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED),
}
OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 40),
]


class Load:
    """Workers that allocate and report, and keep count of what was acknowledged."""

    def __init__(self) -> None:
        self.acknowledged: Counter[tuple[str, str]] = Counter()
        self.steps: Counter[str] = Counter()
        self.done = asyncio.Event()
        self.progress = asyncio.Semaphore(0)

    async def work(self, worker: int, call: Any) -> None:
        """Train until told to stop; every call that was begun is brought to its answer."""
        draw, run_id = random.Random(worker), f"run-{worker % RUNS}"
        while not self.done.is_set():
            self.steps[run_id] += 1
            step = self.steps[run_id]
            prompts = [f"p{draw.randrange(40)}" for _ in range(4)]
            allocation = await call(
                "Allocate",
                pb.AllocateRequest(
                    run_id=run_id, step=step, request_id=f"{worker}-{step}", prompt_ids=prompts,
                    total_rollouts=16,
                ),
            )  # fmt: skip
            for part in range(2):
                counts = [n // 2 for n in allocation.num_rollouts]
                rewards = [float(draw.randrange(2)) for _ in range(sum(counts))]
                answer = await call(
                    "Report",
                    pb.ReportRequest(
                        run_id=run_id, allocation_id=allocation.allocation_id,
                        report_id=f"{worker}-{step}-{part}", prompt_indices=range(4),
                        num_rewards=counts, rewards=rewards,
                    ),
                )  # fmt: skip
                assert answer.accepted_rollouts == len(rewards)
                for prompt, count in zip(prompts, counts, strict=True):
                    self.acknowledged[run_id, prompt] += count
            self.progress.release()


class WarmScheduler:
    """A scheduler that is quick to start again; see ``warm_start``."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "log").open("w")
        self.store = f"sqlite:///{folder / 'stats.db'}"
        self._flags = ["--store", self.store, "--auto-create-runs", "--rewind-horizon=20"]
        self._flags += ["--log-level", "error", "--admin-listen", "127.0.0.1:0"]
        self._flags += ["--health-listen", "127.0.0.1:0"]
        self._port = HeldPort()
        self.address = self._port.address
        self.pid = 0
        self._starter = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm_start.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _line(self) -> Any:
        assert self._starter.stdout is not None
        return json.loads(self._starter.stdout.readline())

    def start(self) -> None:
        """Start it; does not wait until it serves."""
        assert self._starter.stdin is not None
        self._starter.stdin.write(json.dumps([*self._flags, "--listen", self.address]) + "\n")
        self._starter.stdin.flush()
        line = self._line()
        while "pid" not in line:
            line = self._line()
        self.pid = line["pid"]

    def serving(self) -> None:
        """Wait until it serves."""
        assert self._line()["listen"] == self.address

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.close()
        self._starter.wait(60)
        self._starter.stdout.close()
        self._port.close()
        self._log.close()


@pytest.mark.faults
@pytest.mark.timeout(300 + 5 * KILLS)
def test_every_acknowledged_rollout_is_counted_once_after_many_kills(tmp_path: Path) -> None:
    """kill -9 while it starts, decides, commits or answers; clients only ever repeat."""
    scheduler = WarmScheduler(tmp_path)
    try:
        asyncio.run(chaos(scheduler, KILLS, seed=7))
        assert (tmp_path / "log").read_text() == ""
        # Kills fell into snapshots and compaction too.
        with closing(sqlite3.connect(tmp_path / "stats.db")) as database:
            floors = database.execute("SELECT floor_seq FROM runs").fetchall()
        assert max(floors) > (0,) or KILLS < 200
    finally:
        scheduler.close()


async def chaos(scheduler: WarmScheduler, kills: int, seed: int) -> int:
    """Kill and start again under load, then compare what is stored with what was answered.

    Returns how many rollouts were acknowledged.
    """
    draw, load = random.Random(seed), Load()
    scheduler.start()
    await asyncio.to_thread(scheduler.serving)
    async with grpc.aio.insecure_channel(scheduler.address, OPTIONS) as channel:
        stub = rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]

        async def call(method: str, request: Any) -> Any:
            while True:
                try:
                    return await getattr(stub, method)(request, timeout=10, wait_for_ready=True)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in REPEATED:
                        raise

        async def kill() -> None:
            for _ in range(kills):
                # Mostly amid the load; now and then before it has come up.
                for _ in range(draw.randrange(4)):
                    await asyncio.wait_for(load.progress.acquire(), 300)
                scheduler.kill()
                scheduler.start()
                if draw.random() < 0.9:
                    await asyncio.to_thread(scheduler.serving)
            load.done.set()

        async with asyncio.TaskGroup() as group:
            for worker in range(WORKERS):
                group.create_task(load.work(worker, call))
            group.create_task(kill())

        counted: dict[tuple[str, str], int] = {}
        for run in range(RUNS):
            page = await call("ListPromptStats", pb.ListPromptStatsRequest(run_id=f"run-{run}"))
            counted |= {
                (f"run-{run}", p): n
                for p, n in zip(page.prompt_ids, page.total_rollouts, strict=True)
            }
    assert counted == {key: n for key, n in load.acknowledged.items() if n}
    assert load.acknowledged.total() > kills
    assert check_store(scheduler.store).faults == []
    return load.acknowledged.total()


class FaultyJournal(Journal):
    """A journal whose transactions fail or drag at every point where a disk may fail."""

    def __init__(self, url: str, draw: random.Random) -> None:
        super().__init__(url)
        self._draw = draw
        self.faults: Counter[str] = Counter()

    @contextmanager
    def _begun(self) -> Iterator[sa.Connection]:
        """Begin a transaction; may fail before it begins, before the commit, and after it."""
        fault = self._draw.choice(["none", "none", "begin", "commit", "answer", "slow"])
        self.faults[fault] += 1
        if fault == "begin":
            raise StoreUnavailable("the disk is away")
        with super()._begun() as connection:
            yield connection
            if fault == "slow":
                time.sleep(0.002)
            if fault == "commit":
                raise StoreUnavailable("the disk is full")
        if fault == "answer":
            # Committed, and nobody was told.
            raise StoreUnavailable("the connection was lost after the commit")


@pytest.mark.parametrize(("seed", "few"), [(0, 16_384), (1, 16_384), (2, 0)])
async def test_a_failing_store_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, few: int
) -> None:
    """Faults before, at and after the commit: repeated calls are answered and counted once.

    So they are where all batches are decided as large ones.
    """
    monkeypatch.setattr(service_module, "_FEW", few)
    journal = FaultyJournal(f"sqlite:///{tmp_path / 'stats.db'}", random.Random(seed))
    journal.open()
    service = SchedulerService(journal, auto_create_runs=True)
    methods = {"Allocate": service.allocate, "Report": service.report}
    load = Load()

    async def call(method: str, request: Any) -> Any:
        while True:
            try:
                return await methods[method](request)
            except StoreUnavailable:
                await asyncio.sleep(0)

    async def stop() -> None:
        for _ in range(40):
            await load.progress.acquire()
        load.done.set()

    async with asyncio.TaskGroup() as group:
        for worker in range(WORKERS):
            group.create_task(load.work(worker, call))
        group.create_task(stop())
    service.close()
    journal.close()

    # Read by a service of its own from what is on disk.
    journal = Journal(f"sqlite:///{tmp_path / 'stats.db'}")
    journal.open()
    service = SchedulerService(journal)
    for run in range(RUNS):
        name = f"run-{run}"
        page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id=name))
        counted = dict(zip(page.prompt_ids, page.total_rollouts, strict=True))
        assert counted == {p: n for (r, p), n in load.acknowledged.items() if r == name and n}
    service.close()
    journal.close()

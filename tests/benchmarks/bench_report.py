"""What a durable Report costs, next to a bare commit of the same bytes, in one run.

    python tests/benchmarks/bench_report.py [--sizes 256 2000] [--repeat 100]

The bare commit is sqlite3 inserting one row of the bytes that the Report stores, in WAL
mode with synchronous=FULL, on the same disk. Report is measured as the service does it,
from the request to its answer, and over gRPC next to an empty GetRun. All alternate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.embedded import open_service

MEAN = 8


def requests(size: int, step: int, rng: np.random.Generator) -> tuple[Any, Any]:
    ids = [f"prompt-{i}" for i in rng.choice(50_000, size, replace=False)]
    allocate = pb.AllocateRequest(
        run_id="bench", step=step, request_id=f"{size}-{step}", prompt_ids=ids,
        total_rollouts=MEAN * size,
    )  # fmt: skip
    report = pb.ReportRequest(
        run_id="bench", report_id=f"{size}-{step}", policy_version=step,
        prompt_indices=range(size), rewards=rng.integers(0, 2, MEAN * size),
    )  # fmt: skip
    return allocate, report


class Bare:
    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(file, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE entries (seq INTEGER PRIMARY KEY, payload BLOB)")

    def commit(self, data: bytes) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("INSERT INTO entries (payload) VALUES (?)", (data,))
        self._connection.execute("COMMIT")


def show(name: str, size: int, times: list[float], bare: list[float]) -> None:
    times, bare = sorted(times[5:]), sorted(bare[5:])
    p99 = int(0.99 * len(times))
    print(
        f"{name:<16} {size:>8,} {1e3 * statistics.median(times):>9.2f} {1e3 * times[p99]:>9.2f} "
        f"{1e3 * statistics.median(bare):>9.2f} {1e3 * bare[p99]:>9.2f} "
        f"{statistics.median(times) / statistics.median(bare):>8.1f}x",
        flush=True,
    )


async def in_process(folder: Path, size: int, repeat: int) -> None:
    rng = np.random.default_rng(size)
    bare = Bare(folder / f"bare-{size}.db")
    times: list[float] = []
    floor: list[float] = []
    async with open_service(f"sqlite:///{folder / f'service-{size}.db'}") as service:
        for step in range(repeat + 5):
            allocate, report = requests(size, step, rng)
            answer = await service.allocate(allocate)
            report.allocation_id = answer.allocation_id
            report.num_rewards.extend(answer.num_rollouts)
            data = report.SerializeToString()
            start = time.perf_counter()
            bare.commit(data)
            middle = time.perf_counter()
            await service.report(report)
            floor.append(middle - start)
            times.append(time.perf_counter() - middle)
    show("in the process", size, times, floor)


def over_wire(folder: Path, size: int, repeat: int) -> None:
    rng = np.random.default_rng(size)
    bare = Bare(folder / f"bare-wire-{size}.db")
    process = subprocess.Popen(
        [sys.executable, "-m", "knapsack_scheduler.cli", "serve", "--log-level=error",
         f"--store=sqlite:///{folder / f'wire-{size}.db'}", "--auto-create-runs",
         *(f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen"))],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    times: list[float] = []
    floor: list[float] = []
    try:
        address = json.loads(process.stdout.readline())["listen"]
        with grpc.insecure_channel(address) as channel:
            stub = rpc.BudgetSchedulerStub(channel)
            for step in range(repeat + 5):
                allocate, report = requests(size, step, rng)
                answer = stub.Allocate(allocate)
                report.allocation_id = answer.allocation_id
                report.num_rewards.extend(answer.num_rollouts)
                data = report.SerializeToString()
                start = time.perf_counter()
                stub.GetRun(pb.GetRunRequest(run_id="bench"))
                bare.commit(data)
                middle = time.perf_counter()
                stub.Report(report)
                floor.append(middle - start)
                times.append(time.perf_counter() - middle)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()
    show("GetRun + commit", size, times, floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2000])
    parser.add_argument("--repeat", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{MEAN} rollouts per prompt, milliseconds, next to a bare commit of the same bytes")
    print(
        f"{'Report':<16} {'prompts':>8} {'p50':>9} {'p99':>9} {'bare p50':>9} {'bare p99':>9} "
        f"{'p50':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            asyncio.run(in_process(Path(folder), size, arguments.repeat))
            over_wire(Path(folder), size, arguments.repeat)


if __name__ == "__main__":
    main()

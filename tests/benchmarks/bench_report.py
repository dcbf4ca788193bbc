"""What a durable Report costs, next to a bare commit of the same rows, in one run.

    python tests/benchmarks/bench_report.py [--sizes 256 2000] [--repeat 500]

The bare commit is sqlite3 itself, with a store of its own on the same disk: it inserts the
journal's row of a Report and moves the run's row on, with the journal's tables and pragmas
(WAL, synchronous=FULL), and does nothing else. Report is measured as the service does it, from
the request to its answer, and over gRPC next to a bare commit and a bare echo of the same
messages. All alternate, and nothing is left to do of the call before when the next one is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_service
import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.journal.journal import Journal

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
        journal = Journal(f"sqlite:///{file}")
        journal.open()
        run = journal.create_run("bench", b"", 0)
        journal.close()
        self._run_key, self._seq = run.run_key, 0
        self._connection = sqlite3.connect(file, isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {pragma}")

    def commit(self, report: pb.ReportRequest, step: int) -> float:
        """Store the rows of a Report; returns the seconds that takes."""
        answer = pb.ReportResponse(accepted_rollouts=len(report.rewards)).SerializeToString()
        self._seq += 1
        row = (
            self._run_key, self._seq, "report", report.report_id, 0, step, bytes(16),
            report.SerializeToString(), answer, bytes(8),
        )  # fmt: skip
        start = time.perf_counter()
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute(
            "INSERT INTO entries (run_key, seq, kind, key, branch, step, digest, payload, answer, "
            "checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            row,
        )
        self._connection.execute(
            "UPDATE runs SET last_seq = ?, branch = 0, closed_step = -1, update_time = ? "
            "WHERE run_key = ?",
            (self._seq, time.time_ns(), self._run_key),
        )
        self._connection.execute("COMMIT")
        return time.perf_counter() - start


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
            await service.settled()
            floor.append(bare.commit(report, step))
            start = time.perf_counter()
            await service.report(report)
            times.append(time.perf_counter() - start)
            await service.settled()
    show("in the process", size, times, floor)


def over_wire(folder: Path, size: int, repeat: int) -> None:
    rng = np.random.default_rng(size)
    bare = Bare(folder / f"bare-wire-{size}.db")
    times: list[float] = []
    floor: list[float] = []
    with (
        bench_service.server(*bench_service.scheduler_command(folder / f"wire-{size}.db")) as stub,
        bench_service.server(bench_service.__file__, "--echo") as echo,
    ):
        for step in range(repeat + 5):
            allocate, report = requests(size, step, rng)
            answer = stub.Allocate(allocate)
            report.allocation_id = answer.allocation_id
            report.num_rewards.extend(answer.num_rollouts)
            # Answered when the call before is folded too.
            stub.GetRun(pb.GetRunRequest(run_id="bench"))
            start = time.perf_counter()
            echo.Report(report)
            floor.append(time.perf_counter() - start + bare.commit(report, step))
            start = time.perf_counter()
            stub.Report(report)
            times.append(time.perf_counter() - start)
            stub.GetRun(pb.GetRunRequest(run_id="bench"))
    show("echo + commit", size, times, floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2000])
    parser.add_argument("--repeat", type=int, default=500)
    arguments = parser.parse_args()
    print(f"{MEAN} rollouts per prompt, milliseconds, next to a bare commit of the same rows")
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

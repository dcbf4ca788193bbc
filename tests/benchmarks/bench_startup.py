"""How soon a scheduler serves a run of many prompts, and in how much memory.

    python tests/benchmarks/bench_startup.py [--known 1000000] [--steps 200] [--no-fold]

Builds a run of that many known prompts, each reported twice, and some steps of 256 prompts
after its newest snapshot; then starts a real scheduler on it, once from the snapshot and
once from the bare journal, and waits for its first line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import sqlalchemy as sa

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.journal.compaction import Retention

BATCH = 100_000


async def build(url: str, known: int, steps: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    reports = 2 * -(-known // BATCH)
    keep = Retention(10**9, 10**9, snapshot_calls=reports)
    async with open_service(url, retention=keep) as service:
        number = 0
        for visit in range(2):
            for start in range(0, known, BATCH):
                size = min(BATCH, known - start)
                await service.report(
                    pb.ReportRequest(
                        run_id="bench",
                        report_id=f"learn-{number}",
                        step=visit,
                        prompt_ids=[f"dataset/prompt-{i:08}" for i in range(start, start + size)],
                        prompt_indices=range(size),
                        num_rewards=[2] * size,
                        rewards=rng.integers(0, 2, 2 * size),
                    )
                )
                number += 1
        await service.settled()
        start = time.perf_counter()
        run = service._runs._loaded["bench"]
        copied = run.state.frozen()
        copy_seconds = time.perf_counter() - start
        del copied
        service._runs._snapshots._thread.submit(lambda: None).result()
        for step in range(2, 2 + steps):
            ids = [f"dataset/prompt-{i:08}" for i in rng.choice(known, 256, replace=False)]
            answer = await service.allocate(
                pb.AllocateRequest(
                    run_id="bench", step=step, request_id=f"{step}", prompt_ids=ids,
                    total_rollouts=2048,
                )
            )  # fmt: skip
            await service.report(
                pb.ReportRequest(
                    run_id="bench", report_id=f"{step}", allocation_id=answer.allocation_id,
                    prompt_indices=range(256), num_rewards=answer.num_rollouts,
                    rewards=rng.integers(0, 2, 2048),
                )
            )  # fmt: skip
    return {"copy": copy_seconds}


def serve(url: str) -> tuple[float, float, float]:
    """Return seconds to the first line, and CPU seconds and resident bytes then."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "knapsack_scheduler.cli", "serve", f"--store={url}",
         "--log-level=error",
         *(f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen"))],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        json.loads(process.stdout.readline())
        seconds = time.perf_counter() - start
        used = psutil.Process(process.pid)
        return seconds, sum(used.cpu_times()[:2]), used.memory_info().rss
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def show(name: str, start: tuple[float, float, float]) -> None:
    seconds, cpu, memory = start
    print(f"{name:<14} {seconds:>8.1f} {cpu:>8.1f} {memory / 1e6:>8,.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--known", type=int, default=1_000_000, help="prompts the run has seen")
    parser.add_argument("--steps", type=int, default=200, help="steps after the snapshot")
    parser.add_argument("--no-fold", action="store_true", help="do not start without snapshot too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.db"
        url = f"sqlite:///{file}"
        empty = serve(f"sqlite:///{Path(folder) / 'empty.db'}")
        took = asyncio.run(build(url, arguments.known, arguments.steps))
        engine = sa.create_engine(url)
        with engine.begin() as connection:
            size = connection.exec_driver_sql("SELECT max(size) FROM snapshots").scalar()
        print(f"{arguments.known:,} known prompts, {2 * arguments.steps} calls after the snapshot")
        print(f"file {file.stat().st_size / 1e6:,.0f} MB, newest snapshot {size / 1e6:,.0f} MB, "
              f"copied in {took['copy']:.2f} s")  # fmt: skip
        print(f"{'start':<14} {'seconds':>8} {'CPU':>8} {'MB':>8}")
        show("empty store", empty)
        snapshot = serve(url)
        show("snapshot", snapshot)
        if not arguments.no_fold:
            with engine.begin() as connection:
                for table in ("snapshots", "snapshot_parts"):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
            folded = serve(url)
            show("bare journal", folded)
            print(f"the snapshot takes {snapshot[1] / folded[1]:.2f} of the CPU")
        engine.dispose()


if __name__ == "__main__":
    main()

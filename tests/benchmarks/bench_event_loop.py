"""How long large requests keep the scheduler's event loop from everything else.

    python tests/benchmarks/bench_event_loop.py [--prompts 10000] [--calls 60]

A real scheduler process in which a task wakes up every millisecond and notes how late it
is; a second process sends Allocate and Report of ``--prompts`` prompts one after the other.
A late wake-up is a blocked event loop, or a machine that had something else to do: the
same is measured while nothing is asked, to tell them apart.
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

import grpc
import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc

MEAN = 8
TICK = 0.001
OPTIONS = [("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26)]


async def serve(store: str) -> list[tuple[float, float]]:
    from knapsack_scheduler import server
    from knapsack_scheduler.config import load_settings

    late: list[tuple[float, float]] = []

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            late.append((time.time(), loop.time() - due))

    any_port = "127.0.0.1:0"
    flags = {"listen": any_port, "admin_listen": any_port, "health_listen": any_port}
    settings = load_settings({**flags, "store": store, "log_level": "error"}, None)
    watching = asyncio.create_task(watch())
    await server.serve(settings)
    watching.cancel()
    return late


def ask(stub: rpc.BudgetSchedulerStub, prompts: int, calls: int) -> None:
    rng = np.random.default_rng(0)
    stub.CreateRun(pb.CreateRunRequest(run_id="bench"))
    ids = [f"prompt-{i}" for i in range(prompts)]
    for step in range(calls):
        answer = stub.Allocate(
            pb.AllocateRequest(
                run_id="bench",
                step=step,
                request_id=f"{step}",
                prompt_ids=ids,
                total_rollouts=MEAN * prompts,
            )
        )
        stub.Report(
            pb.ReportRequest(
                run_id="bench",
                allocation_id=answer.allocation_id,
                report_id=f"{step}",
                policy_version=step,
                prompt_indices=range(prompts),
                num_rewards=answer.num_rollouts,
                rewards=rng.integers(0, 2, MEAN * prompts),
                completion_tokens=rng.integers(10, 1000, MEAN * prompts),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--idle", type=float, default=5.0, help="seconds without requests")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        store, signals = arguments.serve
        late = asyncio.run(serve(store))
        Path(signals).write_text(json.dumps(late))
        return
    with tempfile.TemporaryDirectory() as folder:
        signals = Path(folder) / "late.json"
        store = f"sqlite:///{folder}/bench.db"
        command = [sys.executable, __file__, "--serve", store, str(signals)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["listen"]
        time.sleep(arguments.idle)
        begun = time.time()
        with grpc.insecure_channel(address, OPTIONS) as channel:
            ask(rpc.BudgetSchedulerStub(channel), arguments.prompts, arguments.calls)
        ended = time.time()
        process.terminate()
        process.wait(60)
        process.stdout.close()
        late = json.loads(signals.read_text())
    print(f"event loop late by, ms ({arguments.calls} Allocate and Report, {arguments.prompts:,})")
    print(f"{'':<10} {'wake-ups':>9} {'p50':>7} {'p99':>7} {'p99.9':>7} {'most':>7}")
    phases = {"idle": (0.0, begun), "requests": (begun, ended)}
    for name, (start, end) in phases.items():
        times = 1e3 * np.array([by for at, by in late if start <= at < end])
        cells = [*np.percentile(times, [50, 99, 99.9]), times.max()]
        print(f"{name:<10} {times.size:>9,} " + " ".join(f"{cell:>7.2f}" for cell in cells))


if __name__ == "__main__":
    main()

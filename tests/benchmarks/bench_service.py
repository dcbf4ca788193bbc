"""Speed of Allocate and Report over the wire, next to a bare grpc.aio echo, in one run.

    python tests/benchmarks/bench_service.py [--sizes 256 2000] [--known 10000 1000000]

The echo is a grpc.aio server process that reads the same requests and sends answers with
the same fields and of the same size, and does nothing else; what is above it is the
scheduler's own work: the solver and the journal's commit to disk. Calls alternate between
the two servers. The scheduler answers what is stored and folds it afterwards, so each of its
calls is followed by a GetRun, which waits for that: nothing is left to do while the echo is
timed, and "ready" is the time from the call until the answer to this GetRun. The last column
is the p50 next to that of the same call with the fewest known prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc

MEAN = 8
OPTIONS = [("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26)]


SUMMARY = pb.AllocationSummary(
    policy="posterior", objective="paper", effective_group_rate=0.7, effective_rollout_rate=0.8,
    value=30.0, uniform_value=20.0, value_upper_bound=30.0, price=0.01, largest_group=20,
    prior_alpha=0.5, prior_beta=0.5, expected_tokens=1e6,
)  # fmt: skip


class Echo(rpc.BudgetSchedulerServicer):
    async def Allocate(self, request: Any, context: Any) -> pb.Allocation:
        count = len(request.prompt_ids)
        return pb.Allocation(
            allocation_id="a-0123456789abcdef01234567",
            run_id=request.run_id,
            step=request.step,
            wave=1,
            num_rollouts=[MEAN] * count,
            allocated_rollouts=MEAN * count,
            summary=SUMMARY,
        )

    async def Report(self, request: Any, context: Any) -> pb.ReportResponse:
        return pb.ReportResponse(accepted_rollouts=len(request.rewards))


async def serve_echo() -> None:
    server = grpc.aio.server(options=OPTIONS)
    rpc.add_BudgetSchedulerServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"listen": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


@contextmanager
def server(*command: str) -> Iterator[Any]:
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(process.stdout.readline())["listen"]
        with grpc.insecure_channel(address, OPTIONS) as channel:
            yield rpc.BudgetSchedulerStub(channel)
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def timed(times: list[float], call: Any, request: Any) -> Any:
    start = time.perf_counter()
    answer = call(request)
    times.append(time.perf_counter() - start)
    return answer


def learn(stub: Any, known: int, rng: np.random.Generator) -> None:
    stub.CreateRun(pb.CreateRunRequest(run_id="bench"))
    for start in range(0, known, 10_000):
        size = min(10_000, known - start)
        rewards = rng.integers(0, 2, size * MEAN)
        stub.Report(
            pb.ReportRequest(
                run_id="bench",
                report_id=f"learn-{start}",
                prompt_ids=[f"prompt-{i}" for i in range(start, start + size)],
                prompt_indices=range(size),
                num_rewards=[MEAN] * size,
                rewards=rewards,
            )
        )


def both(
    times: dict[tuple[str, str], list[float]], call: str, request: Any, scheduler: Any, echo: Any
) -> Any:
    """Time a call of both servers, the scheduler's until it is ready for the next one too."""
    start = time.perf_counter()
    answer = timed(times.setdefault((call, "scheduler"), []), getattr(scheduler, call), request)
    scheduler.GetRun(pb.GetRunRequest(run_id=request.run_id))
    times.setdefault((call, "ready"), []).append(time.perf_counter() - start)
    echoed = timed(times.setdefault((call, "echo"), []), getattr(echo, call), request)
    assert abs(echoed.ByteSize() - answer.ByteSize()) < 32 + 0.02 * answer.ByteSize()
    return answer


def measure(
    scheduler: Any, echo: Any, size: int, known: int, steps: range, fewest: dict[Any, float]
) -> None:
    rng = np.random.default_rng(size)
    times: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        ids = [f"prompt-{i}" for i in rng.choice(known, size, replace=False)]
        request = pb.AllocateRequest(
            run_id="bench",
            step=step,
            request_id=f"{size}-{step}",
            prompt_ids=ids,
            total_rollouts=MEAN * size,
        )
        answer = both(times, "Allocate", request, scheduler, echo)
        report = pb.ReportRequest(
            run_id="bench",
            allocation_id=answer.allocation_id,
            report_id=f"{size}-{step}",
            policy_version=step,
            prompt_indices=range(size),
            num_rewards=answer.num_rollouts,
            rewards=rng.integers(0, 2, MEAN * size),
            completion_tokens=rng.integers(10, 1000, MEAN * size),
        )
        both(times, "Report", report, scheduler, echo)
    for call in ("Allocate", "Report"):
        cells = []
        for name in ("scheduler", "echo"):
            values = sorted(times[call, name][3:])
            cells += [statistics.median(values), values[int(0.99 * len(values))]]
        cells.append(statistics.median(times[call, "ready"][3:]))
        growth = cells[0] / fewest.setdefault((call, size), cells[0])
        print(
            f"{call:<9} {size:>8,} {known:>10,} "
            + " ".join(f"{1e3 * seconds:>9.2f}" for seconds in cells)
            + f" {cells[0] / cells[2]:>8.1f}x {growth:>6.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2000, 10_000])
    parser.add_argument(
        "--known", type=int, nargs="+", default=[10_000, 1_000_000],
        help="prompts the run has seen",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        asyncio.run(serve_echo())
        return
    print(f"{MEAN} rollouts per prompt, milliseconds")
    print(
        f"{'call':<9} {'prompts':>8} {'known':>10} {'p50':>9} {'p99':>9} {'echo p50':>9} "
        f"{'echo p99':>9} {'ready p50':>9} {'p50':>9} {'growth':>7}"
    )
    fewest: dict[Any, float] = {}
    for known in arguments.known:
        with (
            tempfile.TemporaryDirectory() as folder,
            server(*scheduler_command(Path(folder) / "bench.db")) as scheduler,
            server(__file__, "--echo") as echo,
        ):
            learn(scheduler, known, np.random.default_rng(0))
            steps = arguments.repeat + 3
            for turn, size in enumerate(arguments.sizes):
                # As in training, no step comes again.
                of_size = range(turn * steps, (turn + 1) * steps)
                measure(scheduler, echo, size, known, of_size, fewest)


def scheduler_command(store: Path) -> list[str]:
    ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
    return [
        "-m", "knapsack_scheduler.cli", "serve", f"--store=sqlite:///{store}",
        "--auto-create-runs", "--log-level=error", *ports,
    ]  # fmt: skip


if __name__ == "__main__":
    main()

"""What large requests leave to the event loop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import grpc

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.config import load_settings
from knapsack_scheduler.server import Server

PROMPTS = 20_000


class Counting:
    """Counts the functions, Python's and C's, that this thread calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take what the interpreter says of a call."""
        if event in ("call", "c_call"):
            self.calls += 1

    def __enter__(self) -> Counting:
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)


async def test_the_event_loop_does_nothing_per_prompt(tmp_path: Path) -> None:
    """Twenty thousand prompts, metrics and logs included, cost it fewer calls than prompts."""
    any_port = "127.0.0.1:0"
    flags = {
        "listen": any_port,
        "admin_listen": any_port,
        "health_listen": any_port,
        "store": f"sqlite:///{tmp_path / 'stats.db'}",
        "auto_create_runs": True,
    }
    server = Server(load_settings(flags, None))
    await server.start()
    ids = [f"prompt-{k}" for k in range(PROMPTS)]
    try:
        with grpc.insecure_channel(server.addresses["listen"]) as channel:
            stub = rpc.BudgetSchedulerStub(channel)
            # The first calls of a run make its series.
            first = pb.AllocateRequest(
                run_id="run", request_id="first", prompt_ids=["a", "b"], total_rollouts=8
            )
            answer = await asyncio.to_thread(stub.Allocate, first)
            report = pb.ReportRequest(
                run_id="run",
                allocation_id=answer.allocation_id,
                report_id="first",
                prompt_indices=[0, 1],
                num_rewards=answer.num_rollouts,
                rewards=[1.0, 0.0] * 4,
            )
            await asyncio.to_thread(stub.Report, report)
            for step in range(2):
                request = pb.AllocateRequest(
                    run_id="run",
                    step=step,
                    request_id=f"{step}",
                    prompt_ids=ids,
                    total_rollouts=4 * PROMPTS,
                )
                with Counting() as allocate:
                    answer = await asyncio.to_thread(stub.Allocate, request)
                report = pb.ReportRequest(
                    run_id="run",
                    allocation_id=answer.allocation_id,
                    report_id=f"{step}",
                    prompt_indices=range(PROMPTS),
                    num_rewards=answer.num_rollouts,
                    rewards=[1.0, 0.0] * (2 * PROMPTS),
                )
                with Counting() as reported:
                    receipt = await asyncio.to_thread(stub.Report, report)
                assert receipt.accepted_rollouts == 4 * PROMPTS
                # Some two thousand, and more where it waits longer.
                assert allocate.calls < PROMPTS / 2, allocate.calls
                assert reported.calls < PROMPTS / 2, reported.calls
    finally:
        await server.stop(1.0)

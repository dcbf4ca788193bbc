"""A real server under mutated requests: the right refusal, no crash, no leak."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from fuzzing import SERVICE, Fuzzed, Fuzzer

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "15000"))
PIPELINE = 32
ATTEMPTS = 5
LOST_STATUS = "Internal error from Core"
WARM_UP = REQUESTS // 4
GROWTH_BYTES = 40 * 2**20
"""Of 11,000 calls that leave some 4,000 entries and 300 prompts in each of four runs."""


async def fuzz(address: str, seed: int, requests: int) -> int:
    """Make calls, several at a time; returns how many were answered OK."""
    fuzzer = Fuzzer(seed)
    wrong: list[tuple[Fuzzed, Any]] = []
    answered = 0
    async with grpc.aio.insecure_channel(address) as channel:
        methods = {
            method.name: (
                channel.stream_unary(f"/{SERVICE.full_name}/{method.name}")
                if method.client_streaming
                else channel.unary_unary(f"/{SERVICE.full_name}/{method.name}")
            )
            for method in SERVICE.methods
        }

        async def worker(count: int) -> None:
            nonlocal answered
            for _ in range(count):
                call = fuzzer.next()
                stub: Any = methods[call.method]
                streams = call.method == "ImportOutcomes"
                for _ in range(ATTEMPTS):
                    try:
                        answer = await stub(
                            iter(call.data) if streams else call.data[0], timeout=60
                        )
                        code = grpc.StatusCode.OK
                        fuzzer.answered(call, answer)
                        answered += 1
                    except grpc.aio.AioRpcError as error:
                        code, answer = error.code(), error.details()
                    # grpc.aio's client puts this over the server's status where its write meets
                    # a refusal of the messages before it (grpc/grpc#36066).
                    if not (streams and answer == LOST_STATUS):
                        break
                if code not in call.codes:
                    wrong.append((call, (code, answer)))
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(PIPELINE):
                group.create_task(worker(requests // PIPELINE))
    assert not wrong, wrong[:3]
    return answered


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_mutated_requests_are_refused_rightly_and_leave_no_memory_behind(
    start_scheduler: Any,
) -> None:
    """Never INTERNAL, UNKNOWN or UNAVAILABLE; what is never allowed is INVALID_ARGUMENT."""
    # In memory where there is such a folder: a disk that is slow finds no more faults.
    memory = Path("/dev/shm")
    store = str(memory / f"fuzz-{os.getpid()}.db") if memory.is_dir() else "fuzz.db"
    scheduler = start_scheduler("--auto-create-runs", "--log-level", "error", store=store)
    try:
        process = psutil.Process(scheduler.process.pid)
        assert asyncio.run(fuzz(scheduler.addresses["listen"], 1, WARM_UP))
        warm = process.memory_info().rss
        answered = asyncio.run(fuzz(scheduler.addresses["listen"], 2, REQUESTS - WARM_UP))
        grown = process.memory_info().rss - warm
        assert answered > (REQUESTS - WARM_UP) // 8
        assert grown < GROWTH_BYTES * max(1, REQUESTS // 15_000)
        assert scheduler.process.poll() is None
        assert "Traceback" not in scheduler.log()
        assert scheduler.log() == ""
    finally:
        scheduler.close()
        for file in memory.glob(f"fuzz-{os.getpid()}*"):
            file.unlink()

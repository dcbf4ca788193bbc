"""A scheduler that starts: alive at once, ready when its runs are loaded."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.config import Settings
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.server import Server
from knapsack_scheduler.service import SchedulerService

ANY = "127.0.0.1:0"


@pytest.fixture
async def store(tmp_path: Path, calls) -> Path:
    """File of a store with three runs, written to one after the other."""
    file = tmp_path / "stats.db"
    async with open_service(f"sqlite:///{file}") as service:
        for run_id in ("a", "b", "c"):
            calls.run_id = run_id
            await service.report(calls.own_report(["x"], [[1.0]], 0, report_id=run_id))
        calls.run_id = "b"
        await service.report(calls.own_report(["x"], [[1.0]], 1, report_id="later"))
    return file


def test_a_service_in_the_process_leaves_the_log_of_its_trainer_alone() -> None:
    """One that shows what any library tells of itself."""
    trainer = """
import asyncio, logging
logging.basicConfig(level=logging.INFO)
from knapsack_scheduler.embedded import open_service
async def main():
    async with open_service("sqlite://"):
        pass
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", trainer], capture_output=True, check=True)
    assert done.stderr == b""


async def test_it_is_alive_while_it_loads_and_ready_afterwards(store: Path, monkeypatch) -> None:
    """A probe sees NOT_SERVING until the first call would be answered at once."""
    loading, go_on = asyncio.Event(), asyncio.Event()
    preload = SchedulerService.preload

    async def slow(service: SchedulerService, count: int) -> None:
        loading.set()
        await go_on.wait()
        await preload(service, count)

    monkeypatch.setattr(SchedulerService, "preload", slow)
    settings = Settings(
        listen=ANY, admin_listen=ANY, health_listen=ANY, store=f"sqlite:///{store}", preload_runs=2
    )
    server = Server(settings)
    starting = asyncio.ensure_future(server.start())
    await loading.wait()
    async with grpc.aio.insecure_channel(server.addresses["health"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> str:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

        assert [await status(""), await status("liveness")] == ["NOT_SERVING", "SERVING"]
        assert "listen" not in server.addresses
        go_on.set()
        await starting
        assert [await status(""), await status("liveness")] == ["SERVING", "SERVING"]
        # Those that were written to last, and no more than were asked for.
        assert set(server._service._runs._loaded) == {"b", "c"}
    await server.stop(0)


async def test_a_run_that_cannot_be_loaded_keeps_no_other_from_being_served(
    store: Path, caplog
) -> None:
    """It is named in the log, and refused when it is asked for."""
    with sqlite3.connect(store) as database:
        database.execute(
            "UPDATE entries SET kind = 'nonsense' WHERE run_key = "
            "(SELECT run_key FROM runs WHERE run_id = 'b')"
        )
    database.close()
    async with open_service(f"sqlite:///{store}") as service:
        await service.preload(8)
        assert set(service._runs._loaded) == {"a", "c"}
        assert "run 'b' cannot be loaded" in caplog.text
        run = await service.get_run(pb.GetRunRequest(run_id="a"))
        assert run.total_rollouts == 1
        with pytest.raises(StoreUnavailable, match="run 'b': entry 1 is damaged"):
            await service.get_run(pb.GetRunRequest(run_id="b"))

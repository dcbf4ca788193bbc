"""What goes on after its caller has gone is done, and seen in the log if it fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from served import served

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.events import CallHandled
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.protection import finished
from knapsack_scheduler.rpc import SchedulerServicer

from gates import Gate


class Failing:
    """Work that begins, waits to be let go on, and fails."""

    def __init__(self, error: Exception) -> None:
        self.begun, self.go_on, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._error = error

    async def work(self, *_arguments: object) -> Any:
        """Fail when told to."""
        self.begun.set()
        try:
            await self.go_on.wait()
            raise self._error
        finally:
            self.ended.set()


@pytest.mark.parametrize("error", [ValueError("broken"), InvalidArgument("step", -1, "wrong")])
async def test_an_error_in_process(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """An error is logged; a refusal, which is the caller's fault, is not."""
    failing = Failing(error)
    caller = asyncio.create_task(finished(failing.work(), set()))
    await failing.begun.wait()
    caller.cancel()
    await asyncio.wait([caller])
    failing.go_on.set()
    await failing.ended.wait()
    # The work has ended; who waits for it goes on in the same turn of the event loop.
    assert ("broken" in caplog.text) == isinstance(error, ValueError)


async def test_an_error_over_the_wire(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a call whose client has cancelled it."""
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}") as service:
        failing = Failing(ValueError("broken"))
        service.get_run = failing.work  # type: ignore[method-assign]
        gone = asyncio.Event()
        service.events.listen(lambda event: isinstance(event, CallHandled) and gone.set())
        async with served(SchedulerServicer(service, Limits())) as address:
            async with grpc.aio.insecure_channel(address) as channel:
                stub: Any = rpc.BudgetSchedulerStub(channel)
                call = stub.GetRun(pb.GetRunRequest(run_id="run"))
                asked = asyncio.ensure_future(call.code())
                await failing.begun.wait()
                call.cancel()
                await asked
            await gone.wait()
            failing.go_on.set()
    assert "after its caller had gone" in caplog.text
    assert "broken" in caplog.text


async def test_a_call_whose_caller_has_gone_is_done_before_the_store_is_closed(
    tmp_path: Path, calls: Any, gate: Gate
) -> None:
    """Also when it had come no further than to the reading of its run."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url) as service:
        await service.create_run(pb.CreateRunRequest(run_id="run"))
        runs = service._runs
        runs._loaded.clear()
        runs._fetch = gate.before(runs._fetch, lambda _run_id: True)  # type: ignore[method-assign]
        caller = asyncio.create_task(service.report(calls.own_report(["a"], [[1.0]])))
        await gate.reached(1)
        caller.cancel()
        await asyncio.wait([caller])
        # Once the service is being closed.
        asyncio.get_running_loop().call_soon(gate.open)
    async with open_service(url) as service:
        assert (await service.get_run(pb.GetRunRequest(run_id="run"))).total_rollouts == 1

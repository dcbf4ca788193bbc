"""A scheduler that fails on demand, real schedulers, and bounded waiting."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc

from held_port import HeldPort
from real_scheduler import PATIENCE, outbox_folder, scheduler, shared_scheduler

__all__ = ["outbox_folder", "scheduler", "shared_scheduler"]

Step = grpc.StatusCode | threading.Event | None
"""What happens to one call: a status, a hang until an event, or an answer (None)."""


class ScriptedScheduler(rpc.BudgetSchedulerServicer):
    """Divides evenly, counts reports once each, and fails where it was told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.metadata: list[dict[str, str]] = []
        self.runs: dict[str, pb.RunConfig] = {}
        self.allocations: dict[str, pb.AllocateRequest] = {}
        self.reports: dict[str, pb.ReportRequest] = {}
        self.rewinds: list[int] = []
        self.auto_create = True
        self._steps: dict[str, deque[Step]] = defaultdict(deque)
        self._always: dict[str, Step] = {}
        self._lock = threading.Lock()

    def plan(self, call: str, *steps: Step) -> None:
        """Let the next calls of that name go like this, one after the other."""
        self._steps[call].extend(steps)

    def always(self, call: str, step: Step) -> None:
        """Let every call of that name go like this; None lets them be answered again."""
        self._always[call] = step

    def names(self) -> list[str]:
        """Return the names of all calls so far."""
        return [name for name, _ in self.calls]

    def _play(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        with self._lock:
            self.calls.append((name, request))
            self.metadata.append({k: str(v) for k, v in context.invocation_metadata()})
            steps = self._steps[name]
            step = steps.popleft() if steps else self._always.get(name)
        if isinstance(step, threading.Event):
            while context.is_active() and not step.wait(0.02):
                pass
        elif step is not None:
            context.abort(step, "injected")

    def _known(self, run_id: str, context: grpc.ServicerContext) -> None:
        if run_id not in self.runs:
            if not self.auto_create:
                context.abort(grpc.StatusCode.NOT_FOUND, f"run_id = {run_id!r}: no such run")
            self.runs[run_id] = pb.RunConfig()

    def CreateRun(self, request: Any, context: grpc.ServicerContext) -> pb.Run:
        """Create a run, or find it the same."""
        self._play("CreateRun", request, context)
        known = self.runs.setdefault(request.run_id, request.config)
        if known != request.config:
            # In the words of the real one, which names what differs.
            differs = ", ".join(
                f"{name} is {getattr(known, name)!r}, asked for {getattr(request.config, name)!r}"
                for name in ("policy", "objective")
            )
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"exists with another config: {differs}")
        return pb.Run(run_id=request.run_id, config=known)

    def GetRun(self, request: Any, context: grpc.ServicerContext) -> pb.Run:
        """Return a run."""
        self._play("GetRun", request, context)
        self._known(request.run_id, context)
        return pb.Run(run_id=request.run_id, config=self.runs[request.run_id])

    def Allocate(self, request: Any, context: grpc.ServicerContext) -> pb.Allocation:
        """Divide evenly."""
        self._play("Allocate", request, context)
        self._known(request.run_id, context)
        count = len(request.prompt_ids)
        total = request.total_rollouts
        first = int(total * request.wave_fraction + 0.5) if request.wave_fraction else total
        sizes = [first // count + (i < first % count) for i in range(count)]
        allocation_id = f"a{len(self.allocations)}"
        self.allocations[allocation_id] = request
        return pb.Allocation(
            allocation_id=allocation_id,
            run_id=request.run_id,
            step=request.step,
            wave=1,
            num_rollouts=sizes,
            allocated_rollouts=first,
            remaining_rollouts=total - first,
            summary=pb.AllocationSummary(policy="scripted"),
        )

    def Extend(self, request: Any, context: grpc.ServicerContext) -> pb.Allocation:
        """Give everybody one more."""
        self._play("Extend", request, context)
        before = self.allocations.get(request.allocation_id)
        if before is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such allocation")
        return pb.Allocation(
            allocation_id=request.allocation_id,
            run_id=request.run_id,
            step=before.step,
            wave=2,
            num_rollouts=[1] * len(before.prompt_ids),
            allocated_rollouts=len(before.prompt_ids),
        )

    def Report(self, request: Any, context: grpc.ServicerContext) -> pb.ReportResponse:
        """Count a report once."""
        self._play("Report", request, context)
        self._known(request.run_id, context)
        if request.allocation_id and request.allocation_id not in self.allocations:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such allocation")
        with self._lock:
            self.reports.setdefault(request.report_id, request)
        return pb.ReportResponse(accepted_rollouts=len(request.rewards))

    def RewindRun(self, request: Any, context: grpc.ServicerContext) -> pb.Run:
        """Note the step."""
        self._play("RewindRun", request, context)
        self._known(request.run_id, context)
        self.rewinds.append(request.step)
        return pb.Run(run_id=request.run_id, last_step=request.step)

    def ListPromptStats(self, request: Any, context: Any) -> pb.ListPromptStatsResponse:
        """Return five prompts in pages of two."""
        self._play("ListPromptStats", request, context)
        start = int(request.page_token or 0)
        names = [f"p{i}" for i in range(5)][start : start + 2]
        return pb.ListPromptStatsResponse(
            prompt_ids=names,
            total_rollouts=[2] * len(names),
            total_successes=[1] * len(names),
            last_step=[0] * len(names),
            last_policy_version=[0] * len(names),
            posterior_alpha=[1.5] * len(names),
            posterior_beta=[1.5] * len(names),
            mean_completion_tokens=[0.0] * len(names),
            next_page_token=str(start + 2) if start + 2 < 5 else "",
        )


class ScriptedServer:
    """The scripted scheduler on a port of its own; may be stopped and started again.

    Attributes:
        scheduler: that answers.
        address: where it listens.
    """

    def __init__(self) -> None:
        self.scheduler = ScriptedScheduler()
        self._server: grpc.Server | None = None
        self._port = HeldPort()
        self.address = self._port.address
        self.start()

    def start(self) -> None:
        """Listen, at the same address each time."""
        server = grpc.server(
            ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)], maximum_concurrent_rpcs=16
        )
        rpc.add_BudgetSchedulerServicer_to_server(self.scheduler, server)
        server.add_insecure_port(self.address)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Break every connection and stop listening."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(0).wait()

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._port.close()


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    """A scheduler that fails on demand."""
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """A function that waits until a condition holds, or fails."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come to hold"
            threading.Event().wait(0.01)

    return wait

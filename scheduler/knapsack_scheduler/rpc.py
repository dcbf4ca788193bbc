"""The service as gRPC: one method per call, and the one place where errors become status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.errors import SchedulerError
from knapsack_scheduler.events import CallHandled, Events
from knapsack_scheduler.service import SchedulerService

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Guard = Callable[[Any, Context], None]


class SchedulerServicer(rpc.BudgetSchedulerServicer):
    """Hands calls to the service; ``guard`` refuses those without a right to them."""

    def __init__(self, service: SchedulerService, guard: Guard | None = None) -> None:
        self._service = service
        self._events = service.events
        self._guard = guard

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.Run:
        """Answer CreateRun."""
        return await self._call("CreateRun", request, context, self._service.create_run)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.Run:
        """Answer GetRun."""
        return await self._call("GetRun", request, context, self._service.get_run)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """Answer ListRuns."""
        return await self._call("ListRuns", request, context, self._service.list_runs)

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        """Answer DeleteRun."""
        return await self._call("DeleteRun", request, context, self._service.delete_run)

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.Allocation:
        """Answer Allocate."""
        return await self._call("Allocate", request, context, self._service.allocate)

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.Allocation:
        """Answer Extend."""
        return await self._call("Extend", request, context, self._service.extend)

    async def Report(self, request: pb.ReportRequest, context: Any) -> pb.ReportResponse:
        """Answer Report."""
        return await self._call("Report", request, context, self._service.report)

    async def RewindRun(self, request: pb.RewindRunRequest, context: Any) -> pb.Run:
        """Answer RewindRun."""
        return await self._call("RewindRun", request, context, self._service.rewind_run)

    async def ListPromptStats(
        self, request: pb.ListPromptStatsRequest, context: Any
    ) -> pb.ListPromptStatsResponse:
        """Answer ListPromptStats."""
        return await self._call(
            "ListPromptStats", request, context, self._service.list_prompt_stats
        )

    async def ImportOutcomes(
        self, request_iterator: Any, context: Any
    ) -> pb.ImportOutcomesResponse:
        """Answer ImportOutcomes."""

        async def guarded() -> Any:
            async for message in request_iterator:
                self._check(message, context)
                yield message

        return await self._call(
            "ImportOutcomes", guarded(), context, self._service.import_outcomes, checked=True
        )

    def _check(self, request: Any, context: Context) -> None:
        if self._guard is not None:
            self._guard(request, context)

    async def _call(
        self,
        method: str,
        request: Any,
        context: Any,
        handler: Callable[[Any], Awaitable[Answer]],
        *,
        checked: bool = False,
    ) -> Answer:
        start = time.perf_counter()
        code, message = "OK", ""
        try:
            if not checked:
                self._check(request, context)
            return await handler(request)
        except SchedulerError as error:
            code, message = error.code, str(error)
            await _abort(context, error.code, message)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code, message = "INTERNAL", "the scheduler failed; its log says why"
            _LOG.exception("%s failed", method)
            await _abort(context, code, message)
        finally:
            _emit(self._events, method, code, message, request, start)


async def _abort(context: Context, code: str, message: str) -> NoReturn:
    """End the call with a status; raises, so that no handler goes on."""
    await context.abort(grpc.StatusCode[code], message)


def _emit(events: Events, method: str, code: str, message: str, request: Any, start: float) -> None:
    events.emit(
        CallHandled(
            method,
            code,
            time.perf_counter() - start,
            str(getattr(request, "run_id", "")),
            str(getattr(request, "request_id", "") or getattr(request, "report_id", "")),
            message,
        )
    )

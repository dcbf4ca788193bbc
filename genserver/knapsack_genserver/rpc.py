"""The service as gRPC, and the one place where errors become status."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio

from knapsack_genserver.errors import GeneratorError
from knapsack_genserver.events import CallHandled, Events
from knapsack_genserver.service import GeneratorService
from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc

_LOG = logging.getLogger(__name__)
_FAILED = "the generation server failed; its log says why"

Answer = TypeVar("Answer")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GeneratorServicer(rpc.RolloutGeneratorServicer):
    """Hands calls to the service."""

    def __init__(self, service: GeneratorService, events: Events) -> None:
        self._service = service
        self._events = events

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Answer Generate."""
        await self._stream(
            "Generate", context, self._service.generate(request), lambda: request.request_id
        )

    async def GenerateSession(
        self, requests: AsyncIterator[pb.GenerateSessionRequest], context: Context
    ) -> None:
        """Answer GenerateSession."""
        request_id = ""

        async def noted() -> AsyncIterator[pb.GenerateSessionRequest]:
            nonlocal request_id
            async for request in requests:
                request_id = request_id or request.open.request_id
                yield request

        await self._stream(
            "GenerateSession",
            context,
            self._service.generate_session(noted()),
            lambda: request_id,
        )

    async def _stream(
        self,
        method: str,
        context: Context,
        answers: AsyncGenerator[Answer, None],
        request_id: Callable[[], str],
    ) -> None:
        """Write answers as they come; whatever ends the call ends the work at once."""
        start = time.perf_counter()
        code, message, reason = "OK", "", ""
        try:
            async with aclosing(answers):
                async for answer in answers:
                    await context.write(answer)
        except GeneratorError as error:
            code, message, reason = error.code, str(error), error.reason
            await _abort(context, code, message)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code, message, reason = "INTERNAL", _FAILED, "internal"
            _LOG.exception("%s failed", method)
            await _abort(context, code, message)
        finally:
            self._ended(method, code, message, start, request_id(), reason)

    async def UpdateWeights(
        self, request: pb.UpdateWeightsRequest, context: Any
    ) -> pb.WeightStatus:
        """Answer UpdateWeights."""
        return await self._call("UpdateWeights", request, context, self._service.update_weights)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GeneratorStatus:
        """Answer GetStatus."""
        return await self._call("GetStatus", request, context, self._service.get_status)

    async def _call(
        self,
        method: str,
        request: Any,
        context: Context,
        handler: Callable[[Any], Awaitable[Answer]],
    ) -> Answer:
        start = time.perf_counter()
        code, message, reason = "OK", "", ""
        try:
            return await handler(request)
        except GeneratorError as error:
            code, message, reason = error.code, str(error), error.reason
            await _abort(context, code, message)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:
            code, message, reason = "INTERNAL", _FAILED, "internal"
            _LOG.exception("%s failed", method)
            await _abort(context, code, message)
        finally:
            self._ended(method, code, message, start, "", reason)

    def _ended(
        self, method: str, code: str, message: str, start: float, request_id: str, reason: str
    ) -> None:
        seconds = time.perf_counter() - start
        self._events.emit(CallHandled(method, code, seconds, request_id, message, reason))


async def _abort(context: Context, code: str, message: str) -> NoReturn:
    """End the call with a status; raises, so that no handler goes on."""
    await context.abort(grpc.StatusCode[code], message)

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
from google.protobuf.message import DecodeError, Message

from knapsack_genserver.errors import GeneratorError, InvalidArgument
from knapsack_genserver.events import CallHandled, Events
from knapsack_genserver.service import GeneratorService
from knapsack_proto.v1 import generation_pb2 as pb

_LOG = logging.getLogger(__name__)
_MESSAGE_CHARACTERS = 600
"""Of a status: a header of more than 8 KB, percent-encoded, ends the call as INTERNAL."""
_FAILED = "the generation server failed; its log says why"

Answer = TypeVar("Answer")
Request = TypeVar("Request")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GeneratorServicer:
    """Hands calls to the service."""

    def __init__(self, service: GeneratorService, events: Events) -> None:
        self._service = service
        self._events = events

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Answer Generate."""
        await self._stream(
            "Generate",
            context,
            lambda: self._service.generate(_readable(request)),
            lambda: getattr(request, "request_id", ""),
        )

    async def GenerateSession(
        self, requests: AsyncIterator[pb.GenerateSessionRequest], context: Context
    ) -> None:
        """Answer GenerateSession."""
        request_id = ""

        async def noted() -> AsyncIterator[pb.GenerateSessionRequest]:
            nonlocal request_id
            async for request in requests:
                request_id = _readable(request).open.request_id or request_id
                yield request

        await self._stream(
            "GenerateSession",
            context,
            lambda: self._service.generate_session(noted()),
            lambda: request_id,
        )

    async def _stream(
        self,
        method: str,
        context: Context,
        begin: Callable[[], AsyncGenerator[Answer, None]],
        request_id: Callable[[], str],
    ) -> None:
        """Write answers as they come; whatever ends the call ends the work at once."""
        start = time.perf_counter()
        code, message, reason = "OK", "", ""
        try:
            async with aclosing(begin()) as answers:
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

    async def SetReplicas(self, request: pb.SetReplicasRequest, context: Any) -> pb.GeneratorStatus:
        """Answer SetReplicas."""
        return await self._call("SetReplicas", request, context, self._service.set_replicas)

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
            return await handler(_readable(request))
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


class _Unreadable:
    """Bytes that are no message; refused where refusals are counted."""

    def __init__(self, kind: type[Message], length: int) -> None:
        self.refusal = InvalidArgument(
            "request", f"{length} bytes", f"must be a serialised {kind.DESCRIPTOR.name}"
        )


def _reader(kind: type[Message]) -> Callable[[bytes], Message | _Unreadable]:
    def read(data: bytes) -> Message | _Unreadable:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _Unreadable(kind, len(data))

    return read


def _readable(request: Request) -> Request:
    """Return a request; InvalidArgument if it is none."""
    if isinstance(request, _Unreadable):
        raise request.refusal
    return request


def handlers_of(servicer: GeneratorServicer) -> grpc.GenericRpcHandler:
    """Return the handlers to add to a server.

    In place of the generated ones, which answer INTERNAL to bytes that are no message.
    """
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    service = pb.DESCRIPTOR.services_by_name["RolloutGenerator"]
    handlers = {}
    for method in service.methods:
        maker = makers[method.client_streaming, method.server_streaming]
        handlers[method.name] = maker(
            getattr(servicer, method.name),
            request_deserializer=_reader(getattr(pb, method.input_type.name)),
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


async def _abort(context: Context, code: str, message: str) -> NoReturn:
    """End the call with a status; raises, so that no handler goes on."""
    if len(message) > _MESSAGE_CHARACTERS:
        message = message[:_MESSAGE_CHARACTERS] + "..."
    await context.abort(grpc.StatusCode[code], message)

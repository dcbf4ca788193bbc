"""What anybody may ask for, with no token: health checks, and what the services look like.

Whoever asks is a stranger, so all of it together is bounded, apart from the calls of those
who are known: it takes none of their places and none of their room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from knapsack_scheduler.admission import PATIENCE_SECONDS, Admission, Ticket
from knapsack_scheduler.errors import InvalidArgument, ResourceExhausted, SchedulerError, TooSlow
from knapsack_scheduler.hangup import hang_up
from knapsack_scheduler.health import Health

MOST_CALLS = 64
"""Calls of each method at once."""

MESSAGE_BYTES = 4096
"""Bytes of a message: names of services and files are short."""

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_Write = Callable[[Message], Any]


class OpenServices:
    """Serves health checks, and reflection if there is something to describe.

    Args:
        health: what is answered.
        receiving_bytes: that a message may take before its size is known.
        messages: received at once.
        transfer_seconds: within which a message must arrive, or be taken.
        described: names of the services that reflection describes.
    """

    def __init__(
        self,
        health: Health,
        *,
        receiving_bytes: int,
        messages: int,
        transfer_seconds: float,
        described: Sequence[str] = (),
    ) -> None:
        self._health = health
        self._receiving_bytes = receiving_bytes
        self._room = Admission(messages * receiving_bytes)
        self._seconds = transfer_seconds
        self._reflection = reflection.aio.ReflectionServicer((*described, _HEALTH))
        self._is_described = bool(described)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve them on a server."""
        self._add(server, _HEALTH, {"Check": self._check, "Watch": self._watch})
        if self._is_described:
            name = reflection.SERVICE_NAME
            self._add(server, name, {"ServerReflectionInfo": self._reflect})

    def _add(self, server: grpc.aio.Server, service: str, methods: dict[str, Any]) -> None:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.stream_stream_rpc_method_handler(self._bounded(method))
            for name, method in methods.items()
        }
        generic = grpc.method_handlers_generic_handler(service, handlers)
        server.add_generic_rpc_handlers((generic,))

    def _bounded(self, method: Callable[[Any, _Write], Any]) -> Callable[[Any, Any], Any]:
        """Return a handler that is called by so many at once and waits for nobody for ever."""
        under_way = 0

        def ended(_task: object) -> None:
            nonlocal under_way
            under_way -= 1

        async def handle(_messages: object, context: Any) -> None:
            nonlocal under_way
            under_way += 1
            task = asyncio.current_task()
            assert task is not None
            # An answer that is not taken goes on after the handler.
            task.add_done_callback(ended)

            async def write(answer: Message) -> None:
                try:
                    async with asyncio.timeout(self._seconds):
                        await context.write(answer.SerializeToString())
                except TimeoutError:
                    await asyncio.to_thread(hang_up, context.peer())
                    raise TooSlow("the answer was not taken") from None

            try:
                if under_way > MOST_CALLS:
                    raise ResourceExhausted(f"{MOST_CALLS} such calls are under way; try again")
                await method(context, write)
            except SchedulerError as error:
                await context.abort(grpc.StatusCode[error.code], str(error))

        return handle

    async def _check(self, context: Any, write: _Write) -> None:
        await write(self._health.check((await self._read_one(context)).service))

    async def _watch(self, context: Any, write: _Write) -> None:
        async for status in self._health.watch((await self._read_one(context)).service):
            await write(status)

    async def _reflect(self, context: Any, write: _Write) -> None:
        async def requests() -> AsyncIterator[Any]:
            kind = reflection_pb2.ServerReflectionRequest
            while (request := await self._read(context, kind)) is not None:
                yield request

        async for answer in self._reflection.ServerReflectionInfo(requests(), context):
            await write(answer)

    async def _read_one(self, context: Any) -> Any:
        request = await self._read(context, health_pb2.HealthCheckRequest)
        if request is None:
            raise InvalidArgument("request", "", "must be one message")
        return request

    async def _read(self, context: Any, kind: type[Message]) -> Any:
        """Return the next message, None after the last one."""
        async with self._place(context) as ticket:
            async with ticket.transfer(self._seconds, "the request did not arrive whole"):
                data = await context.read()
            if data is grpc.aio.EOF:
                return None
            if (size := len(data)) > MESSAGE_BYTES:
                # An error holds the frames that it passed, and they what is in them.
                del data
                raise ResourceExhausted(
                    f"a message may hold {MESSAGE_BYTES} bytes here, this one has {size}"
                )
            try:
                return kind.FromString(data)
            except DecodeError:
                raise InvalidArgument(
                    "request", f"{size} bytes", f"must be a {kind.DESCRIPTOR.name}"
                ) from None

    @asynccontextmanager
    async def _place(self, context: Any) -> AsyncIterator[Ticket]:
        ticket = await self._room.admit(self._receiving_bytes, context.peer(), PATIENCE_SECONDS)
        try:
            yield ticket
        finally:
            ticket.close()

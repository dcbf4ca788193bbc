"""A call that is asked for more while it runs: requests in, rollouts and answers out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc

from knapsack_genserver import wire
from knapsack_genserver.call import Call
from knapsack_genserver.errors import GeneratorError, InvalidArgument, Unavailable
from knapsack_genserver.events import Events, SessionRefused
from knapsack_proto.v1 import generation_pb2 as pb

_UNREAD_ANSWERS = 64
"""Answers that a client may leave unread before its requests are no longer read."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a session may leave the server waiting.

    Attributes:
        opening_seconds: for its first request.
        idle_seconds: with no rollout under way and nothing asked.
    """

    opening_seconds: float = 60.0
    idle_seconds: float = 3600.0


class Session:
    """See the module.

    Args:
        call: the session's, opened.
        events: told what is refused.
        add: looks at an addition and begins it.
        stop: gives up groups; returns the indices of their rollouts that will not come.
        draining: whether the server takes on nothing any more.
        patience: how long it may leave the server waiting.
    """

    def __init__(
        self,
        call: Call,
        events: Events,
        add: Callable[[pb.AddRollouts], Awaitable[None]],
        stop: Callable[[set[int]], Awaitable[dict[int, list[int]]]],
        draining: Callable[[], bool],
        patience: Patience,
    ) -> None:
        self._call = call
        self._events = events
        self._add = add
        self._stop = stop
        self._draining = draining
        self._patience = patience
        self._room = asyncio.Semaphore(_UNREAD_ANSWERS)

    async def responses(
        self, requests: AsyncIterator[pb.GenerateSessionRequest]
    ) -> AsyncGenerator[pb.GenerateSessionResponse, None]:
        """Yield what happened, until the client has closed its side and nothing is left."""
        call = self._call
        reader = asyncio.ensure_future(self._read(requests))
        reader.add_done_callback(lambda _: call.wake())
        try:
            while True:
                await self._something()
                rollouts, answers = call.take()
                for _ in answers:
                    self._room.release()
                if rollouts or answers:
                    yield pb.GenerateSessionResponse(rollouts=rollouts, answers=answers)
                elif reader.done():
                    # A request that was against the contract ends the call.
                    reader.result()
                    if not call.left:
                        return
                elif self._draining() and not call.left:
                    raise Unavailable("the server is shutting down")
        finally:
            reader.cancel()
            await asyncio.wait([reader])

    async def _something(self) -> None:
        """Wait for something to read, unless nothing is under way and nothing is asked."""
        call = self._call
        while True:
            idle = None if call.left else self._patience.idle_seconds
            try:
                async with asyncio.timeout(idle):
                    return await call.changed()
            except TimeoutError:
                if not call.left:
                    raise Unavailable(f"nothing was asked of the session for {idle:g} s") from None

    async def _read(self, requests: AsyncIterator[pb.GenerateSessionRequest]) -> None:
        async for request in requests:
            await self._room.acquire()
            try:
                answer = await self._answer(request)
            except _AgainstContract:
                raise
            except GeneratorError as error:
                code, message = error.code, str(error)
                self._events.emit(
                    SessionRefused(code, self._call.request_id, message, error.reason)
                )
                answer = pb.SessionAnswer(code=grpc.StatusCode[code].value[0], error=message)
            self._call.answer(answer)

    async def _answer(self, request: pb.GenerateSessionRequest) -> pb.SessionAnswer:
        match request.WhichOneof("request"):
            case "add":
                await self._add(request.add)
                return pb.SessionAnswer()
            case "stop":
                positions = wire.stopped_of(request.stop, len(self._call.prompts))
                stopped = await self._stop(positions)
                return pb.SessionAnswer(
                    stopped_groups=[
                        pb.StoppedGroup(prompt_index=at, rollout_indices=indices)
                        for at, indices in sorted(stopped.items())
                    ]
                )
            case "open":
                raise _AgainstContract("request", "open", "must be the first only")
            case _:
                raise _AgainstContract("request", "none", "must be add or stop")


class _AgainstContract(InvalidArgument):
    """Ends the session: whoever sent it does not speak the contract."""

"""The admin application on its port, which idle, slow and many connections cannot fill.

A request must arrive, and its answer be taken, within some seconds. Of more connections than
there is room for the oldest one is cut off, so whoever comes and asks at once is answered
however many hold on to theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

CONNECTIONS = 64
"""Connections at once. Each may hold a page of metrics that is not taken yet."""

_BACKLOG = 32
"""Connections that may come in at once beside these."""

_IDLE_SECONDS = 75.0
"""Longest time without a whole request: more than Prometheus waits between two scrapes."""

_TAKE_SECONDS = 15.0
"""An answer that is not taken within one to two of these is given up. Before the connection
counts as idle, or it would be closed, which waits until the answer is taken."""


class AdminPort:
    """A listening port with its connections.

    Args:
        app: what is served there.
    """

    def __init__(self, app: web.Application) -> None:
        self._runner = web.AppRunner(
            app,
            # Also of a connection of which nothing but a part of a request has come.
            keepalive_timeout=_IDLE_SECONDS,
            # Nothing here takes a body.
            lingering_time=1.0,
            max_line_size=2048,
            max_field_size=8190,
            max_headers=64,
            shutdown_timeout=1.0,
        )
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; returns the port, which is a free one where 0 was asked for.

        Raises:
            OSError: it cannot be bound.
        """
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(_room_for_one(server), host, port, backlog=_BACKLOG)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(_held(self._runner.server)) if self._runner.server else 0

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


def _room_for_one(server: web.Server) -> Callable[[], RequestHandler]:
    """Return what makes the protocol of each connection, and room for it."""

    def connected() -> RequestHandler:
        held = _held(server)
        for other in held[: max(len(held) - CONNECTIONS + 1, 0)]:
            _cut_off(other)
        new = server()
        asyncio.get_running_loop().call_later(_TAKE_SECONDS, _look, new, False)
        return new

    return connected


def _held(server: web.Server) -> list[RequestHandler]:
    """Return the open connections, the oldest first."""
    return [each for each in server.connections if each.transport is not None]


def _look(connection: RequestHandler, waited: bool) -> None:
    """Cut a connection off whose client has not taken its answer at two looks."""
    transport = connection.transport
    if transport is None:
        return
    waits = transport.get_write_buffer_size() > 0
    if waits and waited:
        _cut_off(connection)
        return
    asyncio.get_running_loop().call_later(_TAKE_SECONDS, _look, connection, waits)


def _cut_off(connection: RequestHandler) -> None:
    """End a connection at once: to close it would wait until its answer is taken."""
    if connection.transport is not None:
        connection.transport.abort()

"""A servicer of this process on a port, for tests that reach into it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from knapsack_scheduler.rpc import SchedulerServicer


@asynccontextmanager
async def served(servicer: SchedulerServicer) -> AsyncIterator[str]:
    """Yield the address at which a servicer is served, until its calls are done."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 2**20)])
    servicer.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await servicer.settled()

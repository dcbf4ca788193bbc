"""The service in the caller's process: no server, no socket, the same calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loadedruns import LOADED_BYTES
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.service import SchedulerService


@asynccontextmanager
async def open_service(
    store_url: str,
    *,
    auto_create_runs: bool = True,
    default_config: RunConfig | None = None,
    limits: Limits | None = None,
    retention: Retention | None = None,
    loaded_bytes: int = LOADED_BYTES,
) -> AsyncIterator[SchedulerService]:
    """Yield a started service on a store, closed when the block ends.

    Args:
        store_url: such as ``sqlite:///stats.db``, or ``sqlite://`` for memory.
        auto_create_runs: create unknown runs as they are used.
        default_config: of runs created without one.
        limits: largest requests that are served.
        retention: how far back a rewind can go.
        loaded_bytes: of runs that are kept in memory.

    Raises:
        ConfigError: the store cannot be opened, or another process holds it.
    """
    journal = Journal(store_url)
    await asyncio.to_thread(journal.open)
    service = SchedulerService(
        journal,
        auto_create_runs=auto_create_runs,
        default_config=default_config,
        limits=limits,
        retention=retention,
        loaded_bytes=loaded_bytes,
    )
    try:
        yield service
    finally:
        await service.ended()
        await asyncio.to_thread(service.close)
        journal.close()

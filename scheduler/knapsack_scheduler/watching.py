"""Looks at the process from time to time: is its event loop free, does the disk fill up."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from knapsack_scheduler.events import Events, LoopLagged, StoreMeasured

LAG_SECONDS = 1.0
"""Between two looks at the event loop."""

STORE_EVERY = 15
"""Looks at the event loop between two looks at the store."""


async def watch(events: Events, store: Path | None) -> None:
    """Emit what is seen until cancelled.

    Args:
        events: where to.
        store: a SQLite file; None for a store that is no file.
    """
    loop = asyncio.get_running_loop()
    measuring: asyncio.Task[None] | None = None
    looks = 0
    while True:
        # A disk that hangs holds up the measure of itself, and nothing else.
        if store and looks % STORE_EVERY == 0 and (measuring is None or measuring.done()):
            measuring = asyncio.create_task(_measure(events, store))
        looks += 1
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        events.emit(LoopLagged(max(loop.time() - due, 0.0)))


async def _measure(events: Events, store: Path) -> None:
    try:
        events.emit(await asyncio.to_thread(measured, store))
    except OSError as error:
        logging.getLogger(__name__).warning("the store cannot be measured: %s", error)


def measured(store: Path) -> StoreMeasured:
    """Return the size of a SQLite store's files, and of their disk.

    Raises:
        OSError: they cannot be looked at.
    """
    files = (store, store.with_name(store.name + "-wal"), store.with_name(store.name + "-shm"))
    disk = os.statvfs(store.parent)
    return StoreMeasured(
        sum(file.stat().st_size for file in files if file.exists()),
        disk.f_bavail * disk.f_frsize,
        disk.f_blocks * disk.f_frsize,
    )

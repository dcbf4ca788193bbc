"""Looks at the process from time to time: is its event loop free, does the disk fill up,
do certificates end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from knapsack_scheduler.events import Event, Events, LoopLagged, StoreMeasured

LAG_SECONDS = 1.0
"""Between two looks at the event loop."""

FILES_EVERY = 15
"""Looks at the event loop between two looks at files."""


async def watch(events: Events, *looks: Callable[[], Event]) -> None:
    """Emit what is seen until cancelled.

    Args:
        events: where to.
        looks: at files: each is called in a thread and returns what it saw, or OSError.
    """
    loop = asyncio.get_running_loop()
    looking: dict[Callable[[], Event], asyncio.Task[None]] = {}
    number = 0
    while True:
        if number % FILES_EVERY == 0:
            for look in looks:
                # A disk that hangs holds up the look at itself, and nothing else.
                if look not in looking or looking[look].done():
                    looking[look] = asyncio.create_task(_seen(events, look))
        number += 1
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        events.emit(LoopLagged(max(loop.time() - due, 0.0)))


async def _seen(events: Events, look: Callable[[], Event]) -> None:
    try:
        events.emit(await asyncio.to_thread(look))
    except OSError as error:
        logging.getLogger(__name__).warning("files cannot be looked at: %s", error)


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

"""A place in the scheduler's own code where a test lets it wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

LONG = 30
"""Seconds after which a call that waits for what it must not wait for is given up."""


class Gate:
    """Lets nothing through until it is opened."""

    def __init__(self) -> None:
        self._come = threading.Semaphore(0)
        self._open = threading.Event()

    def before(self, work: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        """Return work that waits here first when it is called in that way."""

        def gated(*arguments: Any, **more: Any) -> Any:
            if when(*arguments, **more):
                self._come.release()
                assert self._open.wait(60)
            return work(*arguments, **more)

        return gated

    async def reached(self, times: int = 1) -> None:
        """Wait until so many stand here."""
        for _ in range(times):
            assert await asyncio.to_thread(self._come.acquire, timeout=LONG)

    def open(self) -> None:
        """Let through whoever stands here or comes."""
        self._open.set()


async def soon(call: Any) -> Any:
    """Return the answer of a call that may not wait for what stands at a gate."""
    return await asyncio.wait_for(call, LONG)

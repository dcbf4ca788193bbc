"""Completions on their way from an engine's thread to the reader of one group."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from knapsack_genserver.engine import Completion


class Inbox:
    """An async iterator that ends after as many completions as were asked for.

    Used on the event loop only. Closing it before its end calls ``cancel``.
    """

    def __init__(self, expected: int, cancel: Callable[[], None]) -> None:
        self._left = expected
        self._cancel = cancel
        self._items: deque[Completion] = deque()
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, completions: Sequence[Completion]) -> None:
        """Hand over completions."""
        self._items.extend(completions)
        self._ready.set()

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> Completion:
        if self._left == 0 or self._closed:
            raise StopAsyncIteration
        while not self._items:
            self._ready.clear()
            await self._ready.wait()
            if self._closed:
                raise StopAsyncIteration
        self._left -= 1
        return self._items.popleft()

    async def aclose(self) -> None:
        """End the work that is not done; safe to call at any time."""
        if not self._closed and self._left > len(self._items):
            self._cancel()
        self._closed = True
        self._items.clear()
        self._ready.set()

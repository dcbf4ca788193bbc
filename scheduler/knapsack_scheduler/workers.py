"""Threads for blocking work: a few of each kind, and nobody waits for one for ever.

The futures and locks of ``concurrent.futures`` take longer than a small transaction leaves for
them, so work goes to a thread through a queue, and its answer straight to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from knapsack_scheduler.errors import Busy

Answer = TypeVar("Answer")
Outcome = Callable[[Answer | None, BaseException | None], None]

PATIENCE_SECONDS = 10.0
"""How long work waits for a thread before its call is refused."""


class Workers:
    """Threads for one kind of work, so that it holds up no other kind.

    Args:
        kind: of work, for messages and names of threads.
        count: of threads.
        patience: longest wait for one of them, s.
    """

    def __init__(self, kind: str, count: int, patience: float = PATIENCE_SECONDS) -> None:
        self._kind = kind
        self._count = count
        self._patience = patience
        self._free = asyncio.Semaphore(count)
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        self._under_way = 0
        self._closing = Lock()
        self._closed = False

    @property
    def is_free(self) -> bool:
        """Whether a thread is free, so that work is begun without waiting."""
        return not self._free.locked()

    async def run(
        self, work: Callable[[], Answer], then: Outcome[Answer] = lambda _answer, _error: None
    ) -> Answer:
        """Return what work returns, done off the event loop.

        Work that has begun is finished, also when its caller is cancelled.

        Args:
            work: to do in a thread.
            then: told once what it came to, on the event loop: in the turn in which the caller
                hears of it, after them, and also if they were cancelled meanwhile. If nothing
                could be begun it is told of that before the caller.

        Raises:
            Busy: no thread came free in time; nothing was begun.
            RuntimeError: the threads are closed.
        """
        try:
            if self.is_free:
                await self._free.acquire()
            else:
                await self._wait()
            answer = self._handed_over(work, then)
        except BaseException as error:
            then(None, error)
            raise
        try:
            return await answer  # type: ignore[no-any-return]
        finally:
            # An error holds the frames that it passed, and the future has the error.
            answer = None

    def _handed_over(self, work: Callable[[], Answer], then: Outcome[Answer]) -> Any:
        """Return the future of work that a thread is given."""
        loop = asyncio.get_running_loop()
        answer: Any = loop.create_future()

        def done(result: Answer | None, error: BaseException | None) -> None:
            nonlocal answer
            self._under_way -= 1
            self._free.release()
            if not answer.cancelled():
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
            # An error holds the frames that it passed, and through them this function.
            answer = None
            loop.call_soon(then, result, error)

        # With the call's context, for the request id in the lines of the log.
        context = copy_context()

        def in_thread() -> None:
            result = error = None
            try:
                result = context.run(work)
            except BaseException as raised:
                error = raised
            # Without a loop there is nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(done, result, error, context=context)
            # So it does this one, and with it the request.
            result = error = None

        try:
            self._submit(in_thread)
        except BaseException:
            self._free.release()
            raise
        return answer

    def _submit(self, work: Callable[[], None]) -> None:
        with self._closing:
            if self._closed:
                raise RuntimeError(f"the threads for {self._kind} are closed")
            # No more are begun than were ever needed at once.
            if self._under_way == len(self._threads):
                thread = Thread(target=_serve, args=(self._queue,), name=self._kind, daemon=True)
                thread.start()
                self._threads.append(thread)
            self._under_way += 1
            self._queue.put(work)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await self._free.acquire()
        except TimeoutError:
            raise Busy(
                f"the {self._count} threads for {self._kind} of runs were busy for "
                f"{self._patience:g} s, as with a store that is slow; try again"
            ) from None

    def close(self) -> None:
        """Wait for what is under way; nothing is begun any more."""
        with self._closing:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join()


def _serve(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    """Do what comes out of a queue, until None does."""
    while True:
        work = queue.get()
        if work is None:
            return
        work()
        # Work holds its request, which may be large, and the next may be long in coming.
        work = None

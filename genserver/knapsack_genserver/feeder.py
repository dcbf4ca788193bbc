"""Keeps the engine full, with the work of every call in turn.

The engine is given as much as it can use and no more; what waits is one entry per group,
however many rollouts that is. The next chunk is always of the call that has the fewest
rollouts in the engine, so that a large request keeps no small one waiting. A call whose
caller does not read gets no further chunks until it does: it holds up itself only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass

from knapsack_genserver.call import Call, Chunk
from knapsack_genserver.engine import Completion, Engine, FinishReason
from knapsack_genserver.errors import GeneratorError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Feeding:
    """How the engine is fed.

    Attributes:
        chunk_rollouts: most rollouts of a prompt that are given at once.
        unread_rollouts, unread_tokens: of one call, finished and not read by its caller;
            beyond either the engine gets no further work of the call.
    """

    chunk_rollouts: int = 32
    unread_rollouts: int = 4096
    unread_tokens: int = 1_000_000


class Feeder:
    """See the module. Used on the event loop only."""

    def __init__(self, engine: Engine, feeding: Feeding) -> None:
        self._engine = engine
        self._feeding = feeding
        self._calls: set[Call] = set()
        self._in_engine = 0
        self._refill_at = 0
        self._served = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Rollouts that the engine has not been given."""
        return sum(call.backlog.rollouts for call in self._calls)

    @property
    def unread(self) -> int:
        """Rollouts that have finished and whose callers have not read them."""
        return sum(call.unread for call in self._calls)

    def enter(self, call: Call) -> None:
        """Let a call have its share from now on."""
        self._calls.add(call)

    async def leave(self, call: Call) -> None:
        """End the work of a call."""
        self._calls.discard(call)
        self._in_engine -= sum(len(chunk.missing) for chunk in call.chunks)
        chunks, call.chunks = call.chunks, set()
        for chunk in chunks:
            chunk.missing.clear()
        await self._end(chunks)

    async def stop(self, call: Call, positions: set[int]) -> dict[int, list[int]]:
        """Give up what is unfinished of some prompts of a call; returns its indices."""
        before = call.in_engine
        stopped = call.stop(positions)
        self._in_engine -= before - call.in_engine
        ended = {chunk for chunk in call.chunks if chunk.position in positions}
        call.chunks -= ended
        await self._end(ended)
        return stopped

    async def _end(self, chunks: Iterable[Chunk]) -> None:
        """Close streams, even if the caller of this is cancelled meanwhile."""
        ending = [self._task(self._close(chunk)) for chunk in chunks]
        self.fill()
        if ending:
            await asyncio.shield(asyncio.gather(*ending))

    async def _close(self, chunk: Chunk) -> None:
        if chunk.reader is not None:
            chunk.reader.cancel()
            await asyncio.wait([chunk.reader])
        # A reader that was cancelled before it began has closed nothing.
        close: Callable[[], Awaitable[object]] | None = getattr(chunk.stream, "aclose", None)
        if close is not None:
            try:
                await close()
            except Exception:
                _LOG.exception("the engine failed to end a group")

    def fill(self) -> None:
        """Give the engine what it has room for."""
        if self._in_engine > self._refill_at or not self.waiting:
            return
        capacity = self._engine.status().capacity
        # A whole chunk at a time: one more chunk than fits costs less than many small ones. But
        # no larger than the spare fifth of the capacity, or a small engine would run dry
        # before the next one.
        chunk_rollouts = max(1, min(self._feeding.chunk_rollouts, capacity // 5))
        while self._in_engine < max(capacity, 1):
            call = min(
                filter(self._may_have_more, self._calls),
                key=lambda call: (call.in_engine, call.served),
                default=None,
            )
            if call is None:
                break
            self._served += 1
            call.served = self._served
            self._give(call, chunk_rollouts)
        self._refill_at = max(capacity - chunk_rollouts, 0)

    def _may_have_more(self, call: Call) -> bool:
        return (
            call.backlog.rollouts > 0
            and not call.has_failed
            and call.unread_tokens < self._feeding.unread_tokens
            and call.unread < self._feeding.unread_rollouts
        )

    def _give(self, call: Call, most: int) -> None:
        group, position = call.next_group(most)
        try:
            stream = self._engine.generate(group)
        except Exception as error:
            stream = _raising(error)
        chunk = call.begin(group, position, stream)
        self._in_engine += group.num_rollouts
        chunk.reader = self._task(self._read(call, chunk))

    async def _read(self, call: Call, chunk: Chunk) -> None:
        error = "the engine ended without this rollout"
        try:
            async for completion in chunk.stream:
                if completion.index in chunk.missing:
                    self._in_engine -= 1
                    call.put(chunk, completion)
                    self.fill()
        except GeneratorError as failure:
            # Not this group alone: the call ends, and its other work with it.
            self._in_engine -= call.fail(chunk, failure)
            self.fill()
            return
        except Exception as failure:
            _LOG.exception("the engine failed on a group")
            error = f"{type(failure).__name__}: {failure}"
        for index in sorted(chunk.missing):
            self._in_engine -= 1
            call.put(chunk, Completion(index, [], [], FinishReason.ERROR, (), error))
        call.chunks.discard(chunk)
        self.fill()

    def _task(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _raising(error: Exception) -> AsyncIterator[Completion]:
    """Return a stream that fails at once."""
    raise error
    yield

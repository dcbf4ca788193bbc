"""A replica inside a Ray worker: any engine of one machine, answering its driver.

Knows nothing of Ray but that its methods are called from elsewhere. What an engine refuses
is an answer and no exception, since exceptions do not travel whole.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from knapsack_genserver.engine import Completion, Engine, EngineStatus, Group, LoadedWeights
from knapsack_genserver.engines.ray.copies import Copy, remove_abandoned
from knapsack_genserver.errors import ConfigError, EngineDied, GeneratorError
from knapsack_genserver.member import reason_of

_DEATH_SECONDS = 2.0
"""How long after a rollout failed the engine may take to notice that it has died."""

Answer = TypeVar("Answer")
Files = Sequence[tuple[str, Sequence[Any]]]
"""Names of files, each with references to the pieces of its content."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of the engine's, by the name of its class."""

    kind: str
    text: str


class Replica:
    """See the module.

    Args:
        arguments: of the command line, which name the engine and its model.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._engine: Engine | None = None
        self._streams: dict[int, AsyncIterator[Completion]] = {}
        self._stopped: set[int] = set()
        self._copy: Copy | None = None

    async def place(self) -> str:
        """Return where this is, for people."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    async def start(self) -> EngineStatus | Refusal:
        """Start the engine."""

        async def start() -> EngineStatus:
            from knapsack_genserver.cli import engine_of

            # One that was killed on this node has left a whole model there.
            await asyncio.to_thread(remove_abandoned)
            self._engine = engine_of(self._arguments)
            await self._engine.start()
            return self._engine.status()

        return await _answer(start)

    async def check(self) -> EngineStatus | Refusal:
        """Return how the engine is."""

        async def check() -> EngineStatus:
            self._require_alive()
            return self._started.status()

        return await _answer(check)

    async def generate(self, name: int, group: Group) -> AsyncIterator[list[Completion] | Refusal]:
        """Yield rollouts as they finish, those that finish together at once.

        Args:
            name: by which the work can be stopped.
            group: asked for.
        """
        if name in self._stopped:
            self._stopped.discard(name)
            return
        try:
            stream = self._started.generate(group)
        except GeneratorError as error:
            yield Refusal(type(error).__name__, str(error))
            return
        self._streams[name] = stream
        try:
            async for batch in _batches(stream):
                if any(completion.error for completion in batch):
                    await self._wait_for_death()
                yield batch
        except GeneratorError as error:
            yield Refusal(type(error).__name__, str(error))
        finally:
            self._streams.pop(name, None)
            await _close(stream)

    async def stop(self, names: Sequence[int]) -> None:
        """End work that nobody waits for, also if it has not begun."""
        for name in names:
            stream = self._streams.get(name)
            if stream is None:
                self._stopped.add(name)
            else:
                await _close(stream)

    async def load_weights(self, path: str, version: int) -> LoadedWeights | Refusal:
        """Serve the weights of a folder of this node's disk."""
        return await _answer(lambda: self._load(Path(path), version))

    async def load_files(self, files: Files, version: int) -> LoadedWeights | Refusal:
        """Serve weights that come in pieces, written to this node's disk one by one."""
        copy = Copy()
        try:
            for name, pieces in files:
                with (copy.folder / name).open("wb") as file:
                    for piece in pieces:
                        await asyncio.to_thread(file.write, await piece)
            loaded = await _answer(lambda: self._load(copy.folder, version))
        except BaseException:
            copy.remove()
            raise
        # The engine may go back to what it serves, so that is kept until it serves others.
        gone: Copy | None = copy
        if not isinstance(loaded, Refusal):
            gone, self._copy = self._copy, copy
        if gone is not None:
            gone.remove()
        return loaded

    async def _load(self, path: Path, version: int) -> LoadedWeights:
        try:
            return await self._started.load_weights(path, version)
        except GeneratorError:
            self._require_alive()
            raise

    async def close(self) -> None:
        """End all work."""
        if self._engine is not None:
            await self._engine.close()
        if self._copy is not None:
            self._copy.remove()
            self._copy = None

    @property
    def _started(self) -> Engine:
        assert self._engine is not None, "start was not called"
        return self._engine

    def _died(self) -> asyncio.Event | None:
        return getattr(self._engine, "died", None)

    def _require_alive(self) -> None:
        died = self._died()
        if died is not None and died.is_set():
            raise EngineDied("the engine has died")
        # An update failed and the old weights are not back: a new process has them.
        broken = getattr(self._engine, "broken", "")
        if broken:
            raise EngineDied(broken)

    async def _wait_for_death(self) -> None:
        """Raise if rollouts fail because the engine is dead: they are to be made elsewhere."""
        died = self._died()
        if died is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_DEATH_SECONDS):
                    await died.wait()
            self._require_alive()


async def _answer(work: Callable[[], Awaitable[Answer]]) -> Answer | Refusal:
    try:
        return await work()
    except (ConfigError, GeneratorError, EngineDied) as error:
        return Refusal(type(error).__name__, reason_of(error))


async def _batches(stream: AsyncIterator[Completion]) -> AsyncIterator[list[Completion]]:
    """Yield all that has come since the last time, as soon as there is any."""
    ready: list[Completion] = []
    news = asyncio.Event()

    async def read() -> None:
        try:
            async for completion in stream:
                ready.append(completion)
                news.set()
        finally:
            news.set()

    reader = asyncio.ensure_future(read())
    try:
        while True:
            await news.wait()
            news.clear()
            batch, ready[:] = list(ready), []
            if batch:
                yield batch
            # The end may have come with the last of them, and is not announced again.
            if reader.done() and not ready:
                reader.result()
                return
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _close(stream: AsyncIterator[Completion]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        with suppress(RuntimeError):
            await close()

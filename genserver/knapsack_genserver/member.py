"""One replica's place in a pool, through all the lives of the engine that fills it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from knapsack_genserver.engine import Engine, LoadedWeights
from knapsack_genserver.errors import ConfigError, GeneratorError, ReplicaLost

_LOG = logging.getLogger(__name__)


@runtime_checkable
class Checked(Protocol):
    """An engine that can be lost without anybody waiting for an answer of it."""

    async def check(self) -> None:
        """Return if it serves; raise anything if it does not."""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How replicas are used.

    Attributes:
        piece_rollouts: most rollouts of a group that go to a replica in one piece.
        replica_rollouts: most rollouts that a replica holds at a time; 0 for as many as
            it says it has room for.
        check_seconds: between two checks of a replica, and how long one may take.
        check_failures: checks that fail in a row before a replica counts as lost; also
            pieces that fail in a row, with no rollout between them.
        retry_seconds: shortest and longest pause before a lost replica is started again.
        update_seconds: how long a replica may take over new weights before it counts as
            lost, so that one whose disk hangs does not keep the others from serving them.
    """

    piece_rollouts: int = 32
    replica_rollouts: int = 0
    check_seconds: float = 5.0
    check_failures: int = 3
    retry_seconds: tuple[float, float] = (0.5, 30.0)
    update_seconds: float = 900.0


class Member:
    """Starts an engine, keeps it in service, and starts it again when it is lost.

    Args:
        number: its name, for logs.
        engine: started and closed as often as needed.
        options: of the pool.

    Attributes:
        life: its name in the dispatch, another one after each loss; None while it does
            not serve.
        problem: why it does not serve, or failed last.
        refused: why it can never start, as far as the last attempt can tell.
        tasks: pieces that it works on.
        held: rollouts of them that have not arrived.
        failures: pieces that failed in this life since its last rollout.
        proved: whether it has made a rollout in this life.
        losses: how often it was lost while it served or drained.
        leaving: whether it is to finish what it holds and go.
    """

    def __init__(self, number: int, engine: Engine, options: PoolOptions) -> None:
        self.number = number
        self.engine = engine
        self.life: int | None = None
        self.problem = "it has not started yet"
        self.refused: ConfigError | None = None
        self.tasks: set[asyncio.Task[str]] = set()
        self.held = 0
        self.failures = 0
        self.proved = False
        self._options = options
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self.losses = 0
        self.leaving = False

    def begin(
        self, admit: Callable[[Member], Awaitable[None]], retire: Callable[[Member], None]
    ) -> None:
        """Start its lives.

        Args:
            admit: called when the engine has started; the member serves when it returns.
            retire: called when the member has stopped to serve or has failed to.
        """
        self._keeper = asyncio.get_running_loop().create_task(self._keep(admit, retire))

    @property
    def failing(self) -> bool:
        """Whether it fails at what it is asked for, whatever that is."""
        return self.failures >= self._options.check_failures

    def lose(self, reason: str) -> None:
        """End this life."""
        if not self._lost.done():
            self.problem = reason
            self._lost.set_result(reason)

    async def drain(self) -> None:
        """Wait for the pieces that it has; it is not started again if it is lost."""
        self.leaving = True
        while self.tasks:
            await asyncio.wait(self.tasks)

    async def end(self) -> None:
        """End its lives and close the engine."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self.life = None
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        with suppress(Exception):
            await self.engine.close()

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Load weights into a serving engine; ReplicaLost once it is lost or takes too long."""
        loading = asyncio.ensure_future(self.engine.load_weights(path, version))
        waited: list[asyncio.Future[LoadedWeights] | asyncio.Future[str]] = [loading, self._lost]
        limit = self._options.update_seconds
        await asyncio.wait(waited, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            return loading.result()
        loading.cancel()
        if self._lost.done():
            raise ReplicaLost(self._lost.result())
        raise ReplicaLost(f"it has not taken the weights within {limit:g} s")

    async def _keep(
        self, admit: Callable[[Member], Awaitable[None]], retire: Callable[[Member], None]
    ) -> None:
        shortest, longest = self._options.retry_seconds
        pause = shortest
        while not self.leaving:
            self._lost = asyncio.get_running_loop().create_future()
            self.failures, self.proved = 0, False
            try:
                await self.engine.start()
                await admit(self)
            except Exception as error:
                self.problem = reason_of(error)
                self.refused = error if isinstance(error, ConfigError) else None
                _LOG.warning("replica %d does not start: %s", self.number, self.problem)
                retire(self)
            else:
                self.problem, self.refused = "", None
                _LOG.info("replica %d serves", self.number)
                await self._watch()
                await self._fall(retire)
                # Whoever starts and then makes nothing waits longer each time.
                if self.proved:
                    pause = shortest
            with suppress(Exception):
                await self.engine.close()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _watch(self) -> None:
        """Return when it is lost."""
        failures = 0
        while not self._lost.done():
            await asyncio.wait([self._lost], timeout=self._options.check_seconds)
            if self._lost.done() or not isinstance(self.engine, Checked):
                continue
            try:
                async with asyncio.timeout(self._options.check_seconds):
                    await self.engine.check()
                failures = 0
            except Exception as error:
                failures += 1
                if failures >= self._options.check_failures or isinstance(error, ReplicaLost):
                    self.lose(f"it does not answer: {reason_of(error)}")

    async def _fall(self, retire: Callable[[Member], None]) -> None:
        """Stop what it works on, so that it can be done elsewhere."""
        self.losses += 1
        _LOG.warning("replica %d is lost: %s", self.number, self.problem)
        retire(self)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line."""
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, GeneratorError | ConfigError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__

"""Runs in memory, kept level with the journal.

A run's state is read and changed only while its lock is held, in one worker thread at a
time: first everything that was appended since is folded in, then the call decides and
appends, and only what has been committed is folded. A process that died, or another
replica, thus leaves nothing that this one could miss. Snapshots are written by a thread
of their own, from a copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from knapsack_scheduler import wire
from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RunNotFound,
    StoreInterrupted,
    StoreUnavailable,
)
from knapsack_scheduler.events import Committed, Events
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import RunRow
from knapsack_scheduler.journal.transaction import Reading, Writing
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.snapshotting import Snapshotter

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class _Turn:
    """Who works on a run, and how many wait to."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Runs:
    """All runs of a journal, loaded as they are asked for."""

    def __init__(
        self,
        journal: Journal,
        events: Events,
        *,
        auto_create_runs: bool,
        default_config: RunConfig,
        retention: Retention,
    ) -> None:
        self._journal = journal
        self._events = events
        self._auto_create = auto_create_runs
        self._default_config = default_config
        self._loaded: dict[str, LoadedRun] = {}
        self._turns: dict[str, _Turn] = {}
        self._preparing: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="runs")
        self._snapshots = Snapshotter(journal, retention, events)

    def close(self) -> None:
        """Wait for what is under way; a snapshot is given up."""
        self._threads.shutdown(wait=True)
        self._snapshots.close()

    async def in_thread(self, work: Callable[[], Answer]) -> Answer:
        """Run blocking work off the event loop."""
        # With the call's context, for the request id in the lines of the log.
        work = partial(copy_context().run, work)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def alone(
        self,
        run_id: str,
        work: Callable[[LoadedRun, Writing], Answer],
        *,
        create: bool = False,
    ) -> tuple[Answer, Counted]:
        """Run work with the run locked, level with the journal, in one transaction.

        A caller that is cancelled does not cancel the work: it is finished and
        committed, and a retry finds its answer.

        Args:
            run_id: of the run.
            work: called in a worker thread; what it appends is committed when it
                returns, and what it raises leaves everything as it was.
            create: create an unknown run if the server may create runs by itself.

        Returns:
            What work returned, and what folding its entries changed.

        Raises:
            RunNotFound: no run of that name.
        """

        async def locked() -> tuple[Answer, Counted]:
            async with self._turn(run_id):
                start, failed = time.perf_counter(), False
                try:
                    answer = await self.in_thread(lambda: self._work(run_id, work, create))
                except StoreUnavailable:
                    failed = True
                    raise
                finally:
                    self._events.emit(Committed(time.perf_counter() - start, failed))
            return answer

        return await asyncio.shield(asyncio.ensure_future(locked()))

    async def look(self, run_id: str, work: Callable[[LoadedRun, Reading], Answer]) -> Answer:
        """Return what work makes of a run that is level with the journal, changing nothing.

        Raises:
            RunNotFound: no run of that name.
        """

        async def locked() -> Answer:
            async with self._turn(run_id):
                return await self.in_thread(lambda: self._again(lambda: self._look(run_id, work)))

        return await asyncio.shield(asyncio.ensure_future(locked()))

    def prepare(self, run_id: str) -> None:
        """Work out now what the run's next decision needs of its statistics, if nobody waits.

        Between a report and the next decision a trainer updates its weights: what is done
        then costs nobody anything. A decision that comes sooner does it by itself.
        """
        if run_id not in self._turns:
            task = asyncio.ensure_future(self._prepare(run_id))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)

    async def _prepare(self, run_id: str) -> None:
        async with self._turn(run_id):
            # The answer to the report goes first: it takes some turns of the event loop, and
            # a thread at work would hold each of them up.
            for _ in range(_TURNS_OF_AN_ANSWER):
                await asyncio.sleep(0)
            run = self._loaded.get(run_id)
            # A service that ends has no threads any more.
            with suppress(RuntimeError):
                if run is not None:
                    await self.in_thread(run.state.prepare)

    async def create(self, run_id: str, config: RunConfig) -> None:
        """Create a run; AlreadyExists if one of that name is there."""
        await self.in_thread(lambda: self._create(run_id, config))

    async def delete(self, run_id: str) -> None:
        """Delete a run; RunNotFound if there is none."""
        async with self._turn(run_id):
            await asyncio.shield(
                asyncio.ensure_future(self.in_thread(lambda: self._delete(run_id)))
            )

    async def preload(self, count: int) -> list[LoadedRun]:
        """Load and return the runs that were written to last: their next call does not wait.

        One that cannot be loaded is logged, and refused when it is asked for.
        """

        def load() -> list[LoadedRun]:
            loaded = []
            rows = self._journal.list_runs("", 10**9)
            for row in sorted(rows, key=lambda row: -row.update_time)[:count]:
                start = time.perf_counter()
                try:
                    run = self._load(row.run_id)
                    run.state.prepare()
                except Exception:
                    _LOG.exception("run %r cannot be loaded", row.run_id)
                    continue
                _LOG.info(
                    "run %r loaded: %d known prompts in %.1f s",
                    row.run_id,
                    run.state.known_prompts,
                    time.perf_counter() - start,
                )
                self._keep(row.run_id, run)
                loaded.append(run)
            return loaded

        return await self.in_thread(load)

    @asynccontextmanager
    async def _turn(self, run_id: str) -> AsyncIterator[None]:
        """Wait until nobody else works on the run; keeps nothing of names nobody uses."""
        turn = self._turns.setdefault(run_id, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if turn.users == 0:
                del self._turns[run_id]

    def _delete(self, run_id: str) -> None:
        self._loaded.pop(run_id, None)
        self._journal.delete_run(run_id)

    def _create(self, run_id: str, config: RunConfig) -> RunRow:
        message = wire.config_message(config).SerializeToString(deterministic=True)
        return self._journal.create_run(run_id, message, time.time_ns())

    def _work(
        self, run_id: str, work: Callable[[LoadedRun, Writing], Answer], create: bool
    ) -> tuple[Answer, Counted]:
        def attempt() -> tuple[Answer, Counted]:
            return self._again(lambda: self._transact(run_id, work))

        try:
            return attempt()
        except RunNotFound:
            if not (create and self._auto_create):
                raise
        created = None
        with suppress(AlreadyExists):
            created = self._create(run_id, self._default_config)
        try:
            return attempt()
        except _REFUSALS:
            if created:
                # A refused call changes nothing, so neither does it create a run.
                self._loaded.pop(run_id, None)
                with suppress(RunNotFound):
                    self._journal.delete_run(run_id, only_new=created.identity)
            raise

    def _again(self, attempt: Callable[[], Answer]) -> Answer:
        """Return what an attempt does, trying anew what another may do better.

        A call whose commit was cut off may have been stored: the next attempt finds it
        under its id and returns the stored answer.
        """
        for pause in _PAUSES:
            try:
                return attempt()
            except _Behind:
                continue
            except StoreInterrupted as error:
                _LOG.warning("a transaction is begun anew: %s", error)
                time.sleep(pause)
        try:
            return attempt()
        except _Behind:
            raise StoreUnavailable("the run is rewound faster than it can be read") from None

    def _load(self, run_id: str) -> LoadedRun:
        with self._journal.reading(run_id) as reading:
            return LoadedRun.load(reading)

    def _keep(self, run_id: str, run: LoadedRun) -> None:
        """Keep a run in memory, at the cost of those that were not used for longest."""
        self._loaded[run_id] = run
        for other in list(self._loaded)[:-_MOST_LOADED]:
            self._loaded.pop(other, None)

    def _look(self, run_id: str, work: Callable[[LoadedRun, Reading], Answer]) -> Answer:
        run = self._loaded.pop(run_id, None)
        try:
            with self._journal.reading(run_id) as reading:
                if run is None or not run.catch_up(reading):
                    run = LoadedRun.load(reading)
                return work(run, reading)
        finally:
            if run is not None and run.intact:
                self._keep(run_id, run)

    def _transact(
        self, run_id: str, work: Callable[[LoadedRun, Writing], Answer]
    ) -> tuple[Answer, Counted]:
        # Set aside until all has gone well: half-folded state is no state.
        run = self._loaded.pop(run_id, None)
        if run is None:
            # Before the run is held: nobody else waits for a long fold.
            run = self._load(run_id)
        try:
            with self._journal.writing(run_id) as writing:
                if not run.catch_up(writing):
                    raise _Behind
                # What an attempt decided that was not stored is not what this one does.
                run.decided = None
                answer = work(run, writing)
        except (*_REFUSALS, StoreUnavailable):
            if run.intact:
                self._keep(run_id, run)
            raise
        counted = Counted()
        for entry in writing.appended:
            counted = run.applied(entry, run.decided)
        run.decided = None
        if writing.appended:
            run.row = writing.run_after
        self._keep(run_id, run)
        if writing.appended:
            self._snapshots.offer(run)
        return answer, counted


class _Behind(Exception):
    """The run has to be read anew first, which is done without holding it."""


_PAUSES = (0.05, 0.2, 0.5)
"""Seconds before a transaction that was cut off is begun anew."""

_MOST_LOADED = 64
"""Runs in memory."""

_TURNS_OF_AN_ANSWER = 16

_REFUSALS = (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted)
"""Raised by work before it has changed anything."""

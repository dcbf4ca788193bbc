"""Runs in memory, kept level with the journal.

A run's state is read and changed only while its lock is held, in one worker thread at a
time: first everything that was appended since is folded in, then the call decides and
appends, and only what has been committed is folded. A process that died, or another
replica, thus leaves nothing that this one could miss. What is stored is answered; the fold
of it comes after the answer, and before the next call of the run.

Threads that write wait for no thread that reads, and neither for one that folds a run,
which may take long. What a rewind leaves is folded beside the run, which goes on meanwhile.
Snapshots are written by a thread of their own, from a copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from knapsack_scheduler import wire
from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.errors import (
    AlreadyExists,
    Busy,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RunNotFound,
    StoreInterrupted,
    StoreUnavailable,
    Unavailable,
)
from knapsack_scheduler.events import Committed, Event, Events
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.transaction import Reading, Writing
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LoadedRuns
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.snapshotting import Snapshotter
from knapsack_scheduler.workers import Workers

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PATIENCE_SECONDS = 30.0
"""How long a call waits for those of its run that came before."""


@dataclass(slots=True, eq=False)
class _Turn:
    """Who works on a run, and how many wait to."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


@dataclass(frozen=True, slots=True)
class Done(Generic[Answer]):
    """What the work of a call has come to.

    Attributes:
        answer: of the call.
        event: returns what there is to tell of it, if anything, from what the fold of it
            changed. Called in a worker thread, with the run locked.
    """

    answer: Answer
    event: Callable[[Counted], Event | None] = lambda _counted: None


@dataclass(frozen=True, slots=True)
class _Stored(Generic[Answer]):
    """Entries that are committed and not folded yet."""

    done: Done[Answer]
    run: LoadedRun
    entries: list[Entry]
    row: RunRow


class Runs:
    """All runs of a journal, loaded as they are asked for.

    Args:
        journal: of the runs.
        events: where to tell of transactions and snapshots.
        auto_create_runs: create unknown runs for calls that may.
        default_config: of runs so created.
        retention: how far back a run goes.
        loaded_bytes: of runs that are kept in memory while nobody uses them.
        patience: longest wait for the calls of a run that came before, s.
    """

    def __init__(
        self,
        journal: Journal,
        events: Events,
        *,
        auto_create_runs: bool,
        default_config: RunConfig,
        retention: Retention,
        loaded_bytes: int,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._journal = journal
        self._events = events
        self._auto_create = auto_create_runs
        self._default_config = default_config
        self._patience = patience
        self._loaded = LoadedRuns(loaded_bytes)
        self._turns: dict[str, _Turn] = {}
        self._rewinds: dict[str, _Turn] = {}
        self._settling: set[asyncio.Task[None]] = set()
        # Others may hold runs of a shared store, and then each of them takes a thread.
        self._writers = Workers("writes", 8 if journal.shared else 4)
        self._readers = Workers("reads", 4)
        self._folders = Workers("folds", 2)
        self._snapshots = Snapshotter(journal, retention, events)

    async def settled(self) -> None:
        """Wait until all that was answered is folded and told of."""
        while self._settling:
            await asyncio.wait(self._settling)

    def close(self) -> None:
        """Wait for what is under way; a snapshot is given up."""
        for workers in (self._writers, self._readers, self._folders):
            workers.close()
        self._snapshots.close()

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the runs in memory that are not being used, about."""
        return self._loaded.bytes

    async def in_thread(self, work: Callable[[], Answer]) -> Answer:
        """Run blocking work that changes nothing off the event loop; Busy if there is no thread."""
        return await self._readers.run(work)

    async def alone(
        self,
        run_id: str,
        work: Callable[[LoadedRun, Writing], Done[Answer]],
        *,
        create: bool = False,
        large: bool = False,
    ) -> Answer:
        """Run work with the run locked, level with the journal, in one transaction.

        A caller that is cancelled does not cancel the work: it is finished and
        committed, and a retry finds its answer.

        Args:
            run_id: of the run.
            work: called in a worker thread; what it appends is committed when it
                returns, and what it raises leaves everything as it was.
            create: create an unknown run if the server may create runs by itself.
            large: what is appended is so large that its memory counts for as long as the
                caller waits: it is folded before the answer.

        Returns:
            The answer, as soon as all that work appended is committed.

        Raises:
            RunNotFound: no run of that name.
            Busy: calls before this one take too long; nothing was begun.
        """

        async def locked() -> Answer:
            async with AsyncExitStack() as held:
                await held.enter_async_context(self._turn(run_id))
                with self._timed():
                    stored = await self._work(run_id, work, create)
                if not stored.entries:
                    return stored.done.answer
                settling = asyncio.ensure_future(self._settle(run_id, stored, held.pop_all()))
                self._settling.add(settling)
                settling.add_done_callback(self._settling.discard)
            if large:
                await settling
            return stored.done.answer

        return await asyncio.shield(asyncio.ensure_future(locked()))

    async def _settle(self, run_id: str, stored: _Stored[Answer], held: AsyncExitStack) -> None:
        """Fold what was stored, tell of it, and let go of the run."""
        async with held:
            turn = self._turns[run_id]
            # The answer goes first: it takes some turns of the event loop, and a thread at
            # work would hold each of them up.
            for _ in range(_TURNS_OF_AN_ANSWER):
                if turn.users > 1:
                    break
                await asyncio.sleep(0)
            try:
                event = await self._readers.run(lambda: self._fold(run_id, stored))
                if event is not None:
                    self._events.emit(event)
            except (RuntimeError, Busy) as error:
                # A service that ends has no threads any more.
                _LOG.info("run %r: not folded, to be read anew: %s", run_id, error)
            except Exception:
                _LOG.exception("run %r: could not be folded, to be read anew", run_id)

    async def look(self, run_id: str, work: Callable[[LoadedRun, Reading], Answer]) -> Answer:
        """Return what work makes of a run that is level with the journal, changing nothing.

        Raises:
            RunNotFound: no run of that name.
        """

        async def locked() -> Answer:
            async with self._turn(run_id):
                return await self._level(
                    run_id,
                    self._readers,
                    lambda run: self._again(lambda: self._look(run_id, run, work)),
                )

        return await asyncio.shield(asyncio.ensure_future(locked()))

    async def rewound(
        self,
        run_id: str,
        step: int,
        before: Callable[[LoadedRun, Reading], Answer | None],
        work: Callable[[LoadedRun, Writing], Answer],
    ) -> Answer:
        """Run work that rewinds the run; its other calls go on while what stays is folded.

        Args:
            run_id: of the run.
            step: what comes after it is forgotten.
            before: returns the answer of the same rewind if it was done before.
            work: appends the rewind, as for ``alone``. It is given the run as that leaves it.

        Raises:
            RunNotFound: no run of that name.
            FailedPrecondition: the journal does not go back as far.
            Busy: calls before this one take too long; nothing was begun.
        """

        async def rewinding() -> Answer:
            # One at a time: a retry of one that is under way waits for its answer.
            async with self._turn(run_id, self._rewinds):
                for attempt in range(_ATTEMPTS):
                    if attempt or run_id in self._loaded:
                        answer = await self.look(run_id, before)
                        if answer is not None:
                            return answer
                    left = await self._folders.run(
                        lambda: self._again(lambda: self._load(run_id, step))
                    )
                    with suppress(_Behind):
                        return await self._swap(run_id, step, left, work)
                # So many calls come that it has to be done with the run held.
                return await self._swap(run_id, step, None, work)

        return await asyncio.shield(asyncio.ensure_future(rewinding()))

    async def _swap(
        self,
        run_id: str,
        step: int,
        left: LoadedRun | None,
        work: Callable[[LoadedRun, Writing], Answer],
    ) -> Answer:
        async with self._turn(run_id):
            with self._timed():
                return await self._writers.run(
                    lambda: self._again(lambda: self._rewind(run_id, step, left, work))
                )

    async def create(self, run_id: str, config: RunConfig) -> None:
        """Create a run; AlreadyExists if one of that name is there."""
        await self._writers.run(lambda: self._create(run_id, config))

    async def delete(self, run_id: str) -> None:
        """Delete a run; RunNotFound if there is none."""
        async with self._turn(run_id):
            await asyncio.shield(
                asyncio.ensure_future(self._writers.run(lambda: self._delete(run_id)))
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
                self._loaded.keep(row.run_id, run)
                loaded.append(run)
            return loaded

        return await self._folders.run(load)

    @asynccontextmanager
    async def _turn(
        self, run_id: str, turns: dict[str, _Turn] | None = None
    ) -> AsyncIterator[None]:
        """Wait until nobody else works on the run; keeps nothing of names nobody uses.

        Not for ever: callers that repeat what was not answered in time would come to wait for
        calls that nobody wants answered any more.
        """
        if turns is None:
            turns = self._turns
        turn = turns.setdefault(run_id, _Turn())
        turn.users += 1
        try:
            if turn.lock.locked():
                await self._wait(run_id, turn.lock)
            else:
                await turn.lock.acquire()
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            turn.users -= 1
            if turn.users == 0:
                del turns[run_id]

    async def _wait(self, run_id: str, lock: asyncio.Lock) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await lock.acquire()
        except TimeoutError:
            raise Busy(
                f"the calls of run {run_id!r} before this one took longer than "
                f"{self._patience:g} s; try again"
            ) from None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Tell of a transaction, and whether it failed."""
        start, failed = time.perf_counter(), False
        try:
            yield
        except Unavailable:
            failed = True
            raise
        finally:
            # The answer goes first: whoever listens takes some of its time.
            committed = Committed(time.perf_counter() - start, failed)
            asyncio.get_running_loop().call_soon(self._events.emit, committed)

    def _delete(self, run_id: str) -> None:
        self._loaded.take(run_id)
        self._journal.delete_run(run_id)

    def _create(self, run_id: str, config: RunConfig) -> RunRow:
        message = wire.config_message(config).SerializeToString(deterministic=True)
        return self._journal.create_run(run_id, message, time.time_ns())

    async def _work(
        self, run_id: str, work: Callable[[LoadedRun, Writing], Done[Answer]], create: bool
    ) -> _Stored[Answer]:
        def attempt(run: LoadedRun) -> _Stored[Answer]:
            return self._again(lambda: self._transact(run_id, run, work))

        try:
            return await self._level(run_id, self._writers, attempt)
        except RunNotFound:
            if not (create and self._auto_create):
                raise
        created = None
        with suppress(AlreadyExists):
            created = await self._writers.run(lambda: self._create(run_id, self._default_config))
        try:
            return await self._level(run_id, self._writers, attempt)
        except _REFUSALS:
            if created:
                # A refused call changes nothing, so neither does it create a run.
                await self._writers.run(partial(self._undo, run_id, created))
            raise

    def _undo(self, run_id: str, created: RunRow) -> None:
        self._loaded.take(run_id)
        with suppress(RunNotFound):
            self._journal.delete_run(run_id, only_new=created.identity)

    async def _level(
        self, run_id: str, workers: Workers, attempt: Callable[[LoadedRun], Answer]
    ) -> Answer:
        """Return what an attempt on the run does, loaded before if it is not or is far behind.

        Folding takes long, so it is done without holding the run, and by threads of its own.
        """
        try:
            for _ in range(_ATTEMPTS):
                run = self._loaded.get(run_id)
                if run is None:
                    run = await self._folders.run(lambda: self._again(lambda: self._fetch(run_id)))
                with suppress(_Behind):
                    return await workers.run(partial(attempt, run))
        except RunNotFound:
            self._loaded.take(run_id)
            raise
        raise StoreUnavailable("the run is rewound faster than it can be read")

    def _again(self, attempt: Callable[[], Answer]) -> Answer:
        """Return what an attempt does, trying anew what another may do better.

        A call whose commit was cut off may have been stored: the next attempt finds it
        under its id and returns the stored answer.
        """
        for pause in _PAUSES:
            try:
                return attempt()
            except StoreInterrupted as error:
                _LOG.warning("a transaction is begun anew: %s", error)
                time.sleep(pause)
        return attempt()

    def _load(self, run_id: str, rewound_to: int | None = None) -> LoadedRun:
        with self._journal.reading(run_id) as reading:
            return LoadedRun.load(reading, rewound_to)

    def _fetch(self, run_id: str) -> LoadedRun:
        run = self._load(run_id)
        self._loaded.keep(run_id, run)
        return run

    def _look(
        self, run_id: str, run: LoadedRun, work: Callable[[LoadedRun, Reading], Answer]
    ) -> Answer:
        self._loaded.take(run_id)
        level = True
        try:
            with self._journal.reading(run_id) as reading:
                level = run.intact and run.catch_up(reading)
                if not level:
                    raise _Behind
                return work(run, reading)
        finally:
            if level and run.intact:
                self._loaded.keep(run_id, run)

    def _transact(
        self, run_id: str, run: LoadedRun, work: Callable[[LoadedRun, Writing], Done[Answer]]
    ) -> _Stored[Answer]:
        # Set aside until all has gone well: half-folded state is no state.
        self._loaded.take(run_id)
        try:
            with self._journal.writing(run_id) as writing:
                if not (run.intact and run.catch_up(writing)):
                    raise _Behind
                # What an attempt decided that was not stored is not what this one does.
                run.decided = None
                done = work(run, writing)
        except (*_REFUSALS, StoreUnavailable):
            if run.intact:
                self._loaded.keep(run_id, run)
            raise
        if not writing.appended:
            self._loaded.keep(run_id, run)
        return _Stored(done, run, writing.appended, writing.run_after)

    def _fold(self, run_id: str, stored: _Stored[Answer]) -> Event | None:
        """Take in what was stored; returns what there is to tell of it.

        When all of an allocation has come, what the next decision needs of the statistics is
        worked out too. A trainer updates its weights before that: it costs nobody anything.
        """
        run, counted = stored.run, Counted()
        for entry in stored.entries:
            counted = run.applied(entry, run.decided)
        run.decided = None
        run.row = stored.row
        event = stored.done.event(counted)
        if counted.completes:
            run.state.prepare()
        self._loaded.keep(run_id, run)
        self._snapshots.offer(run)
        return event

    def _rewind(
        self,
        run_id: str,
        step: int,
        left: LoadedRun | None,
        work: Callable[[LoadedRun, Writing], Answer],
    ) -> Answer:
        with self._journal.writing(run_id) as writing:
            if left is None:
                left = LoadedRun.load(writing, step)
            elif not (left.intact and left.catch_up_rewound(writing, step)):
                raise _Behind
            answer = work(left, writing)
        if writing.appended:
            for entry in writing.appended:
                left.applied(entry)
            left.row = writing.run_after
            self._loaded.keep(run_id, left)
            self._snapshots.offer(left)
        return answer


class _Behind(Exception):
    """The run has to be read anew first, which is done without holding it."""


_ATTEMPTS = 4
"""To level with a run that changes while it is folded."""

_PAUSES = (0.05, 0.2, 0.5)
"""Seconds before a transaction that was cut off is begun anew."""

_TURNS_OF_AN_ANSWER = 16

_REFUSALS = (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted)
"""Raised by work before it has changed anything."""

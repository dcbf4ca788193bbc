"""Runs in memory, kept level with the journal.

A run's state is read and changed only while its lock is held, in one worker thread at a
time. Everything that was appended since is folded in, the call is decided and stored (see
``deciding``), and only what has been committed is folded. A process that died, or another
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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from knapsack_scheduler import wire
from knapsack_scheduler.calls import Call
from knapsack_scheduler.deciding import REFUSALS, Decide, Decisions, Stored
from knapsack_scheduler.errors import AlreadyExists, RunNotFound, StoreUnavailable
from knapsack_scheduler.events import Events, RunRead
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import RunRow
from knapsack_scheduler.journal.transaction import Reading, Writing
from knapsack_scheduler.levelling import Behind, looked
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LoadedRuns
from knapsack_scheduler.protection import finished, tell_of_unheard
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.settling import Settling
from knapsack_scheduler.snapshotting import Snapshotter
from knapsack_scheduler.transactions import again, transacted
from knapsack_scheduler.turns import Turns
from knapsack_scheduler.workers import Workers

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Runs:
    """All runs of a journal, loaded as they are asked for.

    Args:
        journal: of the runs.
        events: where to tell of transactions and snapshots.
        auto_create_runs: create unknown runs for calls that may.
        default_config: of runs so created.
        retention: how far back a run goes.
        loaded_bytes: of runs that are kept in memory while nobody uses them.
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
    ) -> None:
        self._journal = journal
        self._events = events
        self._auto_create = auto_create_runs
        self._default_config = default_config
        self._loaded = LoadedRuns(loaded_bytes)
        self._turns = Turns()
        self._rewinds = Turns()
        self._unfinished: set[asyncio.Future[None]] = set()
        # Others may hold runs of a shared store, and then each of them takes a thread.
        self._writers = Workers("writes", 8 if journal.shared else 4)
        self._readers = Workers("reads", 4)
        self._folders = Workers("folds", 2)
        self._decisions = Decisions(journal, self._loaded, self._writers, events)
        self._snapshots = Snapshotter(journal, retention, events)
        self._settling = Settling(self._turns, self._readers, self._loaded, self._snapshots, events)

    async def settled(self) -> None:
        """Wait until all that was answered is folded and told of."""
        # What was answered in this turn of the event loop is begun to be settled in the next.
        await asyncio.sleep(0)
        await self._settling.ended()

    async def ended(self) -> None:
        """Wait until all that was begun is done too, whether somebody waits for it or not."""
        while self._unfinished or self._settling:
            await self._settling.ended()
            if self._unfinished:
                await asyncio.wait(self._unfinished)

    def close(self) -> None:
        """Wait for what is under way; a snapshot is given up."""
        self._decisions.close()
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
        call: Call,
        decide: Decide[Answer],
        *,
        create: bool = False,
        large: Callable[[LoadedRun], bool] = lambda _run: False,
        heavy: bool = False,
    ) -> Answer:
        """Decide a call with the run locked and level with the journal, and store it.

        A caller that is cancelled does not cancel the call: it is finished and
        committed, and a retry finds its answer. Unless a run that others write to too turns out
        to be far behind, or deleted: then nothing is stored.

        Args:
            run_id: of the run.
            call: that is to be recorded.
            decide: works out what the call comes to; what it raises leaves everything as it
                was.
            create: create an unknown run if the server may create runs by itself.
            large: returns whether that takes long. Asked before the run is level.
            heavy: what is appended is so large that its memory counts for as long as the
                caller waits: it is folded before the answer.

        Returns:
            The answer, as soon as all of it is committed.

        Raises:
            RunNotFound: no run of that name.
            Busy: calls before this one take too long; nothing was begun.
        """
        run = None
        if self._turns.is_free(run_id) and self._writers.is_free:
            run = self._loaded.get(run_id)
        if run is not None and not large(run):
            with suppress(Behind, RunNotFound):
                return await self._at_once(run_id, run, call, decide, heavy)
        # One that is wrong in any case is refused before it waits for anything.
        call.check()

        async def locked() -> Answer:
            await self._turns.take(run_id)
            folded = asyncio.get_running_loop().create_future() if heavy else None
            settling = False
            try:
                stored = await self._stored(run_id, call, decide, create, large)
                if not stored.entries:
                    return stored.decided.answer
                self._settling.begin(run_id, stored, folded)
                settling = True
            finally:
                if not settling:
                    self._turns.end(run_id)
            if folded is not None:
                await folded
            return stored.decided.answer

        return await finished(locked(), self._unfinished)

    async def _at_once(
        self, run_id: str, run: LoadedRun, call: Call, decide: Decide[Answer], heavy: bool
    ) -> Answer:
        """Do a small call on a run that is in memory and that nobody works on.

        Most calls come this way. What has to be done once it is stored is done by who is told
        of that, whether the caller is there or not: a task that nobody may cancel would take
        some turns of the event loop more.

        Raises:
            Behind: the run has to be read anew first; nothing was stored.
            RunNotFound: it was deleted.
        """
        loop = asyncio.get_running_loop()
        under_way = loop.create_future()
        folded = loop.create_future() if heavy else None
        caller_left = False

        def told(stored: Stored[Answer] | None, error: BaseException | None) -> None:
            if stored is not None and stored.entries:
                self._settling.begin(run_id, stored, folded)
            else:
                self._turns.end(run_id)
            self._unfinished.discard(under_way)
            under_way.set_result(None)
            if caller_left and error is not None and not isinstance(error, Behind):
                tell_of_unheard(error)

        await self._turns.take(run_id)
        self._unfinished.add(under_way)
        try:
            stored = await self._decisions.stored_at_once(run_id, run, call, decide, told)
        except asyncio.CancelledError:
            caller_left = True
            raise
        if folded is not None and stored.entries:
            await folded
        return stored.decided.answer

    async def look(self, run_id: str, work: Callable[[LoadedRun, Reading], Answer]) -> Answer:
        """Return what work makes of a run that is level with the journal, changing nothing.

        Raises:
            RunNotFound: no run of that name.
        """

        async def locked() -> Answer:
            async with self._turns.of(run_id):
                return await self._level(
                    run_id,
                    lambda run: self._readers.run(
                        lambda: again(
                            lambda: looked(self._journal, self._loaded, run_id, run, work)
                        )
                    ),
                )

        return await finished(locked(), self._unfinished)

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
            work: appends the rewind. It is given the run as that leaves it, in a worker thread
                and with the run held.

        Raises:
            RunNotFound: no run of that name.
            FailedPrecondition: the journal does not go back as far.
            Busy: calls before this one take too long; nothing was begun.
        """

        async def rewinding() -> Answer:
            # One at a time: a retry of one that is under way waits for its answer.
            async with self._rewinds.of(run_id):
                for attempt in range(_ATTEMPTS):
                    if attempt or run_id in self._loaded:
                        answer = await self.look(run_id, before)
                        if answer is not None:
                            return answer
                    left = await self._folders.run(lambda: again(lambda: self._load(run_id, step)))
                    with suppress(Behind):
                        return await self._swap(run_id, step, left, work)
                # So many calls come that it has to be done with the run held.
                return await self._swap(run_id, step, None, work)

        return await finished(rewinding(), self._unfinished)

    async def _swap(
        self,
        run_id: str,
        step: int,
        left: LoadedRun | None,
        work: Callable[[LoadedRun, Writing], Answer],
    ) -> Answer:
        async with self._turns.of(run_id):
            return await transacted(
                self._writers, self._events, lambda: self._rewind(run_id, step, left, work)
            )

    async def create(self, run_id: str, config: RunConfig) -> None:
        """Create a run; AlreadyExists if one of that name is there."""
        await self._writers.run(lambda: self._create(run_id, config))

    async def delete(self, run_id: str) -> None:
        """Delete a run; RunNotFound if there is none."""
        async with self._turns.of(run_id):
            deleting = self._writers.run(lambda: self._delete(run_id))
            await finished(deleting, self._unfinished)

    async def preload(self, count: int) -> list[LoadedRun]:
        """Load and return the runs that were written to last: their next call does not wait.

        One that cannot be loaded is logged, and refused when it is asked for.
        """

        def load() -> list[LoadedRun]:
            loaded = []
            rows = self._journal.list_runs("", 10**9)
            newest = sorted(rows, key=lambda row: -row.update_time)[:count]
            if newest:
                _LOG.info("runs to load before calls are served: %d of %d", len(newest), len(rows))
            for row in newest:
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

    def _delete(self, run_id: str) -> None:
        self._loaded.take(run_id)
        self._journal.delete_run(run_id)

    def _create(self, run_id: str, config: RunConfig) -> RunRow:
        message = wire.config_message(config).SerializeToString(deterministic=True)
        return self._journal.create_run(run_id, message, time.time_ns())

    async def _stored(
        self,
        run_id: str,
        call: Call,
        decide: Decide[Answer],
        create: bool,
        large: Callable[[LoadedRun], bool],
    ) -> Stored[Answer]:
        def attempt(run: LoadedRun) -> Awaitable[Stored[Answer]]:
            return self._decisions.stored(run_id, run, call, decide, large=large(run))

        try:
            return await self._level(run_id, attempt)
        except RunNotFound:
            if not (create and self._auto_create):
                raise
        created = None
        with suppress(AlreadyExists):
            created = await self._writers.run(lambda: self._create(run_id, self._default_config))
        try:
            return await self._level(run_id, attempt)
        except REFUSALS:
            if created:
                # A refused call changes nothing, so neither does it create a run.
                await self._writers.run(partial(self._undo, run_id, created))
            raise

    def _undo(self, run_id: str, created: RunRow) -> None:
        self._loaded.take(run_id)
        with suppress(RunNotFound):
            self._journal.delete_run(run_id, only_new=created.identity)

    async def _level(
        self, run_id: str, attempt: Callable[[LoadedRun], Awaitable[Answer]]
    ) -> Answer:
        """Return what an attempt on the run does, loaded before if it is not or is far behind.

        Folding takes long, so it is done without holding the run, and by threads of its own.
        """
        try:
            for _ in range(_ATTEMPTS):
                run = self._loaded.get(run_id)
                if run is None:
                    run = await self._folders.run(lambda: again(lambda: self._fetch(run_id)))
                with suppress(Behind):
                    return await attempt(run)
        except RunNotFound:
            self._loaded.take(run_id)
            raise
        raise StoreUnavailable("the run is rewound faster than it can be read")

    def _load(self, run_id: str, rewound_to: int | None = None) -> LoadedRun:
        with self._journal.reading(run_id) as reading:
            return LoadedRun.load(reading, rewound_to)

    def _fetch(self, run_id: str) -> LoadedRun:
        run = self._load(run_id)
        self._events.emit(RunRead(run_id))
        self._loaded.keep(run_id, run)
        return run

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
                raise Behind
            answer = work(left, writing)
        if writing.appended:
            for entry in writing.appended:
                left.applied(entry)
            left.row = writing.run_after
            self._loaded.keep(run_id, left)
            self._snapshots.offer(left)
        return answer


_ATTEMPTS = 4
"""To level with a run that changes while it is folded."""

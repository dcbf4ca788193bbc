"""Runs in memory, kept level with the journal.

A run's state is read and changed only while its lock is held, in one worker thread at a
time: first everything that was appended since is folded in, then the call decides and
appends, and only what has been committed is folded. A process that died, or another
replica, thus leaves nothing that this one could miss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StoreUnavailable,
)
from knapsack_scheduler.events import Committed, Events
from knapsack_scheduler.facts import ALWAYS, Fact
from knapsack_scheduler.journal.journal import Entry, Journal, RunRow, Writing
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.state import Counted, RunState

Answer = TypeVar("Answer")


class LoadedRun:
    """One run's state and how far it has read the journal.

    Attributes:
        row: the run as stored.
        state: what its journal folds to.
        decided: what the entry about to be appended says, where its maker knows; it is
            then not read from the entry again.
    """

    def __init__(self, row: RunRow) -> None:
        self.row = row
        self.decided: Fact | None = None
        self.state = RunState(wire.parse_config(pb.RunConfig.FromString(row.config)))
        self._seq = 0
        self._calls: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._forgotten: set[tuple[str, bytes]] = set()

    def catch_up(self, writing: Writing) -> None:
        """Fold what was appended since."""
        self.row = writing.run
        if self._seq == writing.run.last_seq:
            return
        tail = list(writing.tail(self._seq))
        if any(entry.kind == "rewind" for entry in tail):
            self.refold(writing)
            return
        for entry in tail:
            self.applied(entry)

    def refold(self, writing: Writing, rewound_to: int | None = None) -> None:
        """Fold the whole journal anew, without what its rewinds forget.

        Args:
            writing: the open transaction.
            rewound_to: step of a rewind that is about to be appended.
        """
        self.state = RunState(self.state.config)
        self._calls = {}
        self._forgotten = set()
        kept = _kept(writing, rewound_to)
        for entry in writing.tail(0):
            if entry.kind == "rewind" or kept[entry.seq]:
                self.applied(entry)
            else:
                if entry.kind == "allocate":
                    self.state.abandon(wire.fact_of(entry, self.state))
                if entry.kind == "report":
                    self._forgotten.add((entry.key, entry.digest))
                self._seq = entry.seq

    def applied(self, entry: Entry) -> Counted:
        """Take in an entry that is committed; returns what it changed."""
        counted = Counted()
        if entry.kind != "rewind":
            counted = self.state.fold(self.decided or wire.fact_of(entry, self.state))
        self.decided = None
        if entry.key:
            self._calls[entry.kind, entry.key] = (entry.seq, entry.digest)
        self._seq = entry.seq
        return counted

    def has_forgotten(self, report_id: str, digest: bytes) -> bool:
        """Return whether a report is one that a rewind forgot, arriving once more."""
        return (report_id, digest) in self._forgotten

    def answered(self, writing: Writing, kind: str, key: str, digest: bytes) -> bytes | None:
        """Return the stored answer of a call made before, or None.

        Raises:
            AlreadyExists: the id was used with other content.
        """
        known = self._calls.get((kind, key))
        if known is None:
            return None
        seq, before = known
        if before != digest:
            field = "report_id" if kind == "report" else "request_id"
            raise AlreadyExists(
                f"{field} = {key!r}: was used before in run {self.row.run_id!r} with other "
                "content; make a new id for a new call"
            )
        return writing.entry(seq).answer


def _kept(writing: Writing, rewound_to: int | None) -> dict[int, bool]:
    """Return, per entry number, whether no later rewind forgets it."""
    limit = 2**63 if rewound_to is None else rewound_to
    kept = {}
    for seq, kind, step in reversed(writing.outline()):
        kept[seq] = step == ALWAYS or step <= limit
        if kind == "rewind":
            limit = min(limit, step)
    return kept


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
    ) -> None:
        self._journal = journal
        self._events = events
        self._auto_create = auto_create_runs
        self._default_config = default_config
        self._loaded: dict[str, LoadedRun] = {}
        self._turns: dict[str, _Turn] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="runs")

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown(wait=True)

    async def in_thread(self, work: Callable[[], Answer]) -> Answer:
        """Run blocking work off the event loop."""
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
            NotFound: no run of that name.
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

    async def create(self, run_id: str, config: RunConfig) -> None:
        """Create a run; AlreadyExists if one of that name is there."""
        await self.in_thread(lambda: self._create(run_id, config))

    async def delete(self, run_id: str) -> None:
        """Delete a run; NotFound if there is none."""
        async with self._turn(run_id):
            await asyncio.shield(
                asyncio.ensure_future(self.in_thread(lambda: self._delete(run_id)))
            )

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

    def _create(self, run_id: str, config: RunConfig) -> None:
        message = wire.config_message(config).SerializeToString(deterministic=True)
        self._journal.create_run(run_id, message, time.time_ns())

    def _work(
        self, run_id: str, work: Callable[[LoadedRun, Writing], Answer], create: bool
    ) -> tuple[Answer, Counted]:
        created = create and self._auto_create and self._journal.find_run(run_id) is None
        if created:
            with suppress(AlreadyExists):
                self._create(run_id, self._default_config)
        try:
            return self._transact(run_id, work)
        except _REFUSALS:
            if created:
                # A refused call changes nothing, so neither does it create a run.
                self._delete(run_id)
            raise

    def _transact(
        self, run_id: str, work: Callable[[LoadedRun, Writing], Answer]
    ) -> tuple[Answer, Counted]:
        # Set aside until all has gone well: half-folded state is no state.
        run = self._loaded.pop(run_id, None)
        with self._journal.writing(run_id) as writing:
            if run is None or run.row.run_key != writing.run.run_key:
                run = LoadedRun(writing.run)
            run.catch_up(writing)
            try:
                answer = work(run, writing)
            except _REFUSALS:
                self._loaded[run_id] = run
                raise
        counted = Counted()
        for entry in writing.appended:
            counted = run.applied(entry)
        if writing.appended:
            run.row = writing.run_after
        self._loaded[run_id] = run
        return answer, counted


_REFUSALS = (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted)
"""Raised by work before it has changed anything."""

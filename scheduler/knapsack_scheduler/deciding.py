"""Calls are decided before their transaction begins, which stores what is still true.

As long as a transaction is open nobody else writes to a SQLite file, and no other replica to
the run. So what a call comes to is worked out of the run in memory, which its caller has
locked, without the store. The transaction then holds the run, looks whether it is where that
was decided, and appends. Where it is not, because another replica appended or the journal was
compacted, the decision is given up and made anew, a refusal too: what is answered is true of
the run as the transaction finds it. In a run with many callers that could go on for ever, so
the last attempt decides with the run held.

A small call is decided by the thread that writes it, as another one would take longer to
begin. Its transaction does not read the run first: it moves the run's row on if that is still
the one in memory, and else is begun anew. On a store that is shared it is decided with the run
held from the beginning: that takes less than to look first whether other replicas appended. A
large one is decided by a thread of its own kind, so that there is always one to write, after a
look at the store for what has to be folded.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.calls import Call, Repeated
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RunNotFound,
    SchedulerError,
    StoreUnavailable,
)
from knapsack_scheduler.events import Event, Events
from knapsack_scheduler.facts import Fact
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.transaction import Writing
from knapsack_scheduler.levelling import Behind, looked
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LoadedRuns
from knapsack_scheduler.transactions import again, transacted
from knapsack_scheduler.workers import Outcome, Workers

Answer = TypeVar("Answer")

REFUSALS = (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted)
"""Raised by who decides; a call that is refused changes nothing."""

_ATTEMPTS = 3
"""At a large decision while others change the run, before it is made with the run held."""


@dataclass(frozen=True, slots=True)
class Decided(Generic[Answer]):
    """What a call comes to, if the run stays as it is until that is stored.

    Attributes:
        answer: of the call.
        entry: to append; None for a call that changes nothing.
        fact: what the entry says, where that is known.
        event: returns what there is to tell of it, if anything, from what the fold of it
            changed. Called in a worker thread, with the run locked.
    """

    answer: Answer
    entry: Entry | None = None
    fact: Fact | None = None
    event: Callable[[Counted], Event | None] = lambda _counted: None


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that may not be done; ``error`` is raised if the run is still as it was."""

    error: SchedulerError


@dataclass(frozen=True, slots=True)
class Stored(Generic[Answer]):
    """What is committed and not folded yet.

    Attributes:
        decided: what the call has come to.
        run: in memory, without it.
        entries: that were appended; none if nothing changed.
        row: of the run, as the transaction found it.
        time_ns: of the entries, nanoseconds since 1970.
    """

    decided: Decided[Answer]
    run: LoadedRun
    entries: list[Entry]
    row: RunRow
    time_ns: int


_Verdict = Decided[Answer] | Repeated[Answer] | Refused

Decide = Callable[[LoadedRun], Decided[Answer] | Repeated[Answer]]
"""Works out what a call comes to from the run alone, changing nothing.

May be called more than once, in any worker thread, and raises one of ``REFUSALS``.
"""


class Decisions:
    """Decides calls and stores what they come to.

    Args:
        journal: of the runs.
        loaded: the runs in memory.
        writers: threads for transactions, which decide small calls too.
        events: where to tell of transactions.
    """

    def __init__(
        self, journal: Journal, loaded: LoadedRuns, writers: Workers, events: Events
    ) -> None:
        self._journal = journal
        self._loaded = loaded
        self._writers = writers
        self._events = events
        self._deciders = Workers("decisions", 2)

    def close(self) -> None:
        """Wait for decisions under way."""
        self._deciders.close()

    def stored_at_once(
        self,
        run_id: str,
        run: LoadedRun,
        call: Call,
        decide: Decide[Answer],
        then: Outcome[Stored[Answer]],
    ) -> Awaitable[Stored[Answer]]:
        """Return, once awaited, what a small call has come to, committed; see ``stored``.

        Args:
            run_id: of the run.
            run: in memory; set aside, and not kept before its entries are folded.
            call: that is to be recorded.
            decide: works out what the call comes to.
            then: as of ``Workers.run``.
        """
        return self._transacted(lambda: self._small(run_id, run, call, decide), then)

    async def stored(
        self, run_id: str, run: LoadedRun, call: Call, decide: Decide[Answer], *, large: bool
    ) -> Stored[Answer]:
        """Return what the call has come to, committed. Call with the run locked.

        Args:
            run_id: of the run.
            run: in memory; set aside, and not kept before its entries are folded.
            call: checked and serialised before its transaction begins.
            decide: works out what the call comes to.
            large: that takes long.

        Raises:
            Behind: the run has to be read anew first; nothing was stored.
            RunNotFound: no run of that name.
            Busy: no thread came free in time; nothing was stored.
        """
        if not large:
            return await self._transacted(lambda: self._small(run_id, run, call, decide))
        for _ in range(_ATTEMPTS):
            with suppress(_Moved):
                return await self._attempted(run_id, run, call, decide)
        return await self._transacted(lambda: self._transact(run_id, run, None, decide))

    async def _attempted(
        self, run_id: str, run: LoadedRun, call: Call, decide: Decide[Answer]
    ) -> Stored[Answer]:
        """Decide a large call and store it; _Moved if the run moved on between the two."""
        verdict: _Verdict[Answer] | None = await self._deciders.run(
            lambda: self._large(run_id, run, call, decide)
        )
        try:
            return await self._transacted(lambda: self._transact(run_id, run, verdict, None))
        finally:
            # For the same reason as in _transact.
            verdict = None

    def _transacted(
        self,
        attempt: Callable[[], Stored[Answer]],
        then: Outcome[Stored[Answer]] = lambda _stored, _error: None,
    ) -> Awaitable[Stored[Answer]]:
        return transacted(self._writers, self._events, attempt, then)

    def _small(
        self, run_id: str, run: LoadedRun, call: Call, decide: Decide[Answer]
    ) -> Stored[Answer]:
        call.prepare()
        self._loaded.take(run_id)
        verdict: _Verdict[Answer] | None = None
        if run.intact and not self._journal.shared:
            verdict = _verdict(run, decide)
        try:
            stored = self._appended(run_id, run, verdict)
            return stored or self._transact(run_id, run, verdict, decide)
        finally:
            # For the same reason as in _transact.
            verdict = None

    def _appended(
        self, run_id: str, run: LoadedRun, verdict: _Verdict[Answer] | None
    ) -> Stored[Answer] | None:
        """Store what was decided if the run's row is the one in memory; None if it has to be read.

        Most calls of most runs come this way.
        """
        if not (isinstance(verdict, Decided) and verdict.entry and run.stands_at(run.row)):
            return None
        now = time.time_ns()
        try:
            entry = self._journal.append(run.row, verdict.entry, now)
        except StoreUnavailable:
            self._loaded.keep(run_id, run)
            raise
        return None if entry is None else Stored(verdict, run, [entry], run.row, now)

    def _large(
        self, run_id: str, run: LoadedRun, call: Call, decide: Decide[Answer]
    ) -> _Verdict[Answer]:
        call.prepare()
        again(lambda: looked(self._journal, self._loaded, run_id, run, lambda *_: None))
        return _verdict(run, decide)

    def _transact(
        self,
        run_id: str,
        run: LoadedRun,
        verdict: _Verdict[Answer] | None,
        decide: Decide[Answer] | None,
    ) -> Stored[Answer]:
        """Store what was decided, if the run is still what that was decided of.

        Args:
            run_id: of the run.
            run: in memory.
            verdict: what was decided; None for nothing yet.
            decide: for a run that has moved on; None to raise _Moved then.
        """
        # Set aside until all has gone well: half-folded state is no state.
        self._loaded.take(run_id)
        try:
            with self._journal.writing(run_id) as writing:
                if verdict is None or not run.stands_at(writing.run):
                    if decide is None:
                        raise _Moved
                    if not (run.intact and run.catch_up(writing)):
                        raise Behind
                    verdict = _verdict(run, decide)
                if isinstance(verdict, Refused):
                    raise verdict.error
                decided = _decided(verdict, writing)
                if decided.entry is not None:
                    writing.append(decided.entry)
        except (*REFUSALS, StoreUnavailable, _Moved) as error:
            if run.intact and not isinstance(error, RunNotFound):
                self._loaded.keep(run_id, run)
            # An error holds the frames that it passed: it must not be held by them.
            verdict = None
            raise
        if not writing.appended:
            self._loaded.keep(run_id, run)
        return Stored(decided, run, writing.appended, writing.run, writing.time_ns)


class _Moved(Exception):
    """The run is not any more what was decided of."""


def _verdict(run: LoadedRun, decide: Decide[Answer]) -> _Verdict[Answer]:
    try:
        return decide(run)
    except REFUSALS as refusal:
        return Refused(refusal)


def _decided(verdict: Decided[Answer] | Repeated[Answer], writing: Writing) -> Decided[Answer]:
    if isinstance(verdict, Repeated):
        return Decided(verdict.answer(writing.entry(verdict.seq).answer))
    return verdict

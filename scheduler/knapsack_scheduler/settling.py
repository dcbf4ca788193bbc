"""What comes after an answer: what was stored is folded into its run, and told of."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.deciding import Stored
from knapsack_scheduler.errors import Busy
from knapsack_scheduler.events import Event, Events
from knapsack_scheduler.loadedruns import LoadedRuns
from knapsack_scheduler.snapshotting import Snapshotter
from knapsack_scheduler.turns import Turns
from knapsack_scheduler.workers import Workers

_LOG = logging.getLogger(__name__)

_TURNS_OF_AN_ANSWER = 16
"""Turns of the event loop in which an answer goes from the handler to its socket."""


class Settling:
    """Settles calls that were answered: each ends the turn that its call took of the run.

    Args:
        turns: of the runs.
        readers: threads that fold.
        loaded: the runs in memory.
        snapshots: are offered each run that has changed.
        events: where to tell of what was folded.
    """

    def __init__(
        self,
        turns: Turns,
        readers: Workers,
        loaded: LoadedRuns,
        snapshots: Snapshotter,
        events: Events,
    ) -> None:
        self._turns = turns
        self._readers = readers
        self._loaded = loaded
        self._snapshots = snapshots
        self._events = events
        self._under_way: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        """Count the calls that are not settled yet."""
        return len(self._under_way)

    async def ended(self) -> None:
        """Wait until no call is left to settle."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def begin(
        self, run_id: str, stored: Stored[Any], folded: asyncio.Future[None] | None = None
    ) -> None:
        """Have a call settled, which ends its turn.

        A timer of no time: to begin a task takes some of the time in which the answer goes.

        Args:
            run_id: of the run.
            stored: what there is to fold.
            folded: to be done when it is folded, or cannot be.
        """
        loop = asyncio.get_running_loop()
        begun = loop.create_future()

        def go_on() -> None:
            task = loop.create_task(self._settle(run_id, stored, folded))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            self._under_way.discard(begun)
            begun.set_result(None)

        self._under_way.add(begun)
        loop.call_later(0.0, go_on)

    async def _settle(
        self, run_id: str, stored: Stored[Any], folded: asyncio.Future[None] | None
    ) -> None:
        """Fold what was stored, tell of it, and end the turn.

        When all of an allocation has come, what the next decision needs of the statistics is
        worked out too. A trainer updates its weights before that: it costs nobody anything.
        """
        try:
            # The answer goes first: it takes some turns of the event loop, and a thread at
            # work would hold each of them up.
            for _ in range(_TURNS_OF_AN_ANSWER):
                if self._turns.awaited(run_id):
                    break
                await asyncio.sleep(0)
            event, completes = await self._readers.run(lambda: self._fold(run_id, stored))
            _done(folded)
            if event is not None:
                self._events.emit(event)
            if completes:
                await self._readers.run(stored.run.state.prepare)
        except (RuntimeError, Busy) as error:
            # A service that ends has no threads any more.
            _LOG.info("run %r: not folded, to be read anew: %s", run_id, error)
        except Exception:
            _LOG.exception("run %r: could not be folded, to be read anew", run_id)
        finally:
            _done(folded)
            self._turns.end(run_id)

    def _fold(self, run_id: str, stored: Stored[Any]) -> tuple[Event | None, bool]:
        """Take in what was stored; returns what there is to tell, and if an allocation is whole."""
        run, row, counted = stored.run, stored.row, Counted()
        for entry in stored.entries:
            counted = run.applied(entry, stored.decided.fact)
            row = row.after(entry, stored.time_ns)
        run.row = row
        event = stored.decided.event(counted)
        self._loaded.keep(run_id, run)
        self._snapshots.offer(run)
        return event, counted.completes


def _done(folded: asyncio.Future[None] | None) -> None:
    # Done already, too, if who waited for it was cancelled.
    if folded is not None and not folded.done():
        folded.set_result(None)

"""Transactions off the event loop: timed, and begun anew when they were cut off."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from knapsack_scheduler.errors import Busy, InvalidArgument, StoreInterrupted, Unavailable
from knapsack_scheduler.events import Committed, Events
from knapsack_scheduler.workers import Outcome, Workers

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_PAUSES = (0.05, 0.2, 0.5)
"""Seconds before a transaction that was cut off is begun anew."""


def transacted(
    workers: Workers,
    events: Events,
    attempt: Callable[[], Answer],
    then: Outcome[Answer] = lambda _answer, _error: None,
) -> Awaitable[Answer]:
    """Return, once awaited, what a transaction returns, done by one of the workers and told of.

    Args:
        workers: threads for it.
        events: where to tell of it.
        attempt: does it.
        then: as of ``Workers.run``.

    Raises:
        Busy: no thread came free in time; nothing was begun.
    """
    start = time.perf_counter()
    end: float | None = None

    def timed() -> Answer:
        nonlocal end
        try:
            return again(attempt)
        finally:
            end = time.perf_counter()

    def told(answer: Answer | None, error: BaseException | None) -> None:
        busy = isinstance(error, Busy)
        failed = isinstance(error, Unavailable) and not busy
        # Not of one that is wrong, and not of what could not be begun for other reasons.
        if busy or (end is not None and not isinstance(error, InvalidArgument)):
            seconds = (end or time.perf_counter()) - start
            # The answer goes first, in this turn of the event loop and the next: whoever
            # listens takes some of its time.
            asyncio.get_running_loop().call_later(
                0.0, lambda: events.emit(Committed(seconds, failed, busy))
            )
        then(answer, error)

    return workers.run(timed, told)


def again(attempt: Callable[[], Answer]) -> Answer:
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

"""A run in memory is brought level with the journal, or has to be read anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.transaction import Reading
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LoadedRuns

Answer = TypeVar("Answer")


class Behind(Exception):
    """The run has to be read anew first, which is done without holding it."""


def looked(
    journal: Journal,
    loaded: LoadedRuns,
    run_id: str,
    run: LoadedRun,
    work: Callable[[LoadedRun, Reading], Answer],
) -> Answer:
    """Return what work makes of the run once it is level with the journal.

    Call with the run locked. It is set aside meanwhile, as half-folded state is no state.

    Raises:
        Behind: it is too far behind.
        RunNotFound: no run of that name.
    """
    loaded.take(run_id)
    level = True
    try:
        with journal.reading(run_id) as reading:
            level = run.intact and run.catch_up(reading)
            if not level:
                raise Behind
            return work(run, reading)
    finally:
        if level and run.intact:
            loaded.keep(run_id, run)

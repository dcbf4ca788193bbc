"""Decides when a run gets a snapshot, and writes it in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from knapsack_scheduler.errors import RunNotFound, SchedulerError
from knapsack_scheduler.events import Events, SnapshotEnded
from knapsack_scheduler.journal.columns import Columns, ColumnsDamaged
from knapsack_scheduler.journal.compaction import Retention, compact
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import RunRow
from knapsack_scheduler.journal.snapshots import Abandoned, write_snapshot
from knapsack_scheduler.loaded import LoadedRun

_LOG = logging.getLogger(__name__)

_TAIL_BYTES = 32 * 2**20
"""Recorded bytes after which a snapshot is made, however few calls they are."""

_BYTES_PER_CALL = 2**16
"""A snapshot may cost this many bytes for each call since the one before."""


class Snapshotter:
    """One thread that writes one snapshot at a time and compacts the journal behind it."""

    def __init__(self, journal: Journal, retention: Retention, events: Events) -> None:
        self._journal = journal
        self._retention = retention
        self._events = events
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._busy = threading.Lock()
        self._closing = threading.Event()

    def close(self) -> None:
        """Give up the snapshot under way; what is left of it is deleted by the next one."""
        self._closing.set()
        self._thread.shutdown(wait=True)

    def offer(self, run: LoadedRun) -> None:
        """Begin a snapshot of the run if it is due and no other is under way.

        Call with the run locked. The caller waits for a copy of what changes in the state,
        about 0.1 GB for a million prompts, and for nothing else.
        """
        if not self._is_due(run) or not self._busy.acquire(blocking=False):
            return
        try:
            # Also when it fails: the next attempt comes after as many calls again.
            run.snapshot_made(run.seq)
            self._thread.submit(
                self._make, run.row, run.seq, run.state.last_step, run.state.frozen()
            )
        except BaseException:
            self._busy.release()
            raise

    def _is_due(self, run: LoadedRun) -> bool:
        size = run.row.snapshot_size
        calls = run.seq - run.snapshot_seq
        return calls >= max(
            self._retention.snapshot_calls, size // _BYTES_PER_CALL
        ) or run.tail_bytes >= max(_TAIL_BYTES, size)

    def _make(self, row: RunRow, seq: int, step: int, frozen: Callable[[], Columns]) -> None:
        start = time.perf_counter()
        try:
            with self._journal.claim(row.identity) as mine:
                if not mine:
                    return
                mark = write_snapshot(self._journal, row, seq, step, frozen(), self._closing.is_set)
                plan = compact(self._journal, row.run_id, self._retention, self._closing.is_set)
            _LOG.info(
                "run %r: snapshot of %d bytes at entry %d in %.1f s; the journal goes back to "
                "entry %d",
                row.run_id,
                mark.size,
                seq,
                time.perf_counter() - start,
                (plan.floor.seq if plan.floor else row.floor_seq) + 1,
            )
            self._events.emit(SnapshotEnded(failed=False))
        except (Abandoned, RunNotFound):
            pass
        except Exception as error:
            known = isinstance(error, SchedulerError | ColumnsDamaged)
            _LOG.warning(
                "run %r: no snapshot at entry %d: %s",
                row.run_id,
                seq,
                error,
                exc_info=None if known else error,
            )
            self._events.emit(SnapshotEnded(failed=True))
        finally:
            self._busy.release()

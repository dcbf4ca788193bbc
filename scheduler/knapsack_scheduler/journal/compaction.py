"""Which snapshots stay, and up to where the journal is theirs alone.

Kept are the two newest snapshots, some at least a quarter of the horizon apart, and the
floor: the newest one that is at least the horizon behind. What came before the floor
is deleted, but for imports, which no rewind forgets, and rewinds. So a rewind within the
horizon finds a snapshot little more than a quarter of it away, and disk and memory hold the
calls of one and a quarter horizons, at most one and a quarter ``max_calls``, and of what
comes between two snapshots. The horizon is a number of steps that were recorded, whatever
numbers they have (``recordedsteps.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from knapsack_scheduler.journal.columns import ColumnsDamaged
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.recordedsteps import Horizon, RecordedSteps
from knapsack_scheduler.journal.records import ALWAYS_KEPT, Outline, RunRow, SnapshotMark
from knapsack_scheduler.journal.schema import entries, runs, snapshot_parts, snapshots
from knapsack_scheduler.journal.snapshots import is_whole, usable

_BATCH = 200
_BREATH = 0.002


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of a run can be taken back.

    Attributes:
        horizon: recorded steps behind the newest one that a rewind may at least name.
        max_calls: recorded calls after which the horizon is cut short, so that a run
            whose step stands still is bounded too.
        snapshot_calls: recorded calls after which a snapshot is made; more where it is
            large.
    """

    horizon: int = 1000
    max_calls: int = 500_000
    snapshot_calls: int = 500


@dataclass(frozen=True, slots=True)
class Plan:
    """What to keep of a run.

    Attributes:
        floor: snapshot before which everything goes; None to leave the floor where it is.
        floor_step, closed_step: see ``RunRow``; of that floor.
        drop: numbers of the snapshots that go.
    """

    floor: SnapshotMark | None
    floor_step: int
    closed_step: int
    drop: tuple[int, ...]


_NOTHING = Plan(None, -1, -1, ())


def plan_compaction(
    run: RunRow, marks: Sequence[SnapshotMark], outline: Sequence[Outline], retention: Retention
) -> Plan:
    """Return what to keep.

    Args:
        run: as it is stored.
        marks: its complete snapshots, oldest first.
        outline: of the run.
        retention: how much is to be kept.
    """
    good = usable(marks, run, outline)
    horizon = Horizon(RecordedSteps.of(run, outline), retention.horizon)
    # Never the newest one: where it is damaged there must be another.
    floors = [
        mark
        for mark in good[:-1]
        if (horizon.oldest is not None and horizon.step_of(mark.seq) <= horizon.oldest)
        or run.last_seq - mark.seq >= retention.max_calls
    ]
    floor = max(floors, key=lambda mark: mark.seq, default=None)
    if floor is not None and floor.seq <= run.floor_seq:
        floor = None
    lowest = floor.seq if floor else run.floor_seq
    above = [mark for mark in good if mark.seq >= lowest]
    steps, calls = max(retention.horizon // 4, 1), max(retention.max_calls // 4, 1)
    keep = {mark.seq for mark in above[-2:]}
    # Each far enough from the one kept before it, which stays so: what is kept now is there
    # when it becomes the floor.
    kept = None
    for seq in (mark.seq for mark in above):
        if kept is None or seq - kept >= calls or horizon.begun(seq) - horizon.begun(kept) >= steps:
            keep.add(seq)
            kept = seq
    drop = tuple(mark.seq for mark in marks if mark.seq not in keep)
    if floor is None:
        return Plan(None, -1, -1, drop)
    floor_step = horizon.step_of(floor.seq)
    closed = [-1] if horizon.oldest is None else [horizon.oldest]
    # Of fewer steps, where calls moved the floor, those that no call since was of. One that calls
    # still come of stays open, and those above it, as what is above may be a mistake.
    recent = [entry.step for entry in outline if entry.seq > floor.seq and entry.step >= 0]
    closed += [min(recent) - 1] if recent else []
    return Plan(floor, floor_step, min(floor_step, max(closed)), drop)


def compact(
    journal: Journal,
    run_id: str,
    retention: Retention,
    stop: Callable[[], bool] = lambda: False,
) -> Plan:
    """Delete what the plan drops, in small transactions; returns the plan.

    May be cut short at any point: what is left is deleted by the next one. Nothing is
    dropped for the sake of a snapshot that cannot be read, or of steps that are rewound
    meanwhile.

    Args:
        journal: where the run is.
        run_id: of the run.
        retention: how much is to be kept.
        stop: asked between transactions.

    Raises:
        NotFound: no run of that name.
        StoreUnavailable: the store cannot be used.
    """
    with journal.reading(run_id) as reading:
        run = reading.run
        plan = plan_compaction(run, reading.snapshots(), reading.outline(), retention)
        if plan.floor is not None and not is_whole(reading, plan.floor):
            raise ColumnsDamaged(f"the checksum of snapshot {plan.floor.seq} is wrong")
    floor_seq = run.floor_seq
    if plan.floor is not None:
        floor_seq = plan.floor.seq
        with journal.transaction() as connection:
            # A rewind in the meantime may need what is below the new floor.
            moved = connection.execute(
                sa.update(runs)
                .where(
                    runs.c.run_key == run.run_key,
                    runs.c.floor_seq < floor_seq,
                    runs.c.branch == run.branch,
                )
                .values(
                    floor_seq=floor_seq,
                    floor_step=plan.floor_step,
                    closed_step=sa.case(
                        (runs.c.closed_step > plan.closed_step, runs.c.closed_step),
                        else_=plan.closed_step,
                    ),
                )
            )
        if moved.rowcount == 0:
            return _NOTHING
    for seq in plan.drop:
        _drop_snapshot(journal, run.run_key, seq, stop)
    _drop_leftovers(journal, run.run_key, stop)
    _drop_entries(journal, run.run_key, floor_seq, stop)
    return plan


def _drop_snapshot(journal: Journal, run_key: int, seq: int, stop: Callable[[], bool]) -> None:
    """Delete a snapshot: its mark first, so that a part of it is never taken for it."""
    with journal.transaction() as connection:
        connection.execute(
            sa.delete(snapshots).where(snapshots.c.run_key == run_key, snapshots.c.seq == seq)
        )
        last = connection.execute(
            sa.select(sa.func.max(snapshot_parts.c.part)).where(
                snapshot_parts.c.run_key == run_key, snapshot_parts.c.seq == seq
            )
        ).scalar_one_or_none()
    for part in range((last if last is not None else -1) + 1):
        if stop():
            return
        with journal.transaction() as connection:
            connection.execute(
                sa.delete(snapshot_parts).where(
                    snapshot_parts.c.run_key == run_key,
                    snapshot_parts.c.seq == seq,
                    snapshot_parts.c.part == part,
                )
            )
        time.sleep(_BREATH)


def _drop_leftovers(journal: Journal, run_key: int, stop: Callable[[], bool]) -> None:
    """Delete parts of snapshots that were never completed, or not deleted to the end."""
    marked = sa.select(snapshots.c.seq).where(snapshots.c.run_key == run_key)
    with journal.transaction() as connection:
        left = (
            connection.execute(
                sa.select(snapshot_parts.c.seq)
                .where(snapshot_parts.c.run_key == run_key, snapshot_parts.c.seq.not_in(marked))
                .distinct()
            )
            .scalars()
            .all()
        )
    for seq in left:
        _drop_snapshot(journal, run_key, seq, stop)


def _drop_entries(journal: Journal, run_key: int, floor_seq: int, stop: Callable[[], bool]) -> None:
    """Delete the entries up to the floor, those apart that are always kept."""
    compacted = (entries.c.run_key == run_key) & (entries.c.seq <= floor_seq)
    forgotten = compacted & entries.c.kind.not_in(ALWAYS_KEPT)
    while not stop():
        with journal.transaction() as connection:
            batch = (
                connection.execute(
                    sa.select(entries.c.seq).where(forgotten).order_by(entries.c.seq).limit(_BATCH)
                )
                .scalars()
                .all()
            )
            if not batch:
                return
            connection.execute(sa.delete(entries).where(forgotten, entries.c.seq <= batch[-1]))
        time.sleep(_BREATH)

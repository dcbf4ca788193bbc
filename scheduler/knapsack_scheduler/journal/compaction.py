"""Which snapshots stay, and up to where the journal is theirs alone.

Kept are the two newest snapshots, the oldest one of every quarter of the horizon, and
the floor: the newest one that is at least the horizon behind. What came before the floor
is deleted, but for imports, which no rewind forgets, and rewinds. So a rewind within the
horizon finds a snapshot at most a quarter of it away, and disk and memory hold the calls
of one and a quarter horizons, at most one and a quarter ``max_calls``, and of what comes
between two snapshots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import sqlalchemy as sa

from knapsack_scheduler.journal.columns import ColumnsDamaged
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import ALWAYS_KEPT, Outline, SnapshotMark
from knapsack_scheduler.journal.schema import entries, runs, snapshot_parts, snapshots
from knapsack_scheduler.journal.snapshots import is_whole, usable

_BATCH = 200
_BREATH = 0.002


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of a run can be taken back.

    Attributes:
        horizon: steps behind the newest one that a rewind may at least name.
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
        closed_step: see ``RunRow``.
        drop: numbers of the snapshots that go.
    """

    floor: SnapshotMark | None
    closed_step: int
    drop: tuple[int, ...]


_NOTHING = Plan(None, -1, ())


def plan_compaction(
    marks: Sequence[SnapshotMark],
    outline: Sequence[Outline],
    floor_seq: int,
    last_seq: int,
    last_step: int,
    retention: Retention,
) -> Plan:
    """Return what to keep.

    Args:
        marks: the complete snapshots, oldest first.
        outline: of the run.
        floor_seq: of the run.
        last_seq: number of its newest entry.
        last_step: its highest step that is not rewound.
        retention: how much is to be kept.
    """
    good = usable(marks, outline)
    old = last_step - retention.horizon
    # Never the newest one: where it is damaged there must be another.
    floors = [
        mark for mark in good[:-1] if mark.step <= old or last_seq - mark.seq >= retention.max_calls
    ]
    floor = max(floors, key=lambda mark: mark.seq, default=None)
    if floor is not None and floor.seq <= floor_seq:
        floor = None
    lowest = floor.seq if floor else floor_seq
    above = [mark for mark in good if mark.seq >= lowest]
    steps, calls = max(retention.horizon // 4, 1), max(retention.max_calls // 4, 1)
    keep = {mark.seq for mark in (*above[:1], *above[-2:])}
    for before, mark in pairwise(above):
        # The oldest of its quarter, which stays the oldest: what is kept now is there
        # when it becomes the floor.
        if mark.step // steps > before.step // steps or mark.seq // calls > before.seq // calls:
            keep.add(mark.seq)
    return Plan(
        floor,
        min(floor.step, old) if floor else -1,
        tuple(mark.seq for mark in marks if mark.seq not in keep),
    )


def compact(
    journal: Journal,
    run_id: str,
    last_step: int,
    retention: Retention,
    stop: Callable[[], bool] = lambda: False,
    branch: int | None = None,
) -> Plan:
    """Delete what the plan drops, in small transactions; returns the plan.

    May be cut short at any point: what is left is deleted by the next one. Nothing is
    dropped for the sake of a snapshot that cannot be read, or of steps that were rewound
    since ``last_step`` was the highest.

    Args:
        journal: where the run is.
        run_id: of the run.
        last_step: its highest step that is not rewound.
        retention: how much is to be kept.
        stop: asked between transactions.
        branch: rewinds of the run at ``last_step``; None if it has the same as now.

    Raises:
        NotFound: no run of that name.
        StoreUnavailable: the store cannot be used.
    """
    with journal.reading(run_id) as reading:
        run, outline = reading.run, reading.outline()
        marks = reading.snapshots()
        if branch is not None and branch != run.branch:
            return _NOTHING
        plan = plan_compaction(marks, outline, run.floor_seq, run.last_seq, last_step, retention)
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
                    floor_step=plan.floor.step,
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

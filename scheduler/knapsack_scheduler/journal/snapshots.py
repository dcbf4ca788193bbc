"""Snapshots of a run: written in small pieces, believed only when their checksum is right.

A snapshot is the state after an entry. It holds nothing that a later rewind to its highest
step or beyond would forget, so a rewind is folded from the newest snapshot whose highest step
it does not pass; what is compacted counts there as ``RunRow.floor_step`` says.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy.typing as npt
import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from knapsack_scheduler.journal.columns import Columns, ColumnsDamaged, decode, encode
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.recordedsteps import RecordedSteps
from knapsack_scheduler.journal.records import Outline, RunRow, SnapshotMark
from knapsack_scheduler.journal.schema import runs, snapshot_parts, snapshots
from knapsack_scheduler.journal.transaction import Reading, columns_of

_BREATH = 0.002
"""Seconds between two parts: others who wait for the database go first."""


class Abandoned(Exception):
    """The snapshot was given up: the run or a part of it is gone, or the process ends."""


def limits_after(outline: Sequence[Outline], rewound_to: int | None) -> Callable[[int], int]:
    """Return a function of an entry's number: the highest step that is not forgotten later.

    Args:
        outline: of the run.
        rewound_to: step of a rewind that is about to be appended; None for none.
    """
    rewinds = [(entry.seq, entry.step) for entry in outline if entry.kind == "rewind"]
    if rewound_to is not None:
        rewinds.append((2**63, rewound_to))

    def limit(seq: int) -> int:
        return min((step for at, step in rewinds if at > seq), default=2**63)

    return limit


def usable(
    marks: Sequence[SnapshotMark],
    run: RunRow,
    outline: Sequence[Outline],
    rewound_to: int | None = None,
) -> list[SnapshotMark]:
    """Return the snapshots of which no rewind forgets a part, oldest first.

    None is older than the floor: it lacks the entries between.
    """
    limit = limits_after(outline, rewound_to)
    highest = RecordedSteps.of(run, outline, marks).highest
    return [
        mark
        for mark in marks
        # What begins anew begins with imports, not with a snapshot.
        if mark.seq in highest and highest[mark.seq] <= limit(mark.seq) >= 0
    ]


def read_snapshot(reading: Reading, mark: SnapshotMark) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a snapshot; ColumnsDamaged if they are not what was written."""
    digest = _digest(reading.run, mark.seq, mark.step)

    def checked() -> Iterator[bytes]:
        count = 0
        for part in reading.snapshot_parts(mark):
            digest.update(part)
            count += 1
            yield part
        if count != mark.parts or digest.digest() != mark.checksum:
            raise ColumnsDamaged(f"the checksum of snapshot {mark.seq} is wrong")

    try:
        return decode(checked())
    except DatabaseError as error:
        if type(error) is not DatabaseError:
            raise
        # SQLite's word for a page of the file that makes no sense.
        raise ColumnsDamaged(str(error.orig)) from error


def write_snapshot(
    journal: Journal,
    run: RunRow,
    seq: int,
    step: int,
    columns: Columns,
    stop: Callable[[], bool] = lambda: False,
) -> SnapshotMark:
    """Store a snapshot in many small transactions, and its mark in the last one.

    Args:
        journal: of the run.
        run: as it was at ``seq``.
        seq: number of the newest entry in the snapshot.
        step: highest step in it; -1 if none has one.
        columns: the state; must not change meanwhile.
        stop: asked between two parts; true gives up.

    Raises:
        Abandoned: the run was deleted meanwhile, or parts by a process that had claimed the
            run when this one's connection was lost; or ``stop`` said so.
        StoreUnavailable: the store cannot be written; nothing but parts are left of it.
    """
    with journal.transaction() as connection:
        for table in (snapshots, snapshot_parts):
            connection.execute(
                sa.delete(table).where(table.c.run_key == run.run_key, table.c.seq == seq)
            )
    digest, size, count = _digest(run, seq, step), 0, 0
    for part in encode(columns):
        if stop():
            raise Abandoned("the scheduler ends")
        with journal.transaction() as connection:
            # Else a run deleted meanwhile would leave parts of it behind.
            _still_there(connection, run)
            connection.execute(
                sa.insert(snapshot_parts),
                {"run_key": run.run_key, "seq": seq, "part": count, "data": part},
            )
        digest.update(part)
        size, count = size + len(part), count + 1
        time.sleep(_BREATH)
    mark = SnapshotMark(seq, step, count, size, digest.digest())
    with journal.transaction() as connection:
        _still_there(connection, run)
        parts = snapshot_parts.c
        there = sa.select(sa.func.count()).where(parts.run_key == run.run_key, parts.seq == seq)
        if connection.execute(there).scalar_one() != count:
            raise Abandoned("another process, that took it for a left-over, deleted parts of it")
        insert_mark(connection, run.run_key, mark)
    return mark


def insert_mark(connection: sa.Connection, run_key: int, mark: SnapshotMark) -> None:
    """Store the mark of a snapshot whose parts are all there."""
    connection.execute(sa.insert(snapshots), {"run_key": run_key, **columns_of(mark)})
    connection.execute(
        sa.update(runs)
        .where(runs.c.run_key == run_key, runs.c.snapshot_seq < mark.seq)
        .values(snapshot_seq=mark.seq, snapshot_size=mark.size)
    )


def is_whole(reading: Reading, mark: SnapshotMark) -> bool:
    """Return whether all parts of a snapshot are there, and are what was written."""
    digest, count, size = _digest(reading.run, mark.seq, mark.step), 0, 0
    for part in reading.snapshot_parts(mark):
        digest.update(part)
        count, size = count + 1, size + len(part)
    return (count, size, digest.digest()) == (mark.parts, mark.size, mark.checksum)


def _still_there(connection: sa.Connection, run: RunRow) -> None:
    # Locks the row for the length of this small transaction, as an append does.
    query = sa.select(runs.c.identity).where(runs.c.run_key == run.run_key).with_for_update()
    if connection.execute(query).scalar_one_or_none() != run.identity:
        raise Abandoned("the run was deleted")


def _digest(run: RunRow, seq: int, step: int) -> hashlib.blake2b:
    return hashlib.blake2b(f"{run.identity}/{seq}/{step}/".encode(), digest_size=16)

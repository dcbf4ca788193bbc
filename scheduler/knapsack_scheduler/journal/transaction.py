"""One transaction on one run: what can be read in it, and what appended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.journal.records import (
    ALWAYS_KEPT,
    Entry,
    Outline,
    RunRow,
    SnapshotMark,
)
from knapsack_scheduler.journal.schema import entries, runs, snapshot_parts, snapshots
from knapsack_scheduler.journal.statements import CallStatements, driver_of

_BATCH = 200
"""Entries fetched at once: a tail of any length is read in bounded memory."""


class Reading:
    """A view of one run as of one moment."""

    def __init__(self, connection: sa.Connection, run: RunRow) -> None:
        self._connection = connection
        self.run = run

    def check_run(self) -> None:
        """Raise StoreUnavailable if what no call changes of the run is not what was written."""
        query = sa.select(runs.c.checksum).where(runs.c.run_key == self.run.run_key)
        checksum = self._connection.execute(query).scalar_one()
        if checksum is not None and checksum != self.run.checksum:
            raise StoreUnavailable(
                f"run {self.run.run_id!r}: its row is damaged: the checksum of its name, config, "
                "creation and identity is wrong; bring the store back from a backup"
            )

    def tail(self, after: int) -> Iterator[Entry]:
        """Yield the entries with a number above ``after``, in order.

        Numbers up to the run's ``floor_seq`` are compacted and not among them. StoreUnavailable
        if one is not what was written.
        """
        after = max(after, self.run.floor_seq)
        query = _ENTRY.where(entries.c.run_key == self.run.run_key).order_by(entries.c.seq)
        while True:
            rows = self._connection.execute(
                query.where(entries.c.seq > after).limit(_BATCH)
            ).fetchall()
            for row in rows:
                yield self._sound(row)
            if len(rows) < _BATCH:
                return
            after = rows[-1].seq

    def entry(self, seq: int) -> Entry:
        """Return the entry of that number; StoreUnavailable if it is not what was written."""
        query = _ENTRY.where(entries.c.run_key == self.run.run_key, entries.c.seq == seq)
        return self._sound(self._connection.execute(query).one())

    def _sound(self, row: Sequence[Any]) -> Entry:
        values, checksum = row[:-1], row[-1]
        entry = Entry(*values)
        if checksum is not None and checksum != entry.checksum:
            raise StoreUnavailable(
                f"run {self.run.run_id!r}: entry {entry.seq} is damaged: its checksum is wrong; "
                "bring the store back from a backup"
            )
        return entry

    def outline(self) -> list[Outline]:
        """Return every entry there is, without payload and answer, in order.

        Of the compacted ones these are imports and rewinds.
        """
        kept = (entries.c.seq > self.run.floor_seq) | entries.c.kind.in_(ALWAYS_KEPT)
        query = _OUTLINE.where(entries.c.run_key == self.run.run_key, kept)
        rows = self._connection.execute(query.order_by(entries.c.seq))
        return [Outline(*row) for row in rows]

    def snapshots(self) -> list[SnapshotMark]:
        """Return the run's complete snapshots, oldest first."""
        query = _SNAPSHOT.where(snapshots.c.run_key == self.run.run_key)
        rows = self._connection.execute(query.order_by(snapshots.c.seq))
        return [SnapshotMark(*row) for row in rows]

    def snapshot_parts(self, mark: SnapshotMark) -> Iterator[bytes]:
        """Yield the parts of a snapshot that are there, in order."""
        for part in range(mark.parts):
            data = self._connection.execute(
                sa.select(snapshot_parts.c.data).where(
                    snapshot_parts.c.run_key == self.run.run_key,
                    snapshot_parts.c.seq == mark.seq,
                    snapshot_parts.c.part == part,
                )
            ).scalar_one_or_none()
            if data is not None:
                yield bytes(data)


class Writing(Reading):
    """Holds the run alone: nobody else appends until the transaction ends.

    Attributes:
        run: as the transaction found it.
        run_after: with what was appended.
        appended: entries, as they are stored.
        time_ns: of all of them, nanoseconds since 1970.
    """

    def __init__(self, connection: sa.Connection, run: RunRow, statements: CallStatements) -> None:
        super().__init__(connection, run)
        self._statements = statements
        self._driver = driver_of(connection)
        self.run_after = run
        self.time_ns = time.time_ns()
        self.appended: list[Entry] = []

    def append(self, entry: Entry) -> None:
        """Store an entry under the next number, in the run's present branch."""
        numbered = self.run_after.numbered(entry)
        self._statements.append(self._driver, self.run.run_key, numbered)
        self.run_after = self.run_after.after(numbered, self.time_ns)
        self.appended.append(numbered)

    def finish(self) -> None:
        """Move the run's newest number; called by ``Journal.writing``."""
        if self.appended:
            self._statements.move(self._driver, self.run_after)


def columns_of(record: Entry | RunRow | SnapshotMark) -> dict[str, object]:
    """Return a record's values by column."""
    return {name: getattr(record, name) for name in _COLUMNS[type(record)]}


_COLUMNS = {
    record: tuple(field.name for field in fields(record))
    for record in (Entry, RunRow, SnapshotMark)
}

_ENTRY = sa.select(*[entries.c[field.name] for field in fields(Entry)], entries.c.checksum)
_OUTLINE = sa.select(*[entries.c[field.name] for field in fields(Outline)])
_SNAPSHOT = sa.select(*[snapshots.c[field.name] for field in fields(SnapshotMark)])

"""Where reports wait that could not be delivered.

The promises, held by both kinds:

- A report is kept under its report_id; putting it again changes nothing.
- The oldest go first when the bound is reached, never the newest.
- ``claim`` hands a report to one taker at a time, for ``LEASE_SECONDS``: a taker that
  dies gives it back by doing nothing. A taker that is slow may see it taken twice, which
  the scheduler's idempotency makes harmless.
- A waiting rewind is the lowest step asked for, until it is settled.

``DiskOutbox`` is one SQLite file that several processes, and several runs, may share.
Every method may block on the disk and is called from one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from knapsack_trainer_client.wire import Parcel

LEASE_SECONDS = 5.0
_FAR_SECONDS = 3600.0
_DEAD_LETTERS = 1000
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE reports (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    report_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    rollouts INTEGER NOT NULL,
    body BLOB NOT NULL,
    orphan_body BLOB NOT NULL,
    size INTEGER NOT NULL,
    due REAL NOT NULL DEFAULT 0,
    UNIQUE (run_id, report_id)
);
CREATE INDEX reports_by_size ON reports (size);
CREATE TABLE dead_letters (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    report_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    step INTEGER NOT NULL,
    rollouts INTEGER NOT NULL,
    body BLOB NOT NULL,
    reason TEXT NOT NULL,
    buried_at REAL NOT NULL
);
CREATE TABLE rewinds (
    run_id TEXT PRIMARY KEY,
    step INTEGER NOT NULL,
    request_id TEXT NOT NULL
);
"""


class OutboxUnusable(Exception):
    """The file cannot be read or written now."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Most that may wait, of all runs in an outbox together."""

    reports: int = 100_000
    bytes: int = 2**30


@dataclass(frozen=True, slots=True)
class WaitingRewind:
    """A rewind that waits to be delivered."""

    step: int
    request_id: str


class Outbox(Protocol):
    """Reports and a rewind of one run, waiting."""

    def put(self, parcel: Parcel) -> int:
        """Keep a report; return how many of the oldest were dropped to hold it."""

    def claim(self, limit: int) -> list[Parcel]:
        """Return up to ``limit`` of the oldest due reports and lease them."""

    def postpone(self, report_ids: Iterable[str], seconds: float) -> None:
        """End the leases; the reports are due again in so many seconds."""

    def make_due(self) -> None:
        """Make every report that is not leased due now, and leased ones when it ends."""

    def remove(self, report_ids: Iterable[str]) -> None:
        """Forget reports that were delivered."""

    def bury(self, report_id: str, reason: str) -> None:
        """Move a report to the dead letters."""

    def drop_after(self, step: int) -> int:
        """Forget reports of later steps; return how many."""

    def put_rewind(self, rewind: WaitingRewind) -> None:
        """Keep a rewind, unless one to an earlier step waits already."""

    def rewind(self) -> WaitingRewind | None:
        """Return the rewind that waits, if any."""

    def remove_rewind(self, request_id: str) -> None:
        """Forget a rewind that was delivered."""

    def count(self) -> int:
        """Return how many reports wait, leased ones among them."""

    def close(self) -> None:
        """Let go of the file; what waits there stays."""


class MemoryOutbox:
    """An outbox that ends with the process."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._limits = limits
        self._clock = clock
        self._parcels: OrderedDict[str, Parcel] = OrderedDict()
        self._due: dict[str, float] = {}
        self._bytes = 0
        self._rewind: WaitingRewind | None = None
        self.dead_letters: OrderedDict[str, str] = OrderedDict()

    def put(self, parcel: Parcel) -> int:
        """Keep a report; return how many of the oldest were dropped to hold it."""
        if parcel.report_id in self._parcels:
            return 0
        self._parcels[parcel.report_id] = parcel
        self._bytes += parcel.size
        dropped = 0
        while len(self._parcels) > 1 and (
            len(self._parcels) > self._limits.reports or self._bytes > self._limits.bytes
        ):
            self.remove([next(iter(self._parcels))])
            dropped += 1
        return dropped

    def claim(self, limit: int) -> list[Parcel]:
        """Return up to ``limit`` of the oldest due reports and lease them."""
        now = self._clock()
        due = [p for p in self._parcels.values() if self._due.get(p.report_id, 0.0) <= now]
        for parcel in due[:limit]:
            self._due[parcel.report_id] = now + LEASE_SECONDS
        return due[:limit]

    def postpone(self, report_ids: Iterable[str], seconds: float) -> None:
        """End the leases; the reports are due again in so many seconds."""
        for report_id in report_ids:
            if report_id in self._parcels:
                self._due[report_id] = self._clock() + seconds if seconds else 0.0

    def make_due(self) -> None:
        """Make every report due at the latest when a lease would end."""
        latest = self._clock() + LEASE_SECONDS
        self._due = {i: due for i, due in self._due.items() if due <= latest}

    def remove(self, report_ids: Iterable[str]) -> None:
        """Forget reports that were delivered."""
        for report_id in report_ids:
            parcel = self._parcels.pop(report_id, None)
            self._due.pop(report_id, None)
            if parcel is not None:
                self._bytes -= parcel.size

    def bury(self, report_id: str, reason: str) -> None:
        """Move a report to the dead letters."""
        if report_id in self._parcels:
            self.remove([report_id])
            self.dead_letters[report_id] = reason
            while len(self.dead_letters) > _DEAD_LETTERS:
                self.dead_letters.popitem(last=False)

    def drop_after(self, step: int) -> int:
        """Forget reports of later steps; return how many."""
        late = [p.report_id for p in self._parcels.values() if p.step > step]
        self.remove(late)
        return len(late)

    def put_rewind(self, rewind: WaitingRewind) -> None:
        """Keep a rewind, unless one to an earlier step waits already."""
        if self._rewind is None or rewind.step < self._rewind.step:
            self._rewind = rewind

    def rewind(self) -> WaitingRewind | None:
        """Return the rewind that waits, if any."""
        return self._rewind

    def remove_rewind(self, request_id: str) -> None:
        """Forget a rewind that was delivered."""
        if self._rewind is not None and self._rewind.request_id == request_id:
            self._rewind = None

    def count(self) -> int:
        """Return how many reports wait, leased ones among them."""
        return len(self._parcels)

    def close(self) -> None:
        """Do nothing; what waits is gone with the process."""


class DiskOutbox:
    """An outbox in a SQLite file; every method may raise ``OutboxUnusable``.

    The file is made when there is something to keep: an absent file is empty.
    """

    def __init__(
        self, path: Path, run_id: str, limits: Limits, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._run_id = run_id
        self._limits = limits
        self._clock = clock
        self._connection: sqlite3.Connection | None = None

    def put(self, parcel: Parcel) -> int:
        """Keep a report; return how many of the oldest were dropped to hold it."""
        with self._transaction() as sql:
            added = sql.execute(
                "INSERT OR IGNORE INTO reports"
                " (report_id, run_id, step, rollouts, body, orphan_body, size)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    parcel.report_id,
                    self._run_id,
                    parcel.step,
                    parcel.rollouts,
                    parcel.body,
                    parcel.orphan_body,
                    parcel.size,
                ),
            )
            return self._trim(sql, added.lastrowid or 0) if added.rowcount else 0

    def claim(self, limit: int) -> list[Parcel]:
        """Return up to ``limit`` of the oldest due reports and lease them."""
        if self._is_absent():
            return []
        with self._transaction() as sql:
            now = self._clock()
            # A due time far ahead was written before the clock was set back.
            rows = sql.execute(
                "SELECT seq, report_id, run_id, step, rollouts, body, orphan_body FROM reports"
                " WHERE run_id = ? AND (due <= ? OR due > ?) ORDER BY seq LIMIT ?",
                (self._run_id, now, now + _FAR_SECONDS, limit),
            ).fetchall()
            sql.executemany(
                "UPDATE reports SET due = ? WHERE seq = ?",
                [(now + LEASE_SECONDS, row[0]) for row in rows],
            )
            return [Parcel(*row[1:]) for row in rows]

    def postpone(self, report_ids: Iterable[str], seconds: float) -> None:
        """End the leases; the reports are due again in so many seconds."""
        if self._is_absent():
            return
        due = self._clock() + seconds if seconds else 0.0
        with self._transaction() as sql:
            sql.executemany(
                "UPDATE reports SET due = ? WHERE run_id = ? AND report_id = ?",
                [(due, self._run_id, report_id) for report_id in report_ids],
            )

    def make_due(self) -> None:
        """Make every report due at the latest when a lease would end."""
        if self._is_absent():
            return
        with self._transaction() as sql:
            sql.execute(
                "UPDATE reports SET due = 0 WHERE run_id = ? AND due > ?",
                (self._run_id, self._clock() + LEASE_SECONDS),
            )

    def remove(self, report_ids: Iterable[str]) -> None:
        """Forget reports that were delivered."""
        if self._is_absent():
            return
        with self._transaction() as sql:
            sql.executemany(
                "DELETE FROM reports WHERE run_id = ? AND report_id = ?",
                [(self._run_id, report_id) for report_id in report_ids],
            )

    def bury(self, report_id: str, reason: str) -> None:
        """Move a report to the dead letters."""
        if self._is_absent():
            return
        with self._transaction() as sql:
            sql.execute(
                "INSERT INTO dead_letters"
                " (report_id, run_id, step, rollouts, body, reason, buried_at)"
                " SELECT report_id, run_id, step, rollouts, body, ?, ? FROM reports"
                " WHERE run_id = ? AND report_id = ?",
                (reason, self._clock(), self._run_id, report_id),
            )
            sql.execute(
                "DELETE FROM reports WHERE run_id = ? AND report_id = ?", (self._run_id, report_id)
            )
            sql.execute(
                "DELETE FROM dead_letters WHERE seq <= (SELECT MAX(seq) FROM dead_letters) - ?",
                (_DEAD_LETTERS,),
            )

    def drop_after(self, step: int) -> int:
        """Forget reports of later steps; return how many."""
        if self._is_absent():
            return 0
        with self._transaction() as sql:
            return sql.execute(
                "DELETE FROM reports WHERE run_id = ? AND step > ?", (self._run_id, step)
            ).rowcount

    def put_rewind(self, rewind: WaitingRewind) -> None:
        """Keep a rewind, unless one to an earlier step waits already."""
        with self._transaction() as sql:
            sql.execute(
                "INSERT INTO rewinds (run_id, step, request_id) VALUES (?, ?, ?)"
                " ON CONFLICT (run_id) DO UPDATE"
                " SET step = excluded.step, request_id = excluded.request_id"
                " WHERE excluded.step < rewinds.step",
                (self._run_id, rewind.step, rewind.request_id),
            )

    def rewind(self) -> WaitingRewind | None:
        """Return the rewind that waits, if any."""
        if self._is_absent():
            return None
        with self._reading() as sql:
            row = sql.execute(
                "SELECT step, request_id FROM rewinds WHERE run_id = ?", (self._run_id,)
            ).fetchone()
        return WaitingRewind(*row) if row else None

    def remove_rewind(self, request_id: str) -> None:
        """Forget a rewind that was delivered."""
        if self._is_absent():
            return
        with self._transaction() as sql:
            sql.execute(
                "DELETE FROM rewinds WHERE run_id = ? AND request_id = ?",
                (self._run_id, request_id),
            )

    def count(self) -> int:
        """Return how many reports wait, leased ones among them."""
        if self._is_absent():
            return 0
        with self._reading() as sql:
            row = sql.execute(
                "SELECT COUNT(*) FROM reports WHERE run_id = ?", (self._run_id,)
            ).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Let go of the file; what waits there stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _is_absent(self) -> bool:
        try:
            return self._connection is None and not self._path.exists()
        except OSError as error:
            raise OutboxUnusable(str(error)) from error

    def _trim(self, sql: sqlite3.Connection, newest: int) -> int:
        """Delete the oldest until the rest is within the limits; return how many."""
        reports, size = sql.execute(
            "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM reports"
        ).fetchone()
        dropped = 0
        while (reports > self._limits.reports or size > self._limits.bytes) and reports > 1:
            seq, one = sql.execute(
                "SELECT seq, size FROM reports WHERE seq <> ? ORDER BY seq LIMIT 1", (newest,)
            ).fetchone()
            sql.execute("DELETE FROM reports WHERE seq = ?", (seq,))
            reports, size, dropped = reports - 1, size - one, dropped + 1
        return dropped

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._open()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise OutboxUnusable(str(error)) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as sql:
            sql.execute("BEGIN IMMEDIATE")
            try:
                yield sql
                sql.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    sql.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self._path, timeout=1.5, isolation_level=None, check_same_thread=False
        )
        try:
            _use_wal(connection)
            # A report is here because it could not be delivered; it must outlive a crash
            # of the machine too.
            connection.execute("PRAGMA synchronous = FULL")
            # Two processes may meet at a new file: the schema is made under the lock.
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            connection.execute("COMMIT")
            if version > _SCHEMA_VERSION:
                raise OutboxUnusable(f"made by a newer version of knapsack-rl ({version})")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    # Switching a new file to WAL does not wait for another process that does the same.
    for _ in range(100):
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            return
        time.sleep(0.02)
    connection.execute("PRAGMA journal_mode = WAL")


def default_path(target: str, run_id: str) -> Path:
    """Return the outbox file of a run at a scheduler, where the caller names none.

    In ``$KNAPSACK_RL_OUTBOX``, else ``$XDG_STATE_HOME/knapsack-rl``, else
    ``~/.local/state/knapsack-rl``.

    Raises:
        RuntimeError: there is no home directory.
    """
    folder = os.environ.get("KNAPSACK_RL_OUTBOX")
    if not folder:
        state = os.environ.get("XDG_STATE_HOME")
        folder = str((Path(state) if state else Path.home() / ".local/state") / "knapsack-rl")
    name = hashlib.blake2b(f"{target}\n{run_id}".encode(), digest_size=12).hexdigest()
    return Path(folder) / f"{name}.outbox"

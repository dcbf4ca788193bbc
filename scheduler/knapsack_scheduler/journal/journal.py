"""Append, tail and look up: the promises of the journal.

- An entry that ``writing`` or ``append`` has committed survives a crash of the process and, on a
  disk that keeps its word, a loss of power.
- Entries of a run are numbered 1, 2, 3 .. in the order in which they became visible:
  whoever has seen number n has seen all before it.
- (kind, key, branch) is unique in a run: no call is recorded twice.
- A block that raises leaves nothing behind.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from alembic.util.exc import CommandError
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from knapsack_scheduler.errors import (
    AlreadyExists,
    ConfigError,
    RunNotFound,
)
from knapsack_scheduler.journal.onewriter import OneWriter
from knapsack_scheduler.journal.presence import Presence
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.schema import entries, runs, snapshot_parts, snapshots
from knapsack_scheduler.journal.statements import RUN, CallStatements, driver_of
from knapsack_scheduler.journal.store import (
    FileLock,
    is_known,
    migrate,
    open_engine,
    reading_engine,
    revisions,
    safe_url,
    sqlite_file,
)
from knapsack_scheduler.journal.storeerrors import StoreErrors, cause_of
from knapsack_scheduler.journal.transaction import Reading, Writing, columns_of


class Journal:
    """The journals of all runs in one database.

    Blocking; call it from worker threads. Thread-safe.

    Args:
        url: of the store.
        read_only: look at a store that a server may hold at the same time.
    """

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        self._url = url
        self._shown = safe_url(url)
        self._engine = open_engine(url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._driver: Any = self._engine.dialect.loaded_dbapi
        self._statements = CallStatements(self._engine.dialect)
        self._reading_engine = reading_engine(url, self._engine)
        self._file = sqlite_file(url) if self._sqlite else None
        # SQLite follows links too: its log is beside the file itself.
        self._true_file = self._file.resolve() if self._file else None
        self._file_lock = FileLock(self._true_file) if self._true_file and not read_only else None
        self._read_only = read_only
        self._errors = StoreErrors(self._driver, passing=not self._sqlite)
        self._presence: Presence | None = None
        self._writer = OneWriter(self._engine) if self._sqlite else None

    @property
    def shared(self) -> bool:
        """Whether other processes may append to the runs too."""
        return not self._sqlite

    def open(self) -> None:
        """Lock a SQLite file and bring the schema up to date.

        A journal that only reads does neither: it refuses a schema that is not the newest.

        Raises:
            ConfigError: the store cannot be opened; says why.
        """
        if self._file and self._read_only and not self._file.is_file():
            raise ConfigError(f"store = {self._shown!r}: there is no file {self._file}")
        if self._file and not self._file.parent.is_dir():
            raise ConfigError(
                f"store = {self._shown!r}: there is no folder {self._file.parent}; make it first"
            )
        if self._file_lock:
            self._file_lock.acquire()
        try:
            if self._read_only:
                current, newest = revisions(self._reading_engine or self._engine)
            else:
                current, newest = revisions(self._engine)
            if is_known(current) and not self._read_only:
                migrate(self._engine)
                current, newest = revisions(self._engine)
                # A database that can only be read is found out now, not by a trainer.
                with self._engine.begin() as connection:
                    connection.execute(sa.update(runs).where(sa.false()).values(last_seq=0))
                self._presence = Presence(self._true_file) if self._true_file else None
        except (
            *(SQLAlchemyError, self._driver.Error, OSError, CommandError),
            UnicodeDecodeError,
        ) as error:
            self.close()
            raise ConfigError(
                f"store = {self._shown!r}: cannot be opened: {cause_of(error)}"
            ) from error
        if not is_known(current):
            self.close()
            raise ConfigError(
                f"store = {self._shown!r}: schema revision {current} is of a newer version of this "
                f"program, which knows up to {newest}; nothing was changed: install the newer "
                "version again, or put back the copy from before the upgrade"
            )
        if current != newest:
            self.close()
            raise ConfigError(
                f"store = {self._shown!r}: schema revision {current}, this program needs "
                f"{newest}; run knapsack-scheduler migrate"
            )

    def close(self) -> None:
        """Close every connection and release the file; not while somebody writes.

        Then both are left to the end of the process: SQLite's driver does not outlive a
        connection that is closed under it.
        """
        nobody_writes = self._writer is None or self._writer.close()
        if self._reading_engine is not None:
            self._reading_engine.dispose()
        if not nobody_writes:
            return
        self._engine.dispose()
        if self._file_lock:
            self._file_lock.release()

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Yield a connection whose changes are committed when the block ends.

        Raises:
            StoreUnavailable: nothing was stored, or it is not known whether it was.
        """
        with self._errors, self._begun() as connection:
            yield connection
        self._look_for_files()

    def _begun(self) -> AbstractContextManager[sa.Connection]:
        return self._writer or self._engine.begin()

    def _look_for_files(self) -> None:
        """After a commit and not before: what is answered is in a file that is found again."""
        if self._presence is not None:
            self._presence.check()

    @contextmanager
    def _view(self) -> Iterator[sa.Connection]:
        """Yield a connection that sees one moment and changes nothing."""
        if self._reading_engine is None:
            with self.transaction() as connection:
                yield connection
            return
        with self._errors, self._reading_engine.begin() as connection:
            yield connection

    @contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Yield whether this is the only process that has claimed the number.

        The claim ends with the block, and with the process.
        """
        if self._sqlite:
            yield True
            return
        with self._errors, self._engine.connect() as connection:
            mine = connection.execute(sa.select(sa.func.pg_try_advisory_lock(number))).scalar_one()
            connection.commit()
            try:
                yield bool(mine)
            finally:
                if mine:
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(number)))
                    connection.commit()

    def ping(self) -> None:
        """Raise StoreUnavailable if the database does not answer."""
        with self.transaction() as connection:
            connection.execute(sa.select(sa.literal(1)))

    def integrity(self) -> list[str]:
        """Return what the database itself finds wrong with its file; empty if nothing."""
        if not self._sqlite:
            return []
        with self._view() as connection:
            lines = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
            found = [line for line in lines if line != "ok"]
            if not found:
                astray = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                found = [f"row {row} of {table} is of no run" for table, row, *_ in astray]
        return found

    def create_run(self, run_id: str, config: bytes, create_time: int) -> RunRow:
        """Store a new run; AlreadyExists if one of that name is there."""
        run = RunRow(
            0,
            run_id,
            config,
            create_time,
            identity=secrets.randbits(62),
            update_time=create_time,
        )
        try:
            with self.transaction() as connection:
                return insert_run(connection, run)
        except IntegrityError:
            raise AlreadyExists(f"run {run_id!r} exists") from None

    def find_run(self, run_id: str) -> RunRow | None:
        """Return the run of that name, or None."""
        with self._view() as connection:
            return self._statements.find(driver_of(connection), run_id)

    def list_runs(self, after: str, count: int) -> list[RunRow]:
        """Return up to ``count`` runs whose names sort after ``after``, in their order."""
        # Sorted here: databases differ in how they order text.
        with self._view() as connection:
            rows = connection.execute(RUN).all()
        found = sorted((RunRow(*row) for row in rows), key=lambda run: run.run_id)
        return [run for run in found if run.run_id > after][:count]

    def delete_run(self, run_id: str, *, only_new: int | None = None) -> None:
        """Remove a run and all that is stored of it; RunNotFound if there is none.

        Args:
            run_id: of the run.
            only_new: do nothing unless the run has this identity and no entry.
        """
        with self.transaction() as connection:
            run = self._statements.hold(driver_of(connection), run_id)
            if run is None:
                raise RunNotFound(f"run {run_id!r} does not exist")
            if only_new is not None and (run.identity != only_new or run.last_seq):
                return
            for table in (snapshot_parts, snapshots, entries, runs):
                connection.execute(sa.delete(table).where(table.c.run_key == run.run_key))

    @contextmanager
    def writing(self, run_id: str) -> Iterator[Writing]:
        """Hold the run alone, read what is new, append; committed when the block ends.

        Raises:
            RunNotFound: no run of that name.
            StoreUnavailable: nothing was stored.
        """
        with self._errors, self._begun() as connection:
            run = self._statements.hold(driver_of(connection), run_id)
            if run is None:
                raise RunNotFound(f"run {run_id!r} does not exist")
            writing = Writing(connection, run, self._statements)
            yield writing
            writing.finish()
        self._look_for_files()

    def append(self, run: RunRow, entry: Entry, now: int) -> Entry | None:
        """Append an entry to a run that is still as it was read; committed on return.

        As ``writing`` does, in fewer statements: a small call takes little else besides its
        commit. Not for rewinds.

        Args:
            run: as it was read.
            entry: to be numbered.
            now: nanoseconds since 1970.

        Returns:
            The entry as it is stored; None, and nothing is, if the run is not as it was.

        Raises:
            StoreUnavailable: nothing was stored, or it is not known whether it was.
            IntegrityError: of the driver; a call of its kind and key is there.
        """
        assert entry.kind != "rewind"
        numbered = run.numbered(entry)
        with self._errors, self._begun() as connection:
            driver = self._writer.driver if self._writer else driver_of(connection)
            is_as_read = self._statements.move_on(driver, run, now)
            if is_as_read:
                self._statements.append(driver, run.run_key, numbered)
        self._look_for_files()
        return numbered if is_as_read else None

    @contextmanager
    def reading(self, run_id: str) -> Iterator[Reading]:
        """Look at a run as of one moment without holding it.

        Raises:
            RunNotFound: no run of that name.
        """
        with self._view() as connection:
            run = self._statements.find(driver_of(connection), run_id)
            if run is None:
                raise RunNotFound(f"run {run_id!r} does not exist")
            yield Reading(connection, run)


def insert_run(connection: sa.Connection, run: RunRow) -> RunRow:
    """Store a run's row and return it with its key."""
    values = columns_of(run) | {"checksum": run.checksum}
    del values["run_key"]
    result = connection.execute(sa.insert(runs).values(values))
    (key,) = result.inserted_primary_key or (0,)
    return replace(run, run_key=int(key))

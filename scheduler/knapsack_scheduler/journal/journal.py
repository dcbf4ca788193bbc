"""Append, tail and look up: the promises of the journal.

- An entry that ``writing`` has committed survives a crash of the process and, on a disk
  that keeps its word, a loss of power.
- Entries of a run are numbered 1, 2, 3 .. in the order in which they became visible:
  whoever has seen number n has seen all before it.
- (kind, key, branch) is unique in a run: no call is recorded twice.
- A block that raises leaves nothing behind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace

import sqlalchemy as sa
from alembic.util.exc import CommandError
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from knapsack_scheduler.errors import AlreadyExists, ConfigError, NotFound, StoreUnavailable
from knapsack_scheduler.journal.schema import entries, runs
from knapsack_scheduler.journal.store import FileLock, migrate, open_engine, revisions, sqlite_file


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as stored.

    Attributes:
        run_key: tells it from a later run of the same name.
        run_id: its name.
        config: serialised RunConfig.
        create_time: nanoseconds since 1970.
        last_seq: number of its newest entry; 0 if it has none.
        branch: rewinds so far.
    """

    run_key: int
    run_id: str
    config: bytes
    create_time: int
    last_seq: int
    branch: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One call as recorded.

    Attributes:
        seq: its number in the run; 0 before it is appended.
        kind: what was called: allocate, extend, report, import or rewind.
        key: the call's request or report id.
        branch: rewinds of the run before it.
        step: the trainer's step it belongs to.
        digest: hash of the request, to tell a repetition from another call.
        payload: serialised request.
        answer: serialised answer.
    """

    seq: int
    kind: str
    key: str
    branch: int
    step: int
    digest: bytes
    payload: bytes
    answer: bytes


class Journal:
    """The journals of all runs in one database.

    Blocking; call it from worker threads. Thread-safe.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = open_engine(url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        file = sqlite_file(url) if self._sqlite else None
        self._file_lock = FileLock(file) if file else None
        # SQLite has one writer; waiting here is fairer than its busy handler.
        self._one: AbstractContextManager[object] = (
            threading.Lock() if self._sqlite else nullcontext()
        )

    def open(self, *, upgrade: bool = True) -> None:
        """Lock a SQLite file and bring the schema up to date.

        Args:
            upgrade: False refuses a schema that is not the newest instead.

        Raises:
            ConfigError: the store cannot be opened; says why.
        """
        file = sqlite_file(self._url) if self._sqlite else None
        if file and not upgrade and not file.is_file():
            raise ConfigError(f"store = {self._url!r}: there is no file {file}")
        if file and not file.parent.is_dir():
            raise ConfigError(
                f"store = {self._url!r}: there is no folder {file.parent}; make it first"
            )
        if self._file_lock:
            self._file_lock.acquire()
        try:
            with self._one:
                if upgrade:
                    migrate(self._engine)
                current, newest = revisions(self._engine)
        except (SQLAlchemyError, OSError, CommandError) as error:
            self.close()
            raise ConfigError(
                f"store = {self._url!r}: cannot be opened: {_cause(error)}"
            ) from error
        if current != newest:
            self.close()
            raise ConfigError(
                f"store = {self._url!r}: schema revision {current}, this program needs {newest}; "
                "run knapsack-scheduler migrate"
            )

    def close(self) -> None:
        """Close every connection and release the file."""
        self._engine.dispose()
        if self._file_lock:
            self._file_lock.release()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._one, self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"the store cannot be used: {_cause(error)}") from error

    def ping(self) -> None:
        """Raise StoreUnavailable if the database does not answer."""
        with self._transaction() as connection:
            connection.execute(sa.select(sa.literal(1)))

    def integrity(self) -> list[str]:
        """Return what the database itself finds wrong with its file; empty if nothing."""
        if not self._sqlite:
            return []
        with self._transaction() as connection:
            lines = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        return [line for line in lines if line != "ok"]

    def create_run(self, run_id: str, config: bytes, create_time: int) -> RunRow:
        """Store a new run; AlreadyExists if one of that name is there."""
        try:
            with self._transaction() as connection:
                result = connection.execute(
                    sa.insert(runs).values(
                        run_id=run_id,
                        config=config,
                        create_time=create_time,
                        last_seq=0,
                        branch=0,
                    )
                )
                (key,) = result.inserted_primary_key or (0,)
        except IntegrityError:
            raise AlreadyExists(f"run {run_id!r} exists") from None
        return RunRow(int(key), run_id, config, create_time, 0, 0)

    def find_run(self, run_id: str) -> RunRow | None:
        """Return the run of that name, or None."""
        with self._transaction() as connection:
            row = connection.execute(_RUN.where(runs.c.run_id == run_id)).first()
        return RunRow(*row) if row else None

    def list_runs(self, after: str, count: int) -> list[RunRow]:
        """Return up to ``count`` runs whose names sort after ``after``, in their order."""
        # Sorted here: databases differ in how they order text.
        with self._transaction() as connection:
            rows = connection.execute(_RUN).all()
        found = sorted((RunRow(*row) for row in rows), key=lambda run: run.run_id)
        return [run for run in found if run.run_id > after][:count]

    def delete_run(self, run_id: str) -> None:
        """Remove a run and its entries; NotFound if there is none."""
        with self._transaction() as connection:
            row = connection.execute(_RUN.where(runs.c.run_id == run_id).with_for_update()).first()
            if row is None:
                raise NotFound(f"run {run_id!r} does not exist")
            key = RunRow(*row).run_key
            connection.execute(sa.delete(entries).where(entries.c.run_key == key))
            connection.execute(sa.delete(runs).where(runs.c.run_key == key))

    @contextmanager
    def writing(self, run_id: str) -> Iterator[Writing]:
        """Hold the run alone, read what is new, append; committed when the block ends.

        Raises:
            NotFound: no run of that name.
            StoreUnavailable: nothing was stored.
        """
        with self._transaction() as connection:
            row = connection.execute(_RUN.where(runs.c.run_id == run_id).with_for_update()).first()
            if row is None:
                raise NotFound(f"run {run_id!r} does not exist")
            writing = Writing(connection, RunRow(*row))
            yield writing
            writing.finish()


class Writing:
    """One transaction on one run."""

    def __init__(self, connection: sa.Connection, run: RunRow) -> None:
        self._connection = connection
        self.run = run
        self.run_after = run
        self.appended: list[Entry] = []

    def tail(self, after: int) -> Iterator[Entry]:
        """Yield the entries with a number above ``after``, in order."""
        query = _ENTRY.where(entries.c.run_key == self.run.run_key, entries.c.seq > after)
        for row in self._connection.execute(query.order_by(entries.c.seq)):
            yield Entry(*row)

    def entry(self, seq: int) -> Entry:
        """Return the entry of that number."""
        query = _ENTRY.where(entries.c.run_key == self.run.run_key, entries.c.seq == seq)
        return Entry(*self._connection.execute(query).one())

    def outline(self) -> list[tuple[int, str, int]]:
        """Return (number, kind, step) of every entry, in order."""
        query = sa.select(entries.c.seq, entries.c.kind, entries.c.step)
        query = query.where(entries.c.run_key == self.run.run_key).order_by(entries.c.seq)
        return [(row.seq, row.kind, row.step) for row in self._connection.execute(query)]

    def append(self, entry: Entry) -> None:
        """Store an entry under the next number, in the run's present branch.

        A rewind begins the next branch, in which ids may be used again.
        """
        run = self.run_after
        numbered = replace(entry, seq=run.last_seq + 1, branch=run.branch)
        self._connection.execute(
            sa.insert(entries).values(run_key=run.run_key, **_columns(numbered))
        )
        rewound = int(entry.kind == "rewind")
        self.run_after = replace(run, last_seq=numbered.seq, branch=run.branch + rewound)
        self.appended.append(numbered)

    def finish(self) -> None:
        """Move the run's newest number; called by ``Journal.writing``."""
        if self.appended:
            self._connection.execute(
                sa.update(runs)
                .where(runs.c.run_key == self.run.run_key)
                .values(last_seq=self.run_after.last_seq, branch=self.run_after.branch)
            )


def _columns(entry: Entry) -> dict[str, object]:
    return {field.name: getattr(entry, field.name) for field in fields(entry)}


_RUN = sa.select(
    runs.c.run_key, runs.c.run_id, runs.c.config, runs.c.create_time, runs.c.last_seq, runs.c.branch
)
_ENTRY = sa.select(
    entries.c.seq,
    entries.c.kind,
    entries.c.key,
    entries.c.branch,
    entries.c.step,
    entries.c.digest,
    entries.c.payload,
    entries.c.answer,
)


def _cause(error: BaseException) -> str:
    inner = getattr(error, "orig", None) or error
    return str(inner).splitlines()[0]

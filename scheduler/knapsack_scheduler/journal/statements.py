"""The statements of every call, in the words of the database's driver.

SQLAlchemy looks a statement up, binds its values and wraps its result on every execution: for
one small row that takes several times as long as the database does. So these are put into
words once and given to the driver itself, inside a transaction of SQLAlchemy's. What goes
wrong with them is raised as the driver's own errors.
"""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.schema import entries, runs

RUN = sa.select(*[runs.c[field.name] for field in fields(RunRow)])
RUN_OF_NAME = RUN.where(runs.c.run_id == sa.bindparam("name"))
RUN_HELD = RUN_OF_NAME.with_for_update()
_ENTRY_COLUMNS = tuple(field.name for field in fields(Entry))
_MOVED = ("last_seq", "branch", "closed_step", "update_time")
_STANDS_AT = (
    *("run_key", "identity", "last_seq", "branch"),
    *("snapshot_seq", "floor_seq", "floor_step", "closed_step"),
)
_entry_values = attrgetter(*_ENTRY_COLUMNS)
_moved_values = attrgetter(*_MOVED)
_values_stood_at = attrgetter(*_STANDS_AT)


def driver_of(connection: sa.Connection) -> Any:
    """Return the driver's own connection, which SQLAlchemy takes several steps to find."""
    return connection.connection.driver_connection


class _Worded:
    """A statement as one driver takes it.

    Args:
        statement: with parameters.
        dialect: of the database.
        names: of the parameters, in the order in which ``run`` is given their values.
    """

    def __init__(self, statement: sa.ClauseElement, dialect: sa.Dialect, *names: str) -> None:
        compiled = statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._names = names
        # None where the driver takes values by name.
        order: list[str] | None = getattr(compiled, "positiontup", None)
        self._places = None if order is None else [names.index(name) for name in order]

    def run(self, driver: Any, *values: Any) -> Any:
        """Execute it on the driver's connection; returns its cursor."""
        if self._places is None:
            return driver.execute(self._text, dict(zip(self._names, values, strict=True)))
        return driver.execute(self._text, [values[place] for place in self._places])


class CallStatements:
    """What a call does to its run's rows, in the words of one database.

    All is done on the driver's own connection, inside of a transaction.

    Args:
        dialect: of the engine that the connections are of.
    """

    def __init__(self, dialect: sa.Dialect) -> None:
        self._find = _Worded(RUN_OF_NAME, dialect, "name")
        self._hold = _Worded(RUN_HELD, dialect, "name")
        self._insert = _Worded(sa.insert(entries), dialect, "run_key", "checksum", *_ENTRY_COLUMNS)
        self._move = _Worded(
            sa.update(runs)
            .where(runs.c.run_key == sa.bindparam("of_run"))
            .values({name: sa.bindparam(name) for name in _MOVED}),
            dialect,
            *("of_run", *_MOVED),
        )
        self._move_on = _Worded(
            sa.update(runs)
            .where(*[runs.c[name] == sa.bindparam(f"was_{name}") for name in _STANDS_AT])
            .values(last_seq=sa.bindparam("to_seq"), update_time=sa.bindparam("to_time")),
            dialect,
            *("to_seq", "to_time", *[f"was_{name}" for name in _STANDS_AT]),
        )

    def find(self, driver: Any, run_id: str) -> RunRow | None:
        """Return the run of that name, or None."""
        return _run(self._find.run(driver, run_id))

    def hold(self, driver: Any, run_id: str) -> RunRow | None:
        """Return the run of that name, held alone until the transaction ends, or None."""
        return _run(self._hold.run(driver, run_id))

    def append(self, driver: Any, run_key: int, entry: Entry) -> None:
        """Store an entry of a run."""
        self._insert.run(driver, run_key, entry.checksum, *_entry_values(entry))

    def move(self, driver: Any, run: RunRow) -> None:
        """Store what an entry has changed of its run."""
        self._move.run(driver, run.run_key, *_moved_values(run))

    def move_on(self, driver: Any, run: RunRow, now: int) -> bool:
        """Store that a run has one more entry; false, and nothing, if it is not as given."""
        to = run.last_seq + 1, max(now, run.update_time)
        return bool(self._move_on.run(driver, *to, *_values_stood_at(run)).rowcount == 1)


def _run(cursor: Any) -> RunRow | None:
    row = cursor.fetchone()
    return RunRow(*row) if row else None

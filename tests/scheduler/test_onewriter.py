"""The one writer of a SQLite file: what is said to be committed is, and nothing stays open."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.journal.onewriter import OneWriter
from knapsack_scheduler.journal.statements import driver_of
from knapsack_scheduler.journal.store import open_engine

HOW = pytest.mark.parametrize("by_driver", [True, False], ids=["driver", "sqlalchemy"])


@pytest.fixture
def one() -> Iterator[OneWriter]:
    """A writer of a store of two tables, of which one refers to the other at the commit."""
    engine = open_engine("sqlite://")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE named (name INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(
            "CREATE TABLE used (name REFERENCES named DEFERRABLE INITIALLY DEFERRED)"
        )
    writer = OneWriter(engine, 0.01)
    yield writer
    writer.close()
    engine.dispose()


def insert(connection: sa.Connection, table: str, by_driver: bool) -> None:
    """Insert a row by the driver's own connection or by SQLAlchemy's."""
    statement = f"INSERT INTO {table} VALUES (1)"
    if by_driver:
        driver_of(connection).execute(statement)
    else:
        connection.execute(sa.text(statement))


def count(one: OneWriter, table: str) -> int:
    """Return how many rows there are, as the next writer finds it."""
    with OneWriter(one._engine, 0.01) as connection:
        rows: int = connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
    return rows


@HOW
def test_a_commit_that_fails_leaves_no_transaction_open(one: OneWriter, by_driver: bool) -> None:
    """The next writer begins, and finds nothing of it."""
    refused = sqlite3.IntegrityError if by_driver else sa.exc.IntegrityError
    with pytest.raises(refused), one as connection:
        insert(connection, "used", by_driver)
    assert count(one, "used") == 0


@HOW
def test_a_transaction_that_was_undone_is_not_said_to_be_committed(
    one: OneWriter, by_driver: bool
) -> None:
    """SQLite undoes one by itself on a disk that is full, say, and commits none without a word."""

    def undone(connection: sa.Connection) -> None:
        insert(connection, "named", by_driver)
        driver_of(connection).execute("ROLLBACK")

    with pytest.raises(StoreUnavailable, match="undone"), one as connection:
        undone(connection)
    assert count(one, "named") == 0


@HOW
def test_who_writes_while_it_is_closed_is_refused(one: OneWriter, by_driver: bool) -> None:
    """Nothing is stored of it, neither what came before nor what comes after."""

    def closed(connection: sa.Connection) -> None:
        insert(connection, "named", by_driver)
        one.close()
        connection.exec_driver_sql("INSERT INTO named VALUES (2)")
        one.driver.execute("INSERT INTO named VALUES (3)")

    with pytest.raises(StoreUnavailable, match="undone"), one as connection:
        closed(connection)
    assert count(one, "named") == 0


def test_nobody_begins_after_it_is_closed(one: OneWriter) -> None:
    """Another connection would be left open."""
    one.close()
    with pytest.raises(StoreUnavailable, match=r"is closed$"), one:
        pass
    assert count(one, "named") == 0

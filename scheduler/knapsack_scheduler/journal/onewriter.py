"""The one connection that writes to a SQLite file, for one thread at a time.

SQLAlchemy's own transactions take longer to begin and to end than SQLite takes for a row. So
the driver does both. Statements of SQLAlchemy's find themselves in the transaction that is
open (see ``store.py``), and theirs ends with it.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.journal.statements import driver_of


class OneWriter:
    """A transaction as a context: committed when its block ends, undone if that raises.

    As long as the disk is slow, others are refused. That is fairer than SQLite's busy handler,
    which lets those who came last go first.

    Args:
        engine: of the file.
        patience: longest wait for those who write before, s.

    Attributes:
        driver: the driver's own connection, inside of a block.
    """

    def __init__(self, engine: sa.Engine, patience: float = 10.0) -> None:
        self._engine = engine
        self._patience = patience
        self._lock = threading.Lock()
        self._connection: sa.Connection | None = None
        self._closed = False
        self.driver: Any = None

    def __enter__(self) -> sa.Connection:
        """Begin; StoreUnavailable if the writers before take too long."""
        if not self._lock.acquire(timeout=self._patience):
            raise StoreUnavailable(
                f"the store cannot be used: those who write before took {self._patience:g} s"
            )
        try:
            if self._closed:
                raise StoreUnavailable("the store cannot be used: it is closed")
            # SQLAlchemy's own part of the one connection there is takes time to make.
            if self._connection is None:
                self._connection = self._engine.connect()
                self.driver = driver_of(self._connection)
            self.driver.execute("BEGIN IMMEDIATE")
            return self._connection
        except BaseException:
            try:
                self._give_back()
            finally:
                self._lock.release()
            raise

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Commit, or undo, and let the next one write."""
        try:
            if error is not None:
                self._give_back()
            else:
                self._commit()
        except BaseException:
            # A commit that failed may leave its transaction open.
            self._give_back()
            raise
        finally:
            self._lock.release()

    def _commit(self) -> None:
        connection = self._connection
        # SQLite undoes a transaction by itself after some errors. To commit none does not fail.
        if connection is None or not self.driver.in_transaction:
            raise StoreUnavailable("the store cannot be used: the transaction was undone")
        if self._closed:
            raise StoreUnavailable("the store cannot be used: it is closed, the transaction undone")
        if connection.in_transaction():
            connection.commit()
        else:
            self.driver.commit()

    def _give_back(self) -> None:
        """Give the connection back, by which what it has open is undone."""
        given_back, self._connection, self.driver = self._connection, None, None
        if given_back is not None:
            with given_back:
                # SQLAlchemy takes its own transaction for ended where the commit of it failed,
                # and would leave the driver's open.
                given_back.rollback()

    def close(self) -> bool:
        """Give the connection back, and begin no more; returns whether nobody writes any longer.

        Who does is refused at the end, and undoes it: undone here, what they do next would be
        stored by itself, statement by statement.
        """
        self._closed = True
        if not self._lock.acquire(timeout=self._patience):
            return False
        try:
            self._give_back()
        finally:
            self._lock.release()
        return True

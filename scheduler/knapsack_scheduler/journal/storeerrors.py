"""What goes wrong with a database, as the errors of this project."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from knapsack_scheduler.errors import StoreInterrupted, StoreUnavailable

# Of PostgreSQL: connection lost (08), transaction rolled back for another's sake (40),
# and a server that stops, starts or is cut off (57P).
_PASSING_CLASSES = ("08", "40")
_PASSING_STATES = ("57P01", "57P02", "57P03", "25P03")


class StoreErrors:
    """A context in which errors of a database are raised as StoreUnavailable or StoreInterrupted.

    Rows that cannot be because others are there raise IntegrityError as they are. It keeps
    nothing, so any number of threads may be in it.

    Args:
        driver: the database's module.
        passing: whether a transaction may be cut off by what passes.
    """

    def __init__(self, driver: Any, *, passing: bool) -> None:
        self._driver = driver
        self._conflicts = (IntegrityError, driver.IntegrityError)
        # SQLite's driver cannot read some of its words on a page that makes no sense.
        self._errors = (SQLAlchemyError, driver.Error, UnicodeDecodeError)
        self._passes = passing

    def __enter__(self) -> None:
        """Begin nothing."""

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Raise what an error of the database means; let others pass."""
        if isinstance(error, self._errors) and not isinstance(error, self._conflicts):
            kind = StoreInterrupted if self._passing(error) else StoreUnavailable
            raise kind(f"the store cannot be used: {cause_of(error)}") from error

    def _passing(self, error: BaseException) -> bool:
        """Return whether the same transaction may well work if begun anew."""
        of_driver = error.orig if isinstance(error, DBAPIError) else error
        if not (self._passes and isinstance(of_driver, self._driver.Error)):
            return False
        state = getattr(of_driver, "sqlstate", None) or ""
        # Without a state the connection was lost, or could not be made.
        lost = getattr(error, "connection_invalidated", False) or not state
        return lost or state[:2] in _PASSING_CLASSES or state in _PASSING_STATES


def cause_of(error: BaseException) -> str:
    """Return what the database itself said, in one line."""
    inner = getattr(error, "orig", None) or error
    return str(inner).splitlines()[0]

"""Notices that the files of a SQLite store were deleted or replaced while they are open.

SQLite goes on with the files it has opened: what it commits to a deleted one is gone with
the process, and nothing says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from knapsack_scheduler.errors import StoreUnavailable


class Presence:
    """Knows the files by what the system calls them, not by their names.

    Args:
        file: of the store, open and in WAL mode, so that the log beside it is there too.
    """

    def __init__(self, file: Path) -> None:
        self._known = [(path, _of(path)) for path in (str(file), f"{file}-wal")]

    def check(self) -> None:
        """Raise StoreUnavailable if another file, or none, is where one was opened."""
        for path, known in self._known:
            if _of(path) != known:
                raise StoreUnavailable(
                    f"the store cannot be used: {path} was deleted or replaced while in use; "
                    "nothing more is recorded until the scheduler is started again"
                )


def _of(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino

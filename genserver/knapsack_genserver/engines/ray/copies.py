"""Copies of weights on a node's disk, which last no longer than the process that made them.

A folder is locked while its process lives, so that whoever comes after a killed one can
tell its folders from those in use, also across containers that share the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "knapsack-weights-"


class Copy:
    """A new folder among the temporary ones of this node."""

    def __init__(self) -> None:
        # It has its name only once it is locked; before, nobody takes it for an old one.
        made = Path(tempfile.mkdtemp(prefix="knapsack-new-"))
        self._lock = os.open(made, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = made.rename(made.with_name(made.name.replace("knapsack-new-", _PREFIX)))

    def remove(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove folders whose processes were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)

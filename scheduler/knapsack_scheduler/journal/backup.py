"""A copy of a SQLite store, made while a scheduler goes on writing to it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.journal.store import safe_url, sqlite_file


def back_up(url: str, to: Path) -> int:
    """Copy the store as it is at one moment to a new file; returns the file's bytes.

    The copy is checked and on disk before it gets its name. Whoever writes to the store
    does not wait for it.

    Raises:
        ConfigError: the store is no SQLite file, or cannot be read; the new file exists
            already, or cannot be written. No file is left then.
    """
    file = sqlite_file(url)
    if file is None:
        raise ConfigError(
            f"store = {safe_url(url)!r}: not a SQLite file; back up PostgreSQL with pg_dump"
        )
    if not file.is_file():
        raise ConfigError(f"store = {safe_url(url)!r}: there is no file {file}")
    if to.exists():
        raise ConfigError(f"to = {str(to)!r}: exists already")
    partial = to.with_name(to.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as source,
            closing(sqlite3.connect(partial)) as copy,
        ):
            # In one step, which reads one moment; in several, every commit of the
            # scheduler would make it begin anew.
            source.backup(copy, pages=-1)
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                raise ConfigError(f"store = {safe_url(url)!r}: is damaged: {found}")
        _sync(partial)
        os.rename(partial, to)
        _sync(to.parent)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(
            f"store = {safe_url(url)!r}: cannot be copied to {str(to)!r}: {error}"
        ) from error
    finally:
        for left in (partial, *(to.with_name(f"{partial.name}{end}") for end in _BESIDE)):
            with suppress(OSError):
                left.unlink(missing_ok=True)
    return to.stat().st_size


_BESIDE = ("-wal", "-shm", "-journal")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

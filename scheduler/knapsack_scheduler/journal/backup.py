"""A copy of a SQLite store, made while a scheduler goes on writing to it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.journal.store import readable_uri, safe_url, sqlite_file

BESIDE = ("-wal", "-shm", "-journal")
"""Ends of the names of what SQLite keeps beside a file."""


def back_up(url: str, to: Path) -> int:
    """Copy the store as it is at one moment to a new file; returns the file's bytes.

    The copy is checked and on disk before it gets its name. Whoever writes to the store
    does not wait for it.

    Raises:
        ConfigError: the store is no SQLite file, or cannot be read; the new file exists
            already, or cannot be written. No file is left then.
    """
    file = file_of(url, "back up PostgreSQL with pg_dump")
    if not file.is_file():
        raise ConfigError(f"store = {safe_url(url)!r}: there is no file {file}")
    if to.exists():
        raise ConfigError(f"to = {str(to)!r}: exists already")
    with copied(file, to, f"store = {safe_url(url)!r}") as partial:
        os.rename(partial, to)
        sync(to.parent)
    return to.stat().st_size


def file_of(url: str, otherwise: str) -> Path:
    """Return the file of a SQLite store; ConfigError, with what to do otherwise, for another."""
    file = sqlite_file(url)
    if file is None:
        raise ConfigError(f"store = {safe_url(url)!r}: not a SQLite file; {otherwise}")
    return file


@contextmanager
def copied(file: Path, to: Path, shown: str) -> Iterator[Path]:
    """Yield a checked copy of a database on disk beside ``to``, of one moment of it."""
    partial = to.with_name(to.name + ".partial")
    beside = [partial, *(to.with_name(f"{partial.name}{end}") for end in BESIDE)]
    try:
        for left in beside:
            left.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(readable_uri(file), uri=True)) as source,
            closing(sqlite3.connect(partial)) as copy,
        ):
            # In one step, which reads one moment; in several, every commit of the
            # scheduler would make it begin anew.
            source.backup(copy, pages=-1)
            found = copy.execute("PRAGMA integrity_check").fetchone()[0]
            if found != "ok":
                raise ConfigError(f"{shown}: is damaged: {found}")
        sync(partial)
        yield partial
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{shown}: cannot be copied to {str(to)!r}: {error}") from error
    finally:
        for left in beside:
            with suppress(OSError):
                left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

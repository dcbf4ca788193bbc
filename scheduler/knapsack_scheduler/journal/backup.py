"""A copy of a SQLite store, made while a scheduler goes on writing to it, and put back."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.journal.store import FileLock, readable_uri, safe_url, sqlite_file


def back_up(url: str, to: Path) -> int:
    """Copy the store as it is at one moment to a new file; returns the file's bytes.

    The copy is checked and on disk before it gets its name. Whoever writes to the store
    does not wait for it.

    Raises:
        ConfigError: the store is no SQLite file, or cannot be read; the new file exists
            already, or cannot be written. No file is left then.
    """
    file = _file_of(url, "back up PostgreSQL with pg_dump")
    if not file.is_file():
        raise ConfigError(f"store = {safe_url(url)!r}: there is no file {file}")
    if to.exists():
        raise ConfigError(f"to = {str(to)!r}: exists already")
    with _copied(file, to, f"store = {safe_url(url)!r}") as partial:
        os.rename(partial, to)
        _sync(to.parent)
    return to.stat().st_size


def restore(url: str, backup: Path) -> Path | None:
    """Put a checked copy of a backup in the place of a store that no scheduler uses.

    What SQLite keeps beside the file goes with it: a log left by a crash would be played
    back into the backup, of which it knows nothing.

    Returns:
        Where the replaced file is, with its log beside it; None if there was none.

    Raises:
        ConfigError: the store is no SQLite file or in use; the backup is damaged or cannot be
            read; there is a replaced file from before. Nothing is changed then.
    """
    file = _file_of(url, "restore PostgreSQL with pg_restore").resolve()
    old = file.with_name(f"{file.name}.replaced")
    if not backup.is_file():
        raise ConfigError(f"from = {str(backup)!r}: there is no such file")
    if old.exists():
        raise ConfigError(f"store = {safe_url(url)!r}: {old} is there from before; move it away")
    lock = FileLock(file)
    lock.acquire()
    try:
        with _copied(backup, file, f"from = {str(backup)!r}") as partial:
            # The log first: without it the old file is old, with another's it would be broken.
            for end in ("-wal", ""):
                with suppress(FileNotFoundError):
                    os.rename(f"{file}{end}", f"{old}{end}")
            for end in ("-shm", "-journal"):
                Path(f"{file}{end}").unlink(missing_ok=True)
            os.rename(partial, file)
            _sync(file.parent)
    finally:
        lock.release()
    return old if old.exists() else None


def _file_of(url: str, otherwise: str) -> Path:
    file = sqlite_file(url)
    if file is None:
        raise ConfigError(f"store = {safe_url(url)!r}: not a SQLite file; {otherwise}")
    return file


@contextmanager
def _copied(file: Path, to: Path, shown: str) -> Iterator[Path]:
    """Yield a checked copy of a database on disk beside ``to``, of one moment of it."""
    partial = to.with_name(to.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
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
        _sync(partial)
        yield partial
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{shown}: cannot be copied to {str(to)!r}: {error}") from error
    finally:
        for left in (partial, *(to.with_name(f"{partial.name}{end}") for end in _BESIDE)):
            with suppress(OSError):
                left.unlink(missing_ok=True)


_BESIDE = ("-wal", "-shm", "-journal")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

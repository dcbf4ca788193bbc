"""A backup of a SQLite store put in the place of the store, with one rename.

Whoever is killed on the way leaves the store that there was or the one that there is to be.
A store is two files, though: one, and a log of what is not in it yet. So the log is first
brought into the file, which leaves the same store in one file; that gets a second name, and
the backup its first.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.journal.backup import BESIDE, copied, file_of, sync
from knapsack_scheduler.journal.store import FileLock, safe_url

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def restore(url: str, backup: Path) -> Path | None:
    """Put a checked copy of a backup in the place of a store that no scheduler uses.

    A log that is still there then, as of a file that is gone, is set aside too: it would be
    played back into the backup, of which it knows nothing.

    Returns:
        Where the replaced file is; None if there was none.

    Raises:
        ConfigError: the store is no SQLite file or in use; the backup is damaged or cannot be
            read; there is a replaced file from before. The store is what it was then.
    """
    file = file_of(url, "restore PostgreSQL with pg_restore").resolve()
    shown = f"store = {safe_url(url)!r}"
    if not backup.is_file():
        raise ConfigError(f"from = {str(backup)!r}: there is no such file")
    lock = FileLock(file)
    lock.acquire()
    try:
        names = {Path(f"{file}{end}"): _aside(file, end) for end in ("", "-wal", "-journal")}
        _forget_names(names, shown)
        with copied(backup, file, f"from = {str(backup)!r}") as partial:
            try:
                if file.exists():
                    _bring_log_in(file, shown)
                    _own_alike(partial, file.stat())
                for name, aside in names.items():
                    with suppress(FileNotFoundError):
                        os.link(name, aside)
            except OSError as error:
                raise ConfigError(
                    f"{shown}: cannot be set aside as {_aside(file)}: {error.strerror}; "
                    f"move {file}* away and restore again"
                ) from error
            # Each step is on disk before the next: a loss of power is like a kill.
            sync(file.parent)
            for end in BESIDE:
                Path(f"{file}{end}").unlink(missing_ok=True)
            sync(file.parent)
            os.replace(partial, file)
            sync(file.parent)
    finally:
        lock.release()
    return _aside(file) if _aside(file).exists() else None


def _aside(file: Path, end: str = "") -> Path:
    return file.with_name(f"{file.name}.replaced{end}")


def _forget_names(names: dict[Path, Path], shown: str) -> None:
    """Remove the second names that a restore which was killed has given to what is in use."""
    there = [(name, aside) for name, aside in names.items() if aside.exists()]
    for name, aside in there:
        if not (name.exists() and aside.samefile(name)):
            raise ConfigError(f"{shown}: {aside} is there from before; move it away")
    for _, aside in there:
        aside.unlink()


def _own_alike(file: Path, like: os.stat_result) -> None:
    """Let a file be of whom another is: who restores may be root, and the scheduler is not."""
    os.chmod(file, like.st_mode & 0o7777)
    with suppress(PermissionError):
        os.chown(file, like.st_uid, like.st_gid)


def _bring_log_in(file: Path, shown: str) -> None:
    """Leave all of a store in its file; of a damaged one what SQLite can bring there."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=1)) as store:
            # What was being written when it crashed is undone, or found in the log, as it is read.
            store.execute("SELECT count(*) FROM sqlite_master").fetchone()
            in_use, *_ = store.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            return
        raise ConfigError(
            f"{shown}: its log cannot be brought into it: {error}; "
            f"move {file}* away and restore again"
        ) from error
    if in_use:
        raise ConfigError(f"{shown}: is in use by another program; see fuser {file}")

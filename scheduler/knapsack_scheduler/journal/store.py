"""Opens the database: engine, exclusive lock of a SQLite file, migrations."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from knapsack_scheduler.errors import ConfigError

_MIGRATIONS = Path(__file__).with_name("migrations")


def open_engine(url: str) -> sa.Engine:
    """Return the engine of a store URL.

    SQLite gets one connection in WAL mode with ``synchronous=FULL``, so that a commit
    is on disk before it returns, and every transaction begins as a writer.

    Raises:
        ConfigError: the URL names no database that is supported here.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return sa.create_engine(parsed, pool_pre_ping=True)
        engine = sa.create_engine(
            parsed, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 5}
        )
    except (ArgumentError, ImportError, SQLAlchemyError) as error:
        raise ConfigError(
            f"store = {url!r}: must be a database URL, such as sqlite:///{url} for a file"
            if "://" not in url
            else f"store = {url!r}: not a database that can be opened: {error}"
        ) from error

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: object, _record: object) -> None:
        connection.isolation_level = None  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for memory and other databases."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


class FileLock:
    """Held by the one process that may write a SQLite file.

    A journal folded into the memory of two processes that do not know of each other
    would answer from stale state, so the second one is refused.
    """

    def __init__(self, file: Path) -> None:
        self._path = file.with_name(file.name + ".lock")
        self._handle: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock; ConfigError naming the file and the holder if it is taken."""
        try:
            handle = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"store: cannot open {self._path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise ConfigError(
                f"store: {self._path.with_suffix('')} is in use by another scheduler "
                f"(pid {holder}); stop it, or use PostgreSQL for several schedulers"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._handle = handle

    def release(self) -> None:
        """Let the lock go."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _alembic(connection: sa.Connection | None = None) -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def migrate(engine: sa.Engine) -> None:
    """Bring the schema to the newest revision."""
    with engine.begin() as connection:
        command.upgrade(_alembic(connection), "head")


def revisions(engine: sa.Engine) -> tuple[str | None, str | None]:
    """Return the revision of the database and the newest one there is."""
    with engine.begin() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    return current, ScriptDirectory.from_config(_alembic()).get_current_head()

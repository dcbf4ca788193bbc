"""Opens the database: engine, exclusive lock of a SQLite file, migrations."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import QueuePool, StaticPool

from knapsack_scheduler.errors import ConfigError

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_LOCK = 0x6B6E6170
"""Key of the advisory lock under which a schema is changed."""


def open_engine(url: str) -> sa.Engine:
    """Return the engine of a store URL that writes.

    SQLite gets one connection in WAL mode with ``synchronous=FULL``, so that a commit
    is on disk before it returns, and every transaction begins as a writer. PostgreSQL
    gets a pool whose transactions see what was committed before each statement.

    Raises:
        ConfigError: the URL names no database that is supported here.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "postgresql":
        return _postgres_engine(parsed)
    engine = sa.create_engine(
        parsed, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 5}
    )
    _on_sqlite(engine, ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"), "IMMEDIATE")
    return engine


def reading_engine(url: str, writing: sa.Engine) -> sa.Engine | None:
    """Return an engine whose transactions see one moment, change nothing and block nobody.

    None where there can be no second connection: SQLite in memory.
    """
    if writing.dialect.name == "postgresql":
        return writing.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
    file = sqlite_file(url)
    if file is None:
        return None
    arguments: dict[str, Any] = {"check_same_thread": False, "timeout": 5}
    if is_frozen(file):
        engine = sa.create_engine(
            "sqlite://",
            poolclass=QueuePool,
            creator=lambda: sqlite3.connect(readable_uri(file), uri=True, **arguments),
        )
    else:
        engine = sa.create_engine(_parse(url), poolclass=QueuePool, connect_args=arguments)
    _on_sqlite(engine, ("query_only=ON",), "DEFERRED")
    return engine


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"store = {url!r}: must be a database URL, such as sqlite:///{url} for a file"
            if "://" not in url
            else f"store = {safe_url(url)!r}: not a database that can be opened"
        ) from error
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ConfigError(
            f"store = {safe_url(url)!r}: must be sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        )
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed


def _postgres_engine(url: sa.URL) -> sa.Engine:
    try:
        engine = sa.create_engine(
            url,
            isolation_level="READ COMMITTED",
            # A connection that the server closed while it lay idle is replaced unseen.
            pool_pre_ping=True,
            pool_size=8,
            connect_args={
                "connect_timeout": 5,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 15_000,
                "application_name": "knapsack-scheduler",
                # Else the driver takes the database's own, SQL_ASCII for one, and gives bytes.
                "client_encoding": "UTF8",
                # A replica that hangs with a run locked must not hold the others up for
                # longer than their clients' patience.
                "options": "-c lock_timeout=5s -c idle_in_transaction_session_timeout=120s",
            },
        )
    except ImportError as error:
        raise ConfigError(
            f"store = {safe_url(url)!r}: {error.name or 'its driver'} is not installed; "
            "pip install 'knapsack-rl[postgres]'"
        ) from error
    except SQLAlchemyError as error:
        raise ConfigError(f"store = {safe_url(url)!r}: cannot be opened: {error}") from error

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise ConfigError(
                f"store = {safe_url(url)!r}: the database has the encoding {encoding}, which "
                "cannot hold every name of a run; make it with ENCODING 'UTF8'"
            )
        # A server may be set up to answer before a commit is on disk; we may not.
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone()[0] == "off":
                cursor.execute("SET synchronous_commit = on")
        connection.commit()

    return engine


def _on_sqlite(engine: sa.Engine, pragmas: tuple[str, ...], begin: str) -> None:
    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        # Else it was begun by the driver itself, see onewriter.py.
        if not driver.in_transaction:
            driver.execute(f"BEGIN {begin}")


def safe_url(url: str | sa.URL) -> str:
    """Return a store URL without its password, for messages."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        scheme, at, rest = str(url).rpartition("@")
        return f"{scheme.split('://')[0]}://***@{rest}" if at else str(url)


def store_query(url: str) -> Mapping[str, object]:
    """Return the query of a store URL; empty for what is none."""
    try:
        return dict(sa.make_url(url).query)
    except ArgumentError:
        return {}


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for memory and other databases."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


def is_frozen(file: Path) -> bool:
    """Return whether nobody can change a SQLite file: on a disk that is read-only, without a log.

    SQLite would make files beside it to read it, and cannot.
    """
    return not os.access(file.parent, os.W_OK) and not Path(f"{file}-wal").exists()


def readable_uri(file: Path) -> str:
    """Return what SQLite's driver opens to read a file, on whatever disk it is."""
    return f"{file.absolute().as_uri()}?{'immutable=1' if is_frozen(file) else 'mode=rw'}"


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


@contextmanager
def _alembic_silent() -> Iterator[None]:
    """Keep its lines on every start out of the log of a trainer that runs us in-process."""
    log = logging.getLogger("alembic")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def migrate(engine: sa.Engine, revision: str = "head") -> None:
    """Bring the schema to a revision, the newest one by default.

    Of several processes that start at once on one PostgreSQL database one does it and
    the others wait.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        with _alembic_silent():
            command.upgrade(_alembic(connection), revision)


def is_known(revision: str | None) -> bool:
    """Return whether a revision is one of this version's; None is that of an empty database."""
    scripts = ScriptDirectory.from_config(_alembic()).walk_revisions()
    return revision is None or any(script.revision == revision for script in scripts)


def revisions(engine: sa.Engine) -> tuple[str | None, str | None]:
    """Return the revision of the database and the newest one there is."""
    with engine.begin() as connection, _alembic_silent():
        current = MigrationContext.configure(connection).get_current_revision()
    return current, ScriptDirectory.from_config(_alembic()).get_current_head()

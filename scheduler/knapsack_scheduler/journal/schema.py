"""The tables of the journal, the same on SQLite and PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts rowids for INTEGER PRIMARY KEY only.
_RUN_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")

# What a column means is said in records.py.
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("run_key", _RUN_KEY, primary_key=True, autoincrement=True),
    sa.Column("run_id", sa.Text, nullable=False, unique=True),
    sa.Column("config", sa.LargeBinary, nullable=False),
    sa.Column("create_time", sa.BigInteger, nullable=False),
    # Appending locks this row, so that entries become visible in the order of their
    # numbers.
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("branch", sa.BigInteger, nullable=False),
    sa.Column("identity", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("update_time", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("snapshot_seq", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("snapshot_size", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("floor_seq", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("floor_step", sa.BigInteger, nullable=False, server_default="-1"),
    sa.Column("closed_step", sa.BigInteger, nullable=False, server_default="-1"),
    # Of run_id, config, create_time and identity, which no call changes.
    sa.Column("checksum", sa.LargeBinary),
)

entries = sa.Table(
    "entries",
    metadata,
    sa.Column("run_key", _RUN_KEY, sa.ForeignKey("runs.run_key"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("branch", sa.BigInteger, nullable=False),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    # Of all the others but run_key. Null where an older scheduler made the entry.
    sa.Column("checksum", sa.LargeBinary),
    sa.UniqueConstraint("run_key", "kind", "key", "branch", name="uq_entries_key"),
)

# A snapshot is complete when its row is here; parts without one are left-overs.
snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("run_key", _RUN_KEY, sa.ForeignKey("runs.run_key"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column("parts", sa.BigInteger, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("checksum", sa.LargeBinary, nullable=False),
)

snapshot_parts = sa.Table(
    "snapshot_parts",
    metadata,
    sa.Column("run_key", _RUN_KEY, sa.ForeignKey("runs.run_key"), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("part", sa.BigInteger, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)

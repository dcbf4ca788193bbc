"""Snapshots of runs, how far their entries are compacted, and an identity of each run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NEW = {
    "identity": "0",
    "update_time": "0",
    "snapshot_seq": "0",
    "snapshot_size": "0",
    "floor_seq": "0",
    "floor_step": "-1",
    "closed_step": "-1",
}


def upgrade() -> None:
    """Add the tables and columns; names of allocations made before stay as they are."""
    for name, default in _NEW.items():
        op.add_column(
            "runs", sa.Column(name, sa.BigInteger, nullable=False, server_default=default)
        )
    op.execute("UPDATE runs SET identity = run_key, update_time = create_time")
    op.create_table(
        "snapshots",
        sa.Column("run_key", _KEY, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("parts", sa.BigInteger, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("checksum", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_key", "seq", name="pk_snapshots"),
        sa.ForeignKeyConstraint(["run_key"], ["runs.run_key"], name="fk_snapshots_run_key"),
    )
    op.create_table(
        "snapshot_parts",
        sa.Column("run_key", _KEY, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("part", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("run_key", "seq", "part", name="pk_snapshot_parts"),
        sa.ForeignKeyConstraint(["run_key"], ["runs.run_key"], name="fk_snapshot_parts_run_key"),
    )


def downgrade() -> None:
    """Refuse: compacted entries cannot be brought back."""
    raise NotImplementedError("go back to a backup that was made before the upgrade")

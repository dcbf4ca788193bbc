"""A checksum of what never changes of a run."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_RUNS = sa.table(
    "runs",
    sa.column("run_key", sa.BigInteger),
    sa.column("run_id", sa.Text),
    sa.column("config", sa.LargeBinary),
    sa.column("create_time", sa.BigInteger),
    sa.column("identity", sa.BigInteger),
    sa.column("checksum", sa.LargeBinary),
)


def upgrade() -> None:
    """Add the column, and to runs made before the checksum of what they are now."""
    op.add_column("runs", sa.Column("checksum", sa.LargeBinary))
    connection = op.get_bind()
    for row in connection.execute(sa.select(_RUNS)).all():
        text = f"{row.create_time}/{row.identity}/{len(row.config)}/{row.run_id}"
        checksum = hashlib.blake2b(text.encode() + row.config, digest_size=8).digest()
        connection.execute(
            sa.update(_RUNS).where(_RUNS.c.run_key == row.run_key).values(checksum=checksum)
        )


def downgrade() -> None:
    """Refuse, as the revisions before do."""
    raise NotImplementedError("go back to a backup that was made before the upgrade")

"""A checksum of every entry."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; entries made before have none."""
    op.add_column("entries", sa.Column("checksum", sa.LargeBinary))


def downgrade() -> None:
    """Refuse, as the revision before does."""
    raise NotImplementedError("go back to a backup that was made before the upgrade")

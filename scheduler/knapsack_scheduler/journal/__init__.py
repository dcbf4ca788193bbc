"""The durable truth: an append-only journal per run, in SQL."""

import logging

# Alembic tells of its plugins as it is imported: not in the log of a trainer that runs us.
logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)

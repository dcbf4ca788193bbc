"""The durable truth: an append-only journal per run, in SQL."""

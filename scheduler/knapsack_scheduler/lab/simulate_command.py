"""``knapsack-rl simulate``."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    raise NotImplementedError

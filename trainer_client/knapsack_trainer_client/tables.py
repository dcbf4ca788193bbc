"""Rows under their heads, and how figures look in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from knapsack_trainer_client.terminal import printable, shortened, width


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Return rows under their heads, columns aligned, those in ``left`` to the left."""
    # Names come from users: a control character must not steer the terminal.
    lines = [list(heads), *([shortened(printable(cell)) for cell in row] for row in rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(_padded(line, widths, left)).rstrip() for line in lines)


def percent(share: float | None) -> str:
    """Return a share as a table shows it, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"


def step_or_dash(number: int) -> str:
    """Return a step as a table shows it, or a dash where there is none."""
    return str(number) if number >= 0 else "-"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, which takes an s where it is not one."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _padded(line: Sequence[str], widths: Sequence[int], left: set[int]) -> Iterator[str]:
    for i, cell in enumerate(line):
        blank = " " * (widths[i] - width(cell))
        yield cell + blank if i in left else blank + cell

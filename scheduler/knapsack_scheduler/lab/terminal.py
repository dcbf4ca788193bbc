"""Tables as text."""

from __future__ import annotations

from knapsack_scheduler.lab.report import Table, printable

_WIDEST = 60


def table_text(table: Table) -> str:
    """Return the rows under their heads, columns aligned; nothing in them steers a terminal.

    The caption is not part of it.
    """
    lines = [[_cell(cell) for cell in line] for line in (table.heads, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(text: str) -> str:
    line = printable(text)
    return line if len(line) <= _WIDEST else line[: _WIDEST - 3] + "..."

"""A report as one HTML file: no network, no script, light and dark, printable.

Everything that is shown may come from users, names of prompts and files above all: it
is escaped, and control characters are made visible. Only the SVG of a ``Figure`` goes in
as it is; make it with ``lab.style.svg``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under their heads.

    Attributes:
        heads: one per column.
        rows: one text per column each.
        caption: what the table shows, in a sentence.
        left: columns aligned to the left; the others are numbers.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot.

    Attributes:
        svg: an ``<svg>`` element, trusted; see ``lab.style.svg``.
        caption: what to see in it, in a sentence.
        alt: the same for those who do not see it.
    """

    svg: str
    caption: str
    alt: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: a heading, and under it text, then tables, then figures.

    Attributes:
        title: the heading.
        paragraphs: plain text.
        tables, figures: in the order shown.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = field(default=())


def write_report(
    path: str | os.PathLike[str],
    title: str,
    summary: Sequence[str],
    sections: Sequence[Section],
    facts: Mapping[str, str],
) -> None:
    """Write a report; the file is there whole or not at all.

    Args:
        path: of the HTML file; what was there is replaced.
        title: of the page.
        summary: paragraphs before the first section: what came out.
        sections: in their order.
        facts: how the report was made, for the footer: version, command line, seeds,
            date. The caller knows them; nothing here reads a clock.

    Raises:
        ImportError: Jinja2 is not installed.
        OSError: the file cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "printable": printable}
    source = files("knapsack_scheduler.lab").joinpath("report.html.j2").read_text("utf-8")
    page = environment.from_string(source).render(
        title=title, summary=list(summary), sections=list(sections), facts=dict(facts)
    )
    write_whole(Path(path), page)


def printable(text: str) -> str:
    """Return the text with everything that could steer a terminal or a page made visible."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown(text: str) -> str:
    """Return the text fit for one cell: printable, and not endless."""
    line = printable(text)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def write_whole(path: Path, text: str) -> None:
    """Write the file in one move, so that a full disk leaves no half of one.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        # A temporary file is its owner's alone; a report is as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

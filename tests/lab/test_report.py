"""The report page: whole, safe, without network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from knapsack_scheduler.lab import style
from knapsack_scheduler.lab.report import Figure, Section, Table, write_report

HOSTILE = "<script>alert(1)</script>\x1b[31m\"'&$\\frac{\ud800"


class Tags(HTMLParser):
    """Collects elements and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def elements(self, besides: set[str]) -> list[tuple[str, ...]]:
        """Return every element with the names of its attributes, other than some."""
        return [(tag, *a) for tag, a in self.tags if tag not in besides]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember an element."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Remember text."""
        self.text += data


def drawn(text: str) -> str:
    """Return a plot with that name in it."""
    with style.figure(3, 2) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], label=style.label(text))
        axes.set_title(style.label(text))
        axes.legend()
        return style.svg(figure)


def page(tmp_path: Path, text: str) -> str:
    """Return a report in which the text stands everywhere."""
    table = Table([text, "n"], [[text, "1"]], text, frozenset({0}))
    section = Section(text, [text], [table], [Figure(drawn(text), text, text)])
    path = tmp_path / "report.html"
    write_report(path, text, [text], [section], {text: text})
    assert list(tmp_path.iterdir()) == [path]
    return path.read_text("utf-8")


def test_names_of_users_are_text(tmp_path: Path) -> None:
    """Nothing that a user can name becomes an element, an attribute or a control character."""
    hostile, plain = Tags(), Tags()
    whole = page(tmp_path, HOSTILE)
    hostile.feed(whole)
    plain.feed(page(tmp_path, "name"))
    # A longer name moves the ticks of a plot, which are paths.
    drawing = {"svg", "g", "defs", "path", "use", "clippath", "rect", "style", "text"}
    assert hostile.elements(drawing) == plain.elements(drawing)
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in plain.tags}
    assert not [a for _, a in hostile.tags if any(name.startswith("on") for name in a)]
    assert hostile.text.count("<script>alert(1)</script>") >= 8
    assert "\x1b" not in whole


def test_nothing_is_fetched(tmp_path: Path) -> None:
    """No script, no address outside the page."""
    tags = Tags()
    tags.feed(page(tmp_path, "name"))
    for tag, attributes in tags.tags:
        assert tag not in ("script", "link", "img", "iframe", "image"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "style"):
                assert "//" not in (value or ""), (tag, name, value)


def test_plots_take_the_colour_of_the_page_and_are_the_same_twice() -> None:
    """Ink follows the page's text, and the same plot gives the same bytes."""
    one = drawn("name")
    assert "currentColor" in one
    assert style.INK not in one
    assert one == drawn("name")
    assert ">name<" in one


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    """Replacing a report is all or nothing."""
    path = tmp_path / "report.html"
    write_report(path, "one", [], [], {})
    before = path.read_bytes()
    broken = Section("two", figures=[object()])  # type: ignore[list-item]
    with pytest.raises(Exception, match="object"):
        write_report(path, "two", [], [broken], {})
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="nowhere"):
        write_report(tmp_path / "nowhere" / "report.html", "one", [], [], {})
    assert list(tmp_path.iterdir()) == [path]

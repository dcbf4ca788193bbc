"""How text of others looks in a terminal: what it may hold, and how many columns it takes."""

from __future__ import annotations

import unicodedata

LONGEST = 60
"""Columns of a name in a table."""


def printable(text: str) -> str:
    """Return text in which nothing steers the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def width(text: str) -> int:
    """Return how many columns printable text takes: East Asian characters two, marks none."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def cut(text: str, columns: int) -> str:
    """Return as much of the beginning as fits."""
    if width(text) <= columns:
        return text
    taken = 0
    for at, character in enumerate(text):
        taken += _columns(character)
        if taken > columns:
            return text[:at]
    return text


def shortened(text: str, columns: int = LONGEST) -> str:
    """Return text of at most so many columns: names that begin alike differ at their ends."""
    if width(text) <= columns:
        return text
    begin = cut(text, (columns - 3) // 2)
    end = text[len(begin) :]
    while width(end) > columns - 3 - width(begin):
        end = end[max(len(end) - columns, 1) :]
    return f"{begin}...{end}"


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1

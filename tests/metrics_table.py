"""The tables of METRICS.md, and what a program really exposes, in one form."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

Metric = tuple[str, str, frozenset[str]]
"""Name, type and labels."""

_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|[^|]*\|([^|]*)\|[^|]+\|$", re.MULTILINE)


def documented(file: Path) -> set[Metric]:
    """Return what the tables of a file say there is."""
    rows = _ROW.findall(file.read_text())
    assert len({name for name, _, _ in rows}) == len(rows), "a metric stands there twice"
    return {(name, kind, frozenset(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def exposed(text: str, prefix: str) -> set[Metric]:
    """Return the metrics of an exposition whose names begin so.

    One without a sample is there with no labels, as nobody knows them.
    """
    found = set()
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(prefix):
            continue
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        # The parser takes the suffix off a counter's name.
        name = family.name + ("_total" if family.type == "counter" else "")
        found.add((name, family.type, frozenset(labels)))
    return found

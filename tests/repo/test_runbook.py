"""The runbook, the alerts and the metrics speak of each other, and of nothing that is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from knapsack_scheduler.limits import Limits

from metrics_table import documented

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER = ROOT / "scheduler"
RULES = ROOT / "deploy/prometheus/rules/knapsack-rl.yaml"
MIB = 2**20


def runbook() -> str:
    """Return the runbook."""
    return (SCHEDULER / "RUNBOOK.md").read_text()


def entries() -> dict[str, str]:
    """Return the runbook's entries by their anchor, which is made as GitHub makes it."""
    found = {}
    for entry in re.split(r"^## ", runbook(), flags=re.MULTILINE)[1:]:
        title, _, text = entry.partition("\n")
        anchor = re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-")
        assert anchor not in found, title
        found[anchor] = text
    return found


def rules() -> list[dict[str, Any]]:
    """Return every rule."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """Return the alerts."""
    return [rule for rule in rules() if "alert" in rule]


def scheduler_metrics() -> set[str]:
    """Return the names of the scheduler's metrics, and of a histogram's series."""
    named = set()
    for name, kind, _ in documented(SCHEDULER / "METRICS.md"):
        named.add(name)
        if kind == "histogram":
            named |= {name + suffix for suffix in ("_bucket", "_sum", "_count")}
    return named


def test_every_metric_of_the_runbook_exists() -> None:
    """Each is written K_NAME or G_NAME."""
    source = (ROOT / "genserver/knapsack_genserver/metrics.py").read_text()
    words = re.findall(r'"(\w+)"', source)
    # Counters of what another part counts are named there without their ending.
    generation = {*words, *(f"{word}_total" for word in words)}
    scheduler = {name.removeprefix("knapsack_scheduler_") for name in scheduler_metrics()}
    for letter, there, least in (("K", scheduler, 20), ("G", generation, 3)):
        named = set(re.findall(rf"\b{letter}_(\w+)", runbook()))
        assert len(named) >= least
        assert named <= there


def test_every_metric_of_a_rule_exists() -> None:
    """A rule of a metric that is not there never fires, and nobody notices."""
    named = {
        name
        for rule in rules()
        for name in re.findall(r"(?<![:\w])knapsack_scheduler_\w+", rule["expr"])
    }
    assert len(named) >= 15
    assert named <= scheduler_metrics()


def test_every_alert_has_its_entry_and_every_entry_its_alert_or_a_reason() -> None:
    """The entry names the alert, its severity and how long it waits; one without says why."""
    there = entries()
    named = {anchor: re.findall(r"^Alert: `(\w+)`", text, re.M) for anchor, text in there.items()}
    for alert in alerts():
        path, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert path == "scheduler/RUNBOOK.md"
        assert alert["alert"] in named[anchor], alert["alert"]
        text = " ".join(there[anchor].split())
        wait = _words(alert.get("for"))
        said = f"`{alert['alert']}` ({alert['labels']['severity']}{wait})"
        assert said in text, said
    assert {name for each in named.values() for name in each} == {a["alert"] for a in alerts()}
    for anchor, text in there.items():
        assert named[anchor] or text.startswith("No alert: "), anchor
        assert "\nLook: " in text, anchor
        assert "\nDo: " in text, anchor


def test_every_entry_and_panel_that_the_runbook_points_at_is_there() -> None:
    """Each is in italics: the title of another entry, a dashboard, or a panel of one."""
    boards = [
        json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").iterdir()
    ]
    panels = {panel["title"] for board in boards for panel in _panels(board)}
    titles = set(re.findall(r"^## (.+)$", runbook(), re.M))
    there = titles | panels | {board["title"].rpartition(" / ")[2] for board in boards}
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", runbook().replace("\n", " ")))
    assert len(named) >= 7
    assert named <= there


def _panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for panel in board["panels"] for each in (panel, *panel.get("panels", ()))]


def test_every_alert_says_who_is_told_and_what_happened() -> None:
    """A severity that Alertmanager routes by, a line and an explanation."""
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}


def _words(wait: str | None) -> str:
    """Return how the runbook says how long an alert waits."""
    if wait is None:
        return ""
    number, unit = int(wait[:-1]), {"m": "minutes", "h": "hours"}[wait[-1]]
    return " after an hour" if wait == "1h" else f" after {number} {unit}"


def test_the_stated_bound_on_memory_is_that_of_the_limits() -> None:
    """Formula and figure of OPERATIONS.md."""
    text = " ".join((SCHEDULER / "OPERATIONS.md").read_text().split())
    found = re.search(
        r"`max_inflight_bytes \+ (\d+) x max_message_bytes \+ (\d+) MiB`, ([\d.]+) GiB", text
    )
    assert found is not None
    factor, rest, default = found.groups()
    for limits in (Limits(), Limits(message_bytes=16 * MIB, inflight_bytes=64 * MIB)):
        stated = limits.inflight_bytes + int(factor) * limits.message_bytes + int(rest) * MIB
        assert limits.memory_bytes == stated
    assert round(Limits().memory_bytes / 2**30, 1) == float(default)

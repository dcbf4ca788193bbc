"""The shipped rules, and the same with every time in them shortened."""

from __future__ import annotations

import re
from typing import Any

import yaml

from programs import ROOT

FILE = ROOT / "deploy/prometheus/rules/knapsack-rl.yaml"

_RANGE = re.compile(r"\[\d+[mh]\]")
_FOR = re.compile(r"^(\s+for:) \d+[mh]$", re.MULTILINE)


def alerts() -> dict[str, dict[str, Any]]:
    """Return the shipped alerts by name."""
    groups = yaml.safe_load(FILE.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def shortened(seconds: int) -> str:
    """Return the text of the rules with every range so long and nothing to wait for.

    Nothing else is changed: thresholds, least numbers, selectors and labels are the shipped
    ones. A test cannot wait for six hours.
    """
    return _FOR.sub(r"\1 1s", _RANGE.sub(f"[{seconds}s]", FILE.read_text()))

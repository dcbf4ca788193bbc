"""Proves dashboards on a Prometheus: every variable has values, every query has data.

As a command, on a Prometheus that scrapes the programs in question:

    python tests/watch/dashboards.py --prometheus http://127.0.0.1:9090 generation --only vLLM

Exit code 1 and a line for each problem.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

# As a command it has no path but its own folder's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from programs import ROOT, get_json

FOLDER = ROOT / "deploy/grafana/dashboards"

SECONDS = 60
"""Of the past that queries are made of."""

Json = dict[str, Any]


def load(name: str) -> Json:
    """Return a committed dashboard."""
    dashboard: Json = json.loads((FOLDER / f"{name}.json").read_text())
    return dashboard


def panels(dashboard: Json) -> list[Json]:
    """Return the panels that show something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def is_vllm(panel: Json) -> bool:
    """Return whether a panel shows what there is where vLLM runs, and nowhere else."""
    return str(panel["title"]).startswith("vLLM: ")


def problems(
    dashboard: Json,
    prometheus: str,
    *,
    only: Callable[[Json], bool] = lambda panel: True,
    choose: Mapping[str, str] | None = None,
) -> list[str]:
    """Return what is wrong with a dashboard on a live Prometheus; empty for nothing.

    Args:
        dashboard: to be proven.
        prometheus: address.
        only: which panels.
        choose: values of variables; where none is given, what Grafana chooses first.
    """
    found: list[str] = []
    chosen = panels(dashboard)
    chosen = [panel for panel in chosen if only(panel)]
    used = json.dumps(chosen)
    values = _variables(dashboard, prometheus, dict(choose or {}), used, found)
    for panel in chosen:
        legends: set[str] = set()
        for target in panel["targets"]:
            where = f"{dashboard['title']}, {panel['title']!r}, {target['refId']}"
            found += [
                f"{where}: {problem}"
                for problem in _target_problems(target, values, prometheus, legends)
            ]
        if panel["type"] != "table":
            missing = _override_names(panel) - legends
            if missing and legends:
                found.append(
                    f"{dashboard['title']}, {panel['title']!r}: settings for {sorted(missing)}, "
                    f"but the series are {sorted(legends)}"
                )
    return found


def chosen_first(dashboard: Json, prometheus: str) -> dict[str, str]:
    """Return the values of variables that Grafana chooses first: of lists with all, all."""
    return _variables(dashboard, prometheus, {}, json.dumps(panels(dashboard)), [])


def unparsed(dashboard: Json, prometheus: str, only: Callable[[Json], bool]) -> list[str]:
    """Return the queries that Prometheus cannot read; says nothing of whether there is data."""
    found = []
    for panel in filter(only, panels(dashboard)):
        for target in panel["targets"]:
            values = dict.fromkeys(re.findall(r"\$(\w+)", target["expr"]), ".+")
            values |= {"window": "5m"} | _TIMES
            answer = get_json(f"{prometheus}/api/v1/query", query=_filled(target["expr"], values))
            if answer["status"] != "success":
                found.append(f"{panel['title']!r}, {target['refId']}: {answer['error']}")
    return found


_TIMES = {"__rate_interval": "15s", "__range": f"{SECONDS}s", "__interval": "1s"}


def _variables(
    dashboard: Json, prometheus: str, values: dict[str, str], used: str, found: list[str]
) -> dict[str, str]:
    values |= _TIMES
    for variable in dashboard["templating"]["list"]:
        name = variable["name"]
        if variable["type"] == "custom":
            values.setdefault(name, variable["current"]["value"])
        if variable["type"] != "query" or not re.search(rf"\${name}\b", used):
            continue
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert asked is not None, variable["query"]
        match, label = _filled(asked[1], values), asked[2]
        answer = get_json(f"{prometheus}/api/v1/label/{label}/values", **{"match[]": match})
        if answer["status"] != "success" or not answer["data"]:
            found.append(f"{dashboard['title']}, variable {name}: no values of {label} in {match}")
            continue
        everything = variable["includeAll"]
        values.setdefault(name, "|".join(answer["data"]) if everything else answer["data"][0])
        if not everything and values[name] not in answer["data"]:
            found.append(f"{dashboard['title']}, variable {name}: {values[name]} is no choice")
    return values


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), text)


def _target_problems(
    target: Json, values: Mapping[str, str], prometheus: str, legends: set[str]
) -> Iterable[str]:
    query = _filled(target["expr"], values)
    if "$" in query:
        yield f"a variable that is not there: {query}"
        return
    now = time.time()
    if target["instant"]:
        answer = get_json(f"{prometheus}/api/v1/query", query=query, time=str(now))
    else:
        answer = get_json(
            f"{prometheus}/api/v1/query_range",
            query=query,
            start=str(now - SECONDS),
            end=str(now),
            step="1",
        )
    if answer["status"] != "success":
        yield f"{answer['error']}: {query}"
        return
    series = answer["data"]["result"]
    if not any(_numbers(each) for each in series):
        yield f"no data: {query}"
    for each in series:
        legend = target["legendFormat"]
        for label in re.findall(r"\{\{\s*(\w+)\s*\}\}", legend):
            if label not in each["metric"]:
                yield f"its legend names {label}, which the series lack: {query}"
        legends.add(
            re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: str(each["metric"].get(m[1])), legend)  # noqa: B023
        )


def _numbers(series: Json) -> list[float]:
    points = series.get("values") or [series["value"]]
    return [value for value in (float(point[1]) for point in points) if math.isfinite(value)]


def _override_names(panel: Json) -> set[str]:
    return {each["matcher"]["options"] for each in panel["fieldConfig"]["overrides"]}


def main() -> int:
    """Check some dashboards; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--only", default="", help="panels with this in their title")
    parser.add_argument("names", nargs="*", default=["run", "service", "generation"])
    options = parser.parse_args()
    found = []
    for name in options.names:
        found += problems(
            load(name), options.prometheus, only=lambda panel: options.only in panel["title"]
        )
    print("\n".join(found) or "every query has data")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Parts of a Grafana dashboard as plain dictionaries, in Grafana's own schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
"""Columns of a dashboard."""


def query(expression: str, legend: str = "", *, instant: bool = False, table: bool = False) -> Json:
    """Return a query; ``legend`` may name labels as ``{{label}}``."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": " ".join(expression.split()),
        "legendFormat": legend or "__auto",
        "instant": instant or table,
        "range": not (instant or table),
        "format": "table" if table else "time_series",
    }


def heat(expression: str) -> Json:
    """Return a query of a histogram's buckets, for a heat map."""
    return {**query(expression, "{{le}}"), "format": "heatmap"}


def timeseries(
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Json],
    *,
    width: int = 8,
    height: int = 8,
    stacked: str = "none",
    minimum: float | None = 0,
    maximum: float | None = None,
    colours: dict[str, str] | None = None,
    dashed: Sequence[str] = (),
    decimals: int | None = None,
) -> Json:
    """Return a panel of lines, or of areas where they are ``stacked`` ("normal", "percent").

    Args:
        title, description, unit, queries: what is shown.
        width, height: in columns and rows of the grid.
        stacked: see above.
        minimum, maximum: of the axis; None to fit the data.
        colours: of series, by legend.
        dashed: legends of series drawn dashed: what is expected, beside what came.
        decimals: None for as many as are needed.
    """
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "palette-classic"},
        "custom": {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 0 if stacked != "none" else 2,
            "fillOpacity": 80 if stacked != "none" else 6,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": stacked, "group": "A"},
            "axisSoftMin": 0,
            # An axis of nothing but zeroes would reach to 100.
            "axisSoftMax": 0.01 if unit in ("percentunit", "s", "reqps", "ops") else 1,
        },
    }
    if minimum is None:
        del defaults["custom"]["axisSoftMin"], defaults["custom"]["axisSoftMax"]
    else:
        defaults["min"] = minimum
    if maximum is not None:
        defaults["max"] = maximum
    if decimals is not None:
        defaults["decimals"] = decimals
    overrides: list[Json] = [
        _override(name, {"color": {"mode": "fixed", "fixedColor": colour}})
        for name, colour in (colours or {}).items()
    ]
    overrides += [
        _override(name, {"custom.lineStyle": {"fill": "dash", "dash": [8, 6]}}) for name in dashed
    ]
    return {
        **_panel("timeseries", title, description, queries, width, height),
        "fieldConfig": {"defaults": defaults, "overrides": overrides},
        "options": {
            "legend": {
                "displayMode": "list",
                "placement": "bottom",
                "calcs": [],
                "showLegend": True,
            },
            "tooltip": {"mode": "multi", "sort": "none"},
        },
    }


def stat(
    title: str,
    description: str,
    unit: str,
    expression: str,
    *,
    width: int = 6,
    thresholds: Sequence[tuple[float | None, str]] = ((None, "text"),),
    decimals: int | None = None,
    mappings: Sequence[Json] = (),
) -> Json:
    """Return one number over the whole time shown.

    Args:
        title, description, unit, expression: what is shown.
        width: in columns.
        thresholds: least value and colour, ascending; None for the lowest.
        decimals: None for as many as are needed.
        mappings: texts in place of values.
    """
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "thresholds"},
        "mappings": list(mappings),
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in thresholds],
        },
    }
    if decimals is not None:
        defaults["decimals"] = decimals
    queries = [query(expression, title, instant=True)]
    return {
        **_panel("stat", title, description, queries, width, 3),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "value",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    }


def heatmap(
    title: str, description: str, expression: str, *, width: int = 8, height: int = 8
) -> Json:
    """Return a heat map of a histogram: time, bucket, how many."""
    return {
        **_panel("heatmap", title, description, [heat(expression)], width, height),
        "fieldConfig": {"defaults": {"custom": {"scaleDistribution": {"type": "linear"}}},
                        "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme",
                "scheme": "Blues",
                "fill": "dark-orange",
                "scale": "exponential",
                "exponent": 0.5,
                "steps": 64,
                "reverse": False,
            },
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": False},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
            "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "short"},
        },
    }  # fmt: skip


def table(
    title: str,
    description: str,
    queries: Sequence[Json],
    by: str,
    columns: dict[str, tuple[str, str]],
    *,
    width: int = 8,
    height: int = 8,
) -> Json:
    """Return a table of the newest values, one row for each value of a label.

    Args:
        title, description, queries: what is shown, each query as a table.
        by: the label that rows are joined by.
        columns: of each query in turn, by its refId: name and unit.
        width, height: in columns and rows of the grid.
    """
    renames = {by: by.replace("_", " ")}
    for ref, (name, _) in columns.items():
        renames[f"Value #{ref}"] = name
    overrides = [_override(name, {"unit": unit}) for name, unit in columns.values()]
    return {
        **_panel("table", title, description, queries, width, height),
        "fieldConfig": {
            "defaults": {"custom": {"align": "auto", "cellOptions": {"type": "auto"}}},
            "overrides": overrides,
        },
        "options": {"showHeader": True, "cellHeight": "sm"},
        "transformations": [
            {"id": "joinByField", "options": {"byField": by, "mode": "outer"}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {f"Time {n}": True for n in range(1, len(queries) + 1)},
                    "indexByName": {},
                    "renameByName": renames,
                },
            },
        ],
    }


def row(title: str) -> Json:
    """Return a heading that the panels after it stand under."""
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "height": 1,
            "width": WIDTH}  # fmt: skip


def dashboard(
    uid: str,
    title: str,
    description: str,
    panels: Sequence[Json],
    variables: Sequence[Json],
    *,
    since: str = "now-24h",
    refresh: str = "1m",
    tags: Sequence[str] = ("knapsack-rl",),
) -> Json:
    """Return a dashboard with its panels laid out in rows from left to right."""
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": list(tags),
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": refresh,
        "time": {"from": since, "to": "now"},
        "fiscalYearStartMonth": 0,
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "knapsack-rl",
                "tags": ["knapsack-rl"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
                "tooltip": "",
                "url": "",
            }
        ],
        "templating": {"list": list(variables)},
        "panels": _laid_out(panels),
    }


def datasource_variable() -> Json:
    """Return the choice of a Prometheus."""
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
    }


def label_variable(
    name: str, label: str, metric: str, source: str, *, everything: bool = True
) -> Json:
    """Return a choice of the values of a label.

    Args:
        name, label: of the variable, in queries and on the page.
        metric: series, with selectors, that have the label.
        source: the label.
        everything: several values may be chosen, all of them to begin with; else one.
    """
    variable: Json = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, {source})", "refId": "StandardVariableQuery"},
        "hide": 0,
        "includeAll": everything,
        "multi": everything,
        "options": [],
        # With the time shown: what ran then can be chosen.
        "refresh": 2,
        "regex": "",
        "sort": 1,
    }
    if everything:
        # All of those listed, not all that there is: metrics of processes are everybody's.
        variable["current"] = {"selected": True, "text": ["All"], "value": ["$__all"]}
    return variable


def choice_variable(name: str, label: str, values: Sequence[str], chosen: str) -> Json:
    """Return a choice of written-down values."""
    return {
        "name": name,
        "label": label,
        "type": "custom",
        "query": ",".join(values),
        "current": {"selected": True, "text": chosen, "value": chosen},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [{"selected": v == chosen, "text": v, "value": v} for v in values],
    }


def _panel(
    kind: str, title: str, description: str, queries: Sequence[Json], width: int, height: int
) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": " ".join(description.split()),
        "datasource": DATASOURCE,
        "targets": [{"refId": chr(ord("A") + n), **each} for n, each in enumerate(queries)],
        "width": width,
        "height": height,
    }


def _override(name: str, properties: Json) -> Json:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [{"id": each, "value": value} for each, value in properties.items()],
    }


def _laid_out(panels: Sequence[Json]) -> list[Json]:
    x = y = tallest = 0
    placed = []
    for number, panel in enumerate(panels, 1):
        width, height = panel["width"], panel["height"]
        if x + width > WIDTH:
            x, y, tallest = 0, y + tallest, 0
        place = {"x": x, "y": y, "w": width, "h": height}
        rest = {key: value for key, value in panel.items() if key not in ("width", "height")}
        placed.append({"id": number, **rest, "gridPos": place})
        x, tallest = x + width, max(tallest, height)
    return placed

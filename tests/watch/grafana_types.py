"""Checks dashboards against the TypeScript types that Grafana itself is built of."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

_PANELS = {
    "timeseries": ("TimeSeriesPanelCfg", True),
    "heatmap": ("HeatmapPanelCfg", True),
    "stat": ("StatPanelCfg", False),
    "table": ("TablePanelCfg", False),
}
"""Of each kind of panel the file of its types, and whether it has field settings of its own.
Those of a table are of the table component."""


def complaints(dashboards: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Return what TypeScript has to say against the dashboards; empty for nothing.

    Args:
        dashboards: by name.
        folder: empty, to work in.
    """
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(install, cwd=folder, check=True, timeout=500)
    for name, dashboard in dashboards.items():
        (folder / f"{name}.ts").write_text(_program(dashboard))
    files = [f"{name}.ts" for name in dashboards]
    command = ["npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext"]
    done = subprocess.run(
        [*command, *files], cwd=folder, capture_output=True, text=True, check=False, timeout=500
    )
    return done.stdout + done.stderr


def _program(dashboard: Mapping[str, Any]) -> str:
    """Return a program that has the dashboard in it, and every part under its own type."""
    lines = ["import type * as grafana from '@grafana/schema';"]
    for kind, (file, _) in _PANELS.items():
        path = f"@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{file}_types.gen"
        lines.append(f"import type * as {kind} from '{path}';")
    lines.append(
        f"export const dashboard = {json.dumps(dashboard)} satisfies Wire<grafana.Dashboard>;"
    )
    for panel in dashboard["panels"]:
        kind = panel["type"]
        if kind == "row":
            continue
        which = f"panel{panel['id']}"
        lines.append(f"export const {which} = {json.dumps(panel)} satisfies Wire<grafana.Panel>;")
        _, has_fields = _PANELS[kind]
        # Defaults that Grafana fills in may be left out; what is there must be right.
        lines.append(
            f"export const {which}Options = {json.dumps(panel['options'])} "
            f"satisfies Partly<{kind}.Options>;"
        )
        custom = panel["fieldConfig"]["defaults"].get("custom", {})
        fields = f"{kind}.FieldConfig" if has_fields else "grafana.TableFieldOptions"
        if custom:
            lines.append(
                f"export const {which}Fields = {json.dumps(custom)} satisfies Partly<{fields}>;"
            )
        for target in panel["targets"]:
            name = f"{which}{target['refId']}"
            lines.append(f"export const {name} = {json.dumps(target)} satisfies Wire<Query>;")
    lines.append(_TYPES)
    return "\n".join(lines)


_TYPES = """
// JSON has no enums, only the strings that they stand for.
type Wire<T> = T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends (infer Item)[] ? Wire<Item>[]
  : unknown extends T ? T
  : { [K in keyof T]: Wire<T[K]> };
type Partly<T> = T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends (infer Item)[] ? Partly<Item>[]
  : { [K in keyof T]?: Partly<T[K]> };
interface Query extends grafana.DataQuery {
  editorMode: 'code';
  expr: string;
  format: 'time_series' | 'table' | 'heatmap';
  instant: boolean;
  legendFormat: string;
  range: boolean;
}
"""
"""A query of Prometheus is typed in its plugin, which is no part of the package: its fields
are those that the plugin documents."""

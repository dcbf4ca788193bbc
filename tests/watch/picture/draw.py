#!/usr/bin/env python3
"""Draws the Run dashboard of a sped-up run with Grafana's UI library, to a PNG.

A real scheduler serves a real client whose policy and prompts are imaginary. After every step
the scheduler's metrics are read and dated two minutes after those of the step before, and a real
Prometheus answers the dashboard's queries from them: eight hours of a run in a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from knapsack_trainer_client import BudgetClient  # noqa: E402

from programs import ROOT, Prometheus, scheduler, tool  # noqa: E402
from workload import learning_run  # noqa: E402

STEP_SECONDS = 120
STEPS = 240
SAMPLE_SECONDS = 60
START = 1_750_000_000 - 1_750_000_000 % 86_400 + 9 * 3600
"""Nine in the morning of some day, in Unix time."""

OUTAGE = range(150, 156)
"""Steps during which the scheduler is away."""


def record(folder: Path) -> Path:
    """Return a file with the metrics of a run, dated, in OpenMetrics."""
    served = scheduler("scheduler", folder)
    served.start()
    lines: list[str] = []
    try:
        with BudgetClient(
            served.addresses["listen"], "exp1", outbox=folder / "outbox.db", timeout=5
        ) as client:
            for step in learning_run(client, STEPS, prompts=1600, batch=128, speed=0.8):
                if step + 1 == OUTAGE.start:
                    served.end()
                if step + 1 == OUTAGE.stop:
                    served.start()
                    client.flush(30)
                if step + 1 not in OUTAGE:
                    lines += _dated(served.addresses["admin"], START + step * STEP_SECONDS)
    finally:
        served.close()
    # Samples of one series have to follow each other.
    lines.sort(key=lambda line: line.rpartition(" ")[0].rpartition(" ")[0])
    file = folder / "metrics.txt"
    file.write_text("\n".join([*lines, "# EOF\n"]))
    return file


def _dated(address: str, at: int) -> list[str]:
    """Return the samples of now, as Prometheus would have seen them in two minutes from ``at``."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        samples = [line for line in answer.read().decode().splitlines() if line[:1] != "#"]
    labels = 'job="knapsack-scheduler",instance="scheduler:9464"'
    dated = []
    for sample in samples:
        series, _, value = sample.rpartition(" ")
        name, brace, rest = series.partition("{")
        if "timestamp_seconds" in name:
            value = str(at)
        full = f"{name}{{{labels}," + rest if brace else f"{name}{{{labels}}}"
        dated += [f"{full} {value} {at + more}" for more in range(0, STEP_SECONDS, SAMPLE_SECONDS)]
    return dated


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, metavar="PNG")
    parser.add_argument("--dashboard", default="run", help="which of deploy/grafana/dashboards")
    options = parser.parse_args()
    if not (HERE / "node_modules").exists():
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blocks = folder / "prometheus/data"
        command = [tool("promtool"), "tsdb", "create-blocks-from", "openmetrics"]
        subprocess.run(
            [*command, str(record(folder)), str(blocks)], check=True, stdout=subprocess.DEVNULL
        )
        prometheus = Prometheus(folder / "prometheus", {}, retention="100y")
        prometheus.start()
        try:
            end = START + STEPS * STEP_SECONDS
            settings = {
                "prometheus": prometheus.url,
                "dashboard": json.loads(
                    (ROOT / f"deploy/grafana/dashboards/{options.dashboard}.json").read_text()
                ),
                "from": START,
                "to": end - SAMPLE_SECONDS,
                "step": SAMPLE_SECONDS,
                "variables": {
                    "job": ".+",
                    "instance": ".+",
                    "run": "exp1",
                    "window": "30m",
                    "__range": f"{end - START}s",
                    "__rate_interval": f"{4 * SAMPLE_SECONDS}s",
                },
                "shown": ["run", "window"],
            }
            (folder / "settings.json").write_text(json.dumps(settings))
            subprocess.run(
                [
                    "node",
                    HERE / "shoot.mjs",
                    folder / "settings.json",
                    tool("chromium"),
                    options.to,
                ],
                check=True,
                timeout=180,
            )
        finally:
            prometheus.close()


if __name__ == "__main__":
    main()

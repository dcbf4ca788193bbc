#!/usr/bin/env python3
"""Draws a dashboard with Grafana's UI library, to a PNG.

*Run* is of a sped-up run: a real scheduler serves a real client whose policy and prompts are
imaginary. After every step the scheduler's metrics are read and dated two minutes after those of
the step before, and a real Prometheus answers the dashboard's queries from them: eight hours of a
run in a minute.

*Service* and *Generation* are of the same kind of run and of a generation server whose engine is
imaginary, as a real Prometheus scrapes them for two minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from knapsack_trainer_client import BudgetClient  # noqa: E402

import dashboards  # noqa: E402
from programs import Program, Prometheus, generator, scheduler, tool  # noqa: E402
from workload import generate_until, learning_run, train_until  # noqa: E402

STEP_SECONDS = 120
STEPS = 240
SAMPLE_SECONDS = 60
START = 1_750_000_000 - 1_750_000_000 % 86_400 + 9 * 3600
"""Nine in the morning of some day, in Unix time."""

OUTAGE = range(150, 156)
"""Steps during which the scheduler is away."""

LIVE_SECONDS = 120
"""Of the dashboards that are not sped up."""

Json = dict[str, Any]


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


@contextmanager
def sped_up(folder: Path) -> Iterator[Json]:
    """Yield the settings of the page for the recorded run."""
    blocks = folder / "prometheus/data"
    command = [tool("promtool"), "tsdb", "create-blocks-from", "openmetrics"]
    subprocess.run(
        [*command, str(record(folder)), str(blocks)], check=True, stdout=subprocess.DEVNULL
    )
    prometheus = Prometheus(folder / "prometheus", {}, retention="100y")
    prometheus.start()
    try:
        end = START + STEPS * STEP_SECONDS
        yield _settings(prometheus, START, end - SAMPLE_SECONDS, SAMPLE_SECONDS, window="30m")
    finally:
        prometheus.close()


@contextmanager
def live(folder: Path) -> Iterator[Json]:
    """Yield the settings of the page for programs at work, once they have been for a while."""
    with ExitStack() as stack:

        def begin(program: Program) -> Program:
            program.start()
            stack.callback(program.close)
            return program

        served, generating = scheduler("scheduler", folder), generator("generator", folder)
        targets = {
            "knapsack-scheduler": begin(served).addresses["admin"],
            "knapsack-genserver": begin(generating).addresses["admin"],
        }
        prometheus = Prometheus(folder / "prometheus", targets)
        begin(prometheus)
        stop = threading.Event()
        works = [
            threading.Thread(target=work, args=(program.addresses["listen"], folder, stop))
            for work, program in ((train_until, served), (generate_until, generating))
        ]
        for work in works:
            work.start()
        try:
            start = int(time.time())
            time.sleep(LIVE_SECONDS)
        finally:
            stop.set()
            for work in works:
                work.join()
        yield _settings(prometheus, start, start + LIVE_SECONDS, 1)


def _settings(prometheus: Prometheus, start: int, end: int, step: int, **variables: str) -> Json:
    return {
        "prometheus": prometheus.url,
        "from": start,
        "to": end,
        "step": step,
        "variables": {
            **variables,
            "__range": f"{end - start}s",
            "__rate_interval": f"{max(4 * step, 15)}s",
        },
    }


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
    is_run = options.dashboard == "run"
    dashboard = dashboards.load(options.dashboard)
    # There is no vLLM here.
    dashboard["panels"] = [p for p in dashboard["panels"] if not dashboards.is_vllm(p)]
    if dashboard["panels"][-1]["type"] == "row":
        del dashboard["panels"][-1]
    with (
        tempfile.TemporaryDirectory() as name,
        (sped_up if is_run else live)(Path(name)) as settings,
    ):
        file = Path(name) / "settings.json"
        settings["variables"] = {
            **dashboards.chosen_first(dashboard, settings["prometheus"]),
            **settings["variables"],
        }
        settings["dashboard"] = dashboard
        settings["shown"] = ["run", "window"] if is_run else []
        file.write_text(json.dumps(settings))
        command = ["node", HERE / "shoot.mjs", file, tool("chromium"), options.to]
        subprocess.run(command, check=True, timeout=180)


if __name__ == "__main__":
    main()

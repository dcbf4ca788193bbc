"""Runs grpo.py and grpo_budgeted.py from the same seeds and draws what they learned.

    python compare.py [--seeds 3] [--steps 72] [--out trl-results]

The two of a seed run side by side, each on one core.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
from clock import Setup

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ARMS = {"uniform": "grpo.py", "knapsack": "grpo_budgeted.py"}
ROLLOUTS = 1024
"""Of a step, in both scripts."""


def main() -> None:
    """Train, print a table and the difference of the scripts, and draw the curves."""
    parser = argparse.ArgumentParser(description="The same TRL training with and without us.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--out", type=Path, default=Path("trl-results"))
    chosen = parser.parse_args()
    curves: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in ARMS}
    for seed in range(chosen.seeds):
        Setup(seed, chosen.out)  # The two take its model from there.
        print(f"seed {seed + 1} of {chosen.seeds}: {chosen.steps} steps of each", flush=True)
        for arm, curve in _train(seed, chosen.steps, chosen.out).items():
            curves[arm].append(curve)
    _table(curves)
    _difference()
    _draw(curves, chosen.out / "trl.png")
    (chosen.out / "curves.json").write_text(json.dumps(curves))
    print(f"curves: {chosen.out / 'trl.png'}")


def _train(seed: int, steps: int, out: Path) -> dict[str, list[dict[str, float]]]:
    running = {}
    for arm, script in ARMS.items():
        folder = out / f"{arm}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", str(HERE / script)]
        arguments = ["--seed", str(seed), "--steps", str(steps), "--out", str(folder)]
        with (folder / "log.txt").open("w") as log:
            running[arm] = subprocess.Popen(
                [*command, *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
    answer = {}
    for arm, process in running.items():
        folder = out / f"{arm}-{seed}"
        if process.wait() != 0:
            sys.exit(f"{ARMS[arm]} failed; see {folder / 'log.txt'}")
        answer[arm] = json.loads((folder / "curve.json").read_text())
    return answer


def _table(curves: dict[str, list[list[dict[str, float]]]]) -> None:
    print(f"\n{'held-out accuracy':24}" + "".join(f"{arm:>18}" for arm in curves))
    half = len(curves["uniform"][0]) // 2
    for label, column, pick in [
        ("after half of the steps", "accuracy", half),
        ("at the end", "accuracy", -1),
        ("most probable response", "greedy", -1),
    ]:
        print(f"{label:24}" + "".join(_cell(_at(c, column, pick)) for c in curves.values()))
    ends = zip(
        _at(curves["uniform"], "accuracy", -1), _at(curves["knapsack"], "accuracy", -1), strict=True
    )
    gains = [100 * (ours - theirs) for theirs, ours in ends]
    print(f"\nknapsack against uniform at the end, points, by seed: {_listed(gains)}\n")


def _at(curves: list[list[dict[str, float]]], column: str, point: int) -> list[float]:
    return [curve[point][column] for curve in curves]


def _cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}".rjust(18)


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:+.1f}" for value in values)


def _difference() -> None:
    texts = [(HERE / script).read_text().splitlines() for script in ARMS.values()]
    names = list(ARMS.values())
    for line in difflib.unified_diff(*texts, *names, lineterm="", n=0):
        print(line)
    print()


def _draw(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (arm, runs), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        rollouts = [ROLLOUTS * point["step"] / 1000 for point in runs[0]]
        values = [[run[i]["accuracy"] for run in runs] for i in range(len(rollouts))]
        means: list[Any] = [statistics.mean(v) for v in values]
        axes.plot(rollouts, means, color=colour, label=arm)
        if len(runs) > 1:
            spreads = [statistics.stdev(v) for v in values]
            axes.fill_between(
                rollouts,
                [m - s for m, s in zip(means, spreads, strict=True)],
                [m + s for m, s in zip(means, spreads, strict=True)],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    axes.set_xlabel("rollouts, thousands")
    axes.set_ylabel("held-out accuracy")
    seeds = len(curves["uniform"])
    of = f"mean and deviation of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(f"TRL on the clock task, {of}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

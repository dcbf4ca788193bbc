"""The picture: how fast each arm learned, and which prompts got the rollouts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from knapsack_trainer_client.demo.results import BASELINE
from knapsack_trainer_client.demo.train import History

_COLOURS = ("#7f7f7f", "#1f77b4", "#d95f02")
_EDGES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 1.0)


def draw(path: Path, runs: Mapping[str, Sequence[History]]) -> None:
    """Write the picture as PNG; each arm has one history per seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _learning_curves(left, runs)
    _who_got_rollouts(right, runs)
    seeds = len(next(iter(runs.values())))
    total = sum(sum(step.num_rollouts) for step in runs[BASELINE][0].steps)
    figure.suptitle(
        f"GRPO on a small transformer, {total:,} rollouts per arm, "
        + ("1 seed" if seeds == 1 else f"mean and standard deviation of {seeds} seeds")
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _learning_curves(axes: Axes, runs: Mapping[str, Sequence[History]]) -> None:
    for (name, seeds), colour in zip(runs.items(), _COLOURS, strict=False):
        rollouts = [e.rollouts / 1000 for e in seeds[0].evaluations]
        curves = np.array([[e.exact for e in history.evaluations] for history in seeds])
        mean = curves.mean(axis=0)
        axes.plot(rollouts, mean, label=name, color=colour, marker="o", markersize=3)
        if len(seeds) > 1:
            spread = curves.std(axis=0, ddof=1)
            axes.fill_between(
                rollouts, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0
            )
    axes.set_xlabel("rollouts generated (thousands)")
    axes.set_ylabel("held-out accuracy")
    axes.set_title("What the budget bought")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)


def _who_got_rollouts(axes: Axes, runs: Mapping[str, Sequence[History]]) -> None:
    width = 0.8 / len(runs)
    for at, ((name, seeds), colour) in enumerate(zip(runs.items(), _COLOURS, strict=False)):
        rates, sizes = _groups(seeds)
        bands = np.clip(np.searchsorted(_EDGES, rates, side="right") - 1, 0, len(_EDGES) - 2)
        means = [
            sizes[bands == band].mean() if (bands == band).any() else 0.0
            for band in range(len(_EDGES) - 1)
        ]
        places = np.arange(len(_EDGES) - 1) + (at - (len(runs) - 1) / 2) * width
        axes.bar(places, means, width, color=colour, label=name)
    labels = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(_EDGES)]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel("success rate of the prompt when it was drawn")
    axes.set_ylabel("mean rollouts of its group")
    axes.set_title("Who got the rollouts (second half of training)")
    axes.grid(axis="y", alpha=0.25)


def _groups(seeds: Sequence[History]) -> tuple[np.ndarray, np.ndarray]:
    """Return success rate and size of every group of the second half of training."""
    late = [step for history in seeds for step in history.steps[len(history.steps) // 2 :]]
    rates = [rate for step in late for rate in step.success_rates]
    sizes = [n for step in late for n in step.num_rollouts]
    return np.array(rates), np.array(sizes)

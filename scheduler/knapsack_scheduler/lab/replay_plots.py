"""The plots of a replay, each with its caption and a description in words."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from knapsack_scheduler.core.problem import FloatArray
from knapsack_scheduler.lab import style
from knapsack_scheduler.lab.arms import BASELINE
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.replay_outcome import Figure as Part
from knapsack_scheduler.lab.replay_outcome import Replay
from knapsack_scheduler.lab.replay_words import BANDS_IN_WORDS
from knapsack_scheduler.lab.report import Figure
from knapsack_scheduler.lab.waste import Waste

_MOST_POINTS = 150
_WIDTH = 9.0


def plot_waste(replay: Replay, waste: Waste) -> Figure:
    """Return the share of every step's rollouts that lay in groups with equal rewards."""
    steps = _binned(replay.log.steps.astype(np.float64))
    failed, passed = 100 * _binned(waste.failed_share), 100 * _binned(waste.passed_share)
    with style.figure(_WIDTH, 3.2) as figure:
        axes = figure.subplots()
        axes.stackplot(
            steps,
            failed,
            passed,
            colors=[style.BANDS[-1], style.BANDS[0]],
            labels=["all failed", "all passed"],
            alpha=0.85,
        )
        axes.set(xlabel="step", ylabel="% of rollouts", ylim=(0, 100))
        axes.set_title("Rollouts in groups with equal rewards")
        axes.margins(x=0)
        axes.legend(loc="upper right", ncols=2)
        style.bare(axes)
        drawn = style.svg(figure)
    return Figure(
        drawn,
        "What the logged run spent on groups that teach nothing, step by step.",
        f"Stacked areas over steps: {100 * waste.share:.0f}% of all rollouts, of which all "
        f"failed {100 * waste.failed_rollouts / waste.rollouts:.0f}%.",
    )


def plot_figures(replay: Replay) -> Figure:
    """Return every arm's figures, measured and extrapolated, and what was predicted."""
    baseline = replay.outcome(BASELINE)
    unit = baseline.value.total if baseline is not None else 0.0
    panels = [
        ("effective groups", "%", [_scaled(o.effective_group_rate, 100) for o in replay.outcomes]),
        (
            "effective rollouts",
            "%",
            [_scaled(o.effective_rollout_rate, 100) for o in replay.outcomes],
        ),
        (
            "value",
            "% of uniform's" if unit else replay.valued,
            [_scaled(o.value, 100 / unit if unit else 1.0) for o in replay.outcomes],
        ),
    ]
    places = np.arange(len(replay.outcomes))[::-1]
    with style.figure(_WIDTH, 0.7 + 0.38 * len(replay.outcomes)) as figure:
        for axes, (title, unit_name, parts) in zip(
            figure.subplots(1, 3, sharey=True), panels, strict=True
        ):
            for place, outcome, part in zip(places, replay.outcomes, parts, strict=True):
                colour = style.colour_of(outcome.arm.name)
                axes.barh(place, part.measured, 0.62, color=colour)
                axes.barh(
                    place,
                    part.extrapolated,
                    0.62,
                    left=part.measured,
                    color="none",
                    edgecolor=colour,
                    hatch="////",
                    linewidth=1.0,
                )
                if title != "value" or outcome.arm.objective == replay.valued:
                    axes.plot(part.predicted, place, "|", color=style.INK, ms=13, mew=1.6)
            axes.set_title(title)
            axes.set_xlabel(unit_name)
            axes.set_yticks(places, [o.arm.name for o in replay.outcomes])
            style.bare(axes, "x")
        drawn = style.svg(figure)
    return Figure(
        drawn,
        "Full bars are measured, hatched ones extrapolated for rollouts that the log does not "
        "have; the strokes are what each policy's own last decisions expected.",
        "; ".join(
            f"{o.arm.name}: effective groups {100 * o.effective_group_rate.total:.0f}%, "
            f"effective rollouts {100 * o.effective_rollout_rate.total:.0f}%"
            for o in replay.outcomes
        ),
    )


def plot_sizes(replay: Replay) -> Figure:
    """Return how large every arm's groups are."""
    usual = int(np.median(replay.log.group_sizes))
    largest = max(outcome.largest_group for outcome in replay.outcomes)
    edges = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    # The log's own size has a bar of its own.
    least = min(int(np.flatnonzero(outcome.size_counts)[0]) for outcome in replay.outcomes)
    inside = {edge for edge in edges if least < edge <= largest} | {usual, usual + 1}
    edges = sorted({least, *inside, largest + 1})
    columns = min(len(replay.outcomes), 5)
    rows = -(-len(replay.outcomes) // columns)
    names = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    with style.figure(_WIDTH, 0.5 + 2.4 * rows) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, outcome in zip(grid.flat, replay.outcomes, strict=False):
            counts = outcome.size_counts
            held = np.array([counts[low:high].sum() for low, high in pairwise(edges)])
            places = np.arange(held.size)
            axes.barh(
                places, 100 * held / counts.sum(), 0.8, color=style.colour_of(outcome.arm.name)
            )
            axes.set_yticks(places, names, fontsize=8)
            axes.set_title(outcome.arm.name, fontsize=9)
            axes.set_xlabel("% of groups")
            style.bare(axes, "x")
        for axes in list(grid.flat)[len(replay.outcomes) :]:
            axes.set_visible(False)
        grid[0, 0].set_ylabel("rollouts of a group")
        drawn = style.svg(figure)
    return Figure(
        drawn,
        f"How many rollouts the groups get; the log usually has {usual}.",
        "; ".join(f"{o.arm.name}: largest group {o.largest_group}" for o in replay.outcomes),
    )


def plot_calibration(replay: Replay) -> Figure:
    """Return how often groups became effective, by the chance that was predicted."""
    with style.figure(_WIDTH * 0.62, 4.2) as figure:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=style.INK, alpha=0.4, lw=1)
        for outcome in replay.outcomes:
            bins = outcome.calibration
            some = bins.groups >= 20
            if not some.any():
                continue
            n = bins.groups[some]
            predicted, rate = bins.predicted[some] / n, bins.effective[some] / n
            error = 1.96 * np.sqrt(np.maximum(rate * (1 - rate), 0.25 / n) / n)
            axes.errorbar(
                100 * predicted,
                100 * rate,
                100 * error,
                color=style.colour_of(outcome.arm.name),
                marker=style.marker_of(outcome.arm.name),
                ms=5,
                lw=1.2,
                label=outcome.arm.name,
            )
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axes.set_xlabel("predicted chance to become effective, %")
        axes.set_ylabel("became effective, %")
        axes.set_title("Calibration")
        axes.legend(loc="upper left", fontsize=8)
        style.bare(axes, "both")
        drawn = style.svg(figure)
    return Figure(
        drawn,
        "Groups still open at a policy's last decision of a step, all of whose rollouts the log "
        "has. Below the line: the policy expected too much.",
        "Points per policy: predicted chance against the share that became effective.",
    )


def plot_bands(replay: Replay) -> Figure:
    """Return who got the rollouts, by how hard the prompts are."""
    sizes = replay.log.group_sizes
    logged = np.bincount(replay.bands, sizes, len(BANDS)).astype(np.float64)
    rows = [("as logged", logged)]
    rows += [(outcome.arm.name, outcome.band_rollouts) for outcome in replay.outcomes]
    with style.figure(_WIDTH, 1.2 + 0.34 * len(rows)) as figure:
        axes = figure.subplots()
        places = np.arange(len(rows))[::-1]
        left = np.zeros(len(rows))
        for band, name in enumerate(BANDS):
            share = np.array([100 * counts[band] / counts.sum() for _, counts in rows])
            axes.barh(places, share, 0.66, left=left, color=style.BANDS[band], label=name)
            left += share
        axes.set_yticks(places, [name for name, _ in rows])
        axes.set(xlim=(0, 100), xlabel="% of rollouts")
        axes.set_title("Who got the rollouts", pad=26)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(BANDS))
        style.bare(axes, "x")
        drawn = style.svg(figure)
    return Figure(
        drawn,
        f"By the prompt's success rate at the step: {BANDS_IN_WORDS}.",
        "; ".join(
            f"{name}: {100 * counts[0] / counts.sum():.0f}% to solved and "
            f"{100 * counts[-1] / counts.sum():.0f}% to unsolved prompts"
            for name, counts in rows
        ),
    )


def _scaled(part: Part, by: float) -> Part:
    return Part(part.measured * by, part.extrapolated * by, part.predicted * by)


def _binned(values: FloatArray) -> FloatArray:
    """Return means of as many consecutive steps each as a plot can show."""
    width = -(-values.size // _MOST_POINTS)
    starts = np.arange(0, values.size, width)
    means: FloatArray = np.add.reduceat(values, starts) / np.diff(np.append(starts, values.size))
    return means

"""The plots of a simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from knapsack_scheduler.lab import style
from knapsack_scheduler.lab.arms import BASELINE
from knapsack_scheduler.lab.intervals import interval
from knapsack_scheduler.lab.measures import (
    ALL,
    GROUP_RATE,
    LATER,
    PREDICTED_GROUP_RATE,
    SIDE_BY_SIDE,
    VALUE,
    Results,
)
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.report import Figure
from knapsack_scheduler.lab.simulate_tables import certainty, difference


def figures(results: Results) -> list[Figure]:
    """Return the plots of one scenario."""
    return [_value(results), _side_by_side(results), _budget(results), _calibration(results)]


def overview(all_results: Sequence[Results]) -> Figure:
    """Return value against uniform of every scenario and arm in one plot."""
    arms = [arm.name for arm in all_results[0].arms if arm.name != BASELINE]
    count = len(all_results)
    with style.figure(9.0, 1.2 + 0.28 * count) as figure:
        axes = figure.add_subplot()
        for arm in arms:
            found = [r.against_uniform(arm, VALUE, _last(r)) for r in all_results]
            axes.errorbar(
                [d.mean for d in found],
                np.arange(count),
                xerr=[d.half or 0.0 for d in found],
                fmt=style.marker_of(arm),
                color=style.colour_of(arm),
                label=arm,
                markersize=6,
                linewidth=1.2,
                linestyle="none",
            )
        axes.axvline(0.0, color=style.INK, linewidth=0.8)
        axes.set_yticks(range(count), [style.label(r.scenario.name) for r in all_results])
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_xlabel("value against uniform after the first epoch, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        style.bare(axes, "both")
        return Figure(
            style.svg(figure),
            f"Value against uniform, one line per scenario "
            f"({certainty(len(all_results[0].seeds))}).",
            f"Points per scenario and arm: value against uniform, for {', '.join(arms)}.",
        )


def _value(results: Results) -> Figure:
    with style.figure(10.0, 3.6) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        _differences(left, results)
        _curves(right, results)
        said = ", ".join(
            f"{arm.name} {difference(results, arm.name, _last(results))} %"
            for arm in results.arms
            if arm.name != BASELINE
        )
        return Figure(
            style.svg(figure),
            f"Left: value against uniform in the {_last(results)}; bars are the intervals "
            f"({certainty(len(results.seeds))}), small points are seeds. Right: value of a step "
            "by epoch, mean over seeds.",
            f"Value against uniform: {said}. Beside it, value by epoch.",
        )


def _differences(axes: Axes, results: Results) -> None:
    arms = [arm.name for arm in results.arms if arm.name != BASELINE]
    for at, arm in enumerate(arms):
        found = results.against_uniform(arm, VALUE, _last(results))
        colour = style.colour_of(arm)
        axes.plot(found.values, [at + 0.22] * len(found.values), ".", color=colour, markersize=4)
        axes.errorbar(
            found.mean,
            at,
            xerr=found.half,
            fmt=style.marker_of(arm),
            color=colour,
            markersize=7,
            capsize=4,
        )
    axes.axvline(0.0, color=style.INK, linewidth=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("%")
    axes.set_title("Value against uniform")
    style.bare(axes, "x")


def _curves(axes: Axes, results: Results) -> None:
    epochs = np.arange(1, results.scenario.run.epochs + 1)
    for arm in results.arms:
        axes.plot(
            epochs,
            results.per_epoch(arm.name, VALUE).mean(axis=0),
            marker=style.marker_of(arm.name),
            color=style.colour_of(arm.name),
            label=arm.name,
            markersize=5,
            linewidth=1.5,
        )
    axes.set_xticks(epochs if epochs.size <= 12 else epochs[:: -(-epochs.size // 12)])
    axes.set_xlabel("epoch")
    axes.set_title("Value of a step")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    style.bare(axes)


def _side_by_side(results: Results) -> Figure:
    with style.figure(10.0, 2.7) as figure:
        panels = figure.subplots(1, len(SIDE_BY_SIDE), sharey=True)
        arms = [arm.name for arm in results.arms]
        for axes, measure in zip(panels, SIDE_BY_SIDE, strict=True):
            found = [results.level(arm, measure) for arm in arms]
            scale = 1.0 if measure is VALUE else 100.0
            axes.barh(
                range(len(arms)),
                [scale * f.mean for f in found],
                color=[style.colour_of(arm) for arm in arms],
                height=0.7,
            )
            uniform = scale * results.level(BASELINE, measure).mean
            axes.axvline(uniform, color=style.INK, linewidth=0.8, linestyle=":")
            axes.set_yticks(range(len(arms)), arms)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.set_title(measure.name.capitalize())
            axes.set_xlabel("a step" if measure is VALUE else "%")
            style.bare(axes, "x")
        return Figure(
            style.svg(figure),
            "The three measures side by side, all epochs; the dotted line is uniform. A rule can "
            "win any one of them by losing the others.",
            "; ".join(
                f"{m.name}: " + ", ".join(f"{arm} {results.level(arm, m).mean:.3g}" for arm in arms)
                for m in SIDE_BY_SIDE
            ),
        )


def _budget(results: Results) -> Figure:
    with style.figure(10.0, 2.9) as figure:
        axes = figure.add_subplot()
        arms = [arm.name for arm in results.arms]
        shares = np.array([results.band_shares(arm) for arm in arms])
        begin = np.zeros(len(arms))
        for band, name in enumerate(BANDS):
            width = 100.0 * shares[:, band]
            axes.barh(range(len(arms)), width, left=begin, color=style.BANDS[band], label=name)
            for at, (start, share) in enumerate(zip(begin, width, strict=True)):
                if share >= 4.0:
                    axes.text(
                        start + share / 2,
                        at,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        color="#ffffff" if band in (0, 4) else "#101010",
                    )
            begin += width
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of all rollouts")
        axes.set_title("Who got the budget")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.tick_params(length=3)
        return Figure(
            style.svg(figure),
            "Share of the rollouts by the true success rate of the prompt at the time.",
            "Shares of the budget, see the table: from solved to unsolved prompts, per arm.",
        )


def _calibration(results: Results) -> Figure:
    with style.figure(6.6, 3.8) as figure:
        axes = figure.add_subplot()
        lowest, highest = 100.0, 0.0
        for arm in results.arms:
            predicted = 100.0 * results.per_epoch(arm.name, PREDICTED_GROUP_RATE).ravel()
            realised = 100.0 * results.per_epoch(arm.name, GROUP_RATE).ravel()
            lowest = min(lowest, float(predicted.min()), float(realised.min()))
            highest = max(highest, float(predicted.max()), float(realised.max()))
            axes.plot(
                predicted,
                realised,
                style.marker_of(arm.name),
                color=style.colour_of(arm.name),
                label=arm.name,
                markersize=5,
                alpha=0.75,
            )
        axes.plot([lowest, highest], [lowest, highest], color=style.INK, linewidth=0.8)
        axes.set_xlabel("predicted effective groups, %")
        axes.set_ylabel("realised, %")
        axes.set_title("Calibration")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        style.bare(axes, "both")
        off = ", ".join(
            f"{arm.name} {100 * _off(results, arm.name):+.1f} points" for arm in results.arms
        )
        return Figure(
            style.svg(figure),
            "Predicted and realised effective group rate, a point per seed and epoch; on the line "
            "they are the same. Points below the line were promised too much.",
            f"Predicted less realised effective group rate: {off}.",
        )


def _off(results: Results, arm: str) -> float:
    predicted = results.per_epoch(arm, PREDICTED_GROUP_RATE)
    return interval((predicted - results.per_epoch(arm, GROUP_RATE)).ravel().tolist()).mean


def _last(results: Results) -> str:
    return LATER if LATER in results.windows else ALL

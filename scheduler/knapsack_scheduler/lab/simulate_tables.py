"""What a simulation found, as tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from knapsack_scheduler.lab.arms import BASELINE, ORACLE
from knapsack_scheduler.lab.intervals import LEVEL, Interval
from knapsack_scheduler.lab.measures import (
    ALL,
    GROUP_RATE,
    LATER,
    PREDICTED_GROUP_RATE,
    PREDICTED_ROLLOUT_RATE,
    PREDICTED_VALUE,
    ROLLOUT_RATE,
    SUCCESS,
    TOKENS,
    VALUE,
    Results,
    verdict,
)
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.report import Table

LEGEND = (
    "groups, rollouts: share of groups, and of rollouts, whose rewards differ. value: what "
    "effective groups teach, per step. vs uniform: difference of value in %, of all epochs, the "
    "first, and the later ones"
)
"""Under the table on the terminal; goes on with ``certainty``."""

_NONE = "-"

_FEW = 0.5
"""Effective group rate of uniform below which knowing the success rates is worth most."""


def heading(results: Results) -> str:
    """Return what was simulated, in a line."""
    run = results.scenario.run
    return (
        f"{run.prompts:,} prompts, {run.prompts_per_step:,} a step, {_count(run.epochs, 'epoch')}, "
        f"{run.total_rollouts:,} rollouts a step ({run.min_rollouts} to {run.max_rollouts} a "
        f"prompt), objective {results.arms[0].objective}, {_count(len(results.seeds), 'seed')}"
    )


def certainty(seeds: int) -> str:
    """Return how sure the differences are, in a phrase."""
    if seeds == 1:
        return "one seed, so no interval"
    return f"± {LEVEL:.0%} interval of the mean, paired over {seeds} seeds"


def main_table(results: Results) -> Table:
    """Return one line per arm: the three measures side by side, and value against uniform."""
    later = LATER in results.windows
    heads = ["arm", "groups", "rollouts", "value", "vs uniform"]
    heads += ["1st epoch", "later"] if later else []
    heads += ["largest"] + (["success"] if results.scenario.learns else [])
    rows = []
    for arm in results.arms:
        row = [
            arm.name,
            _share(results.level(arm.name, GROUP_RATE).mean),
            _share(results.level(arm.name, ROLLOUT_RATE).mean),
            _three_digits(results.level(arm.name, VALUE).mean),
        ]
        for window in results.windows:
            row.append(difference(results, arm.name, window))
        row.append(str(results.largest_group(arm.name)))
        if results.scenario.learns:
            row.append(_share(results.level(arm.name, SUCCESS).mean))
        rows.append(row)
    learns = "; mean success rate at the end" if results.scenario.learns else ""
    caption = (
        f"{heading(results)}. Effective groups and effective rollouts, value per step, and the "
        "difference of value from uniform in %: of all epochs, the first, and the later ones "
        f"({_sure(results)}); rollouts of the largest group{learns}."
    )
    return Table(heads, rows, caption)


def difference(results: Results, arm: str, window: str) -> str:
    """Return the difference of value from uniform as text."""
    return _NONE if arm == BASELINE else _signed(results.against_uniform(arm, VALUE, window))


def difference_table(results: Results) -> Table:
    """Return the differences of all measures from uniform, with their intervals."""
    measures = [GROUP_RATE, ROLLOUT_RATE, VALUE]
    measures += [SUCCESS] if results.scenario.learns else []
    measures += [TOKENS] if any(band.completion_tokens for band in results.scenario.band) else []
    heads = ["arm", *(f"{m.name}, {'%' if m.relative else 'points'}" for m in measures)]
    rows = [
        [arm.name, *(_signed(results.against_uniform(arm.name, m)) for m in measures)]
        for arm in results.arms
        if arm.name != BASELINE
    ]
    return Table(heads, rows, f"Differences from uniform, all epochs ({_sure(results)}).")


def band_table(results: Results) -> Table:
    """Return who got the budget: share of rollouts and size of groups by band."""
    heads = ["arm", *BANDS, *(f"{band}, size" for band in BANDS)]
    rows = [
        [
            arm.name,
            *(_share(s) for s in results.band_shares(arm.name)),
            *(_NONE if math.isnan(s) else f"{s:.1f}" for s in results.band_sizes(arm.name)),
        ]
        for arm in results.arms
    ]
    return Table(
        heads,
        rows,
        "Who got the budget, by true success rate at the time (solved: 0.98 and above, easy: "
        "from 0.75, medium: from 0.25, hard: from 0.02, unsolved: below): share of all rollouts, "
        "and mean rollouts of a group.",
    )


def calibration_table(results: Results) -> Table:
    """Return what decisions promised and what came."""
    pairs = (
        (PREDICTED_GROUP_RATE, GROUP_RATE),
        (PREDICTED_ROLLOUT_RATE, ROLLOUT_RATE),
        (PREDICTED_VALUE, VALUE),
    )
    heads = ["arm"]
    for _, real in pairs:
        heads += [f"{real.name}: predicted", "realised"]
    rows = []
    for arm in results.arms:
        row = [arm.name]
        for predicted, real in pairs:
            shown = _three_digits if real is VALUE else _share
            row += [shown(results.level(arm.name, m).mean) for m in (predicted, real)]
        rows.append(row)
    return Table(
        heads,
        rows,
        "Calibration: what the decision of a step's last wave expected of its groups, and what "
        "came out. The oracle knows the success rates, so it is off by luck only.",
    )


def overview_table(all_results: Sequence[Results]) -> Table:
    """Return value against uniform of every scenario and arm."""
    arms = [arm.name for arm in all_results[0].arms if arm.name != BASELINE]
    rows = []
    for results in all_results:
        window = _window(results)
        rows.append(
            [results.scenario.name, *(difference(results, arm, window) for arm in arms)],
        )
    return Table(
        ["scenario", *arms],
        rows,
        f"Value against uniform after the first epoch, % ({_sure(all_results[0])}).",
    )


def against_oracle(all_results: Sequence[Results]) -> list[str]:
    """Return in sentences on how many scenarios each arm is worth what the oracle is.

    Where few groups of uniform are effective, only the oracle can tell which prompts are
    worth the rollouts before they are spent, so that those scenarios are also counted alone.
    """
    if ORACLE not in {arm.name for arm in all_results[0].arms}:
        return []
    hard = [r for r in all_results if r.level(BASELINE, GROUP_RATE, _window(r)).mean < _FEW]
    said = [f"Worth at least what the oracle is, {_reached(all_results)}."]
    if 0 < len(hard) < len(all_results):
        said.append(
            f"Where less than {_FEW:.0%} of uniform's groups are effective, {_reached(hard)}."
        )
    return said


def _reached(all_results: Sequence[Results]) -> str:
    counts = []
    for arm in all_results[0].arms:
        if arm.name in (BASELINE, ORACLE):
            continue
        gains = [
            [r.against_uniform(name, VALUE, _window(r)).mean for name in (arm.name, ORACLE)]
            for r in all_results
        ]
        counts.append(f"{arm.name} {sum(mine >= best for mine, best in gains)}")
    return f"of {_count(len(all_results), 'scenario')}: {', '.join(counts)}"


def _window(results: Results) -> str:
    """Return the steps that scenarios are compared over: after the first epoch if there are."""
    return LATER if LATER in results.windows else ALL


def verdicts(results: Results) -> list[str]:
    """Return a sentence per arm on what it wins and loses."""
    return [verdict(results, arm.name) for arm in results.arms if arm.name != BASELINE]


def _sure(results: Results) -> str:
    return certainty(len(results.seeds))


def _signed(difference: Interval) -> str:
    if math.isnan(difference.mean):
        return _NONE
    half = "" if difference.half is None else f"±{difference.half:.1f}"
    return f"{difference.mean:+.1f}{half}"


def _share(share: float) -> str:
    return _NONE if math.isnan(share) else f"{100 * share:.1f}%"


def _three_digits(value: float) -> str:
    digits = math.floor(math.log10(value)) if value > 0.0 else 0
    return f"{value:,.{min(max(2 - digits, 0), 6)}f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

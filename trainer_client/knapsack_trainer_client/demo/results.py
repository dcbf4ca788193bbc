"""What the arms did -> the table, the sentence and the file of results."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapsack_trainer_client.demo.train import Evaluation, History, StepOutcome

BASELINE = "uniform"


@dataclass(frozen=True, slots=True)
class Measures:
    """One arm with one seed.

    Attributes:
        exact: held-out accuracy at the end, as ``Evaluation.exact``.
        greedy: the same of the most probable response.
        effective_group_rate: share of groups, over all steps, that have both a success and
            a failure.
        effective_rollout_rate: share of rollouts that lie in such groups.
        largest_group: rollouts of the largest group.
        rollouts: generated in all.
        rollouts_to_baseline: how many it took to reach the baseline's final exact
            accuracy, interpolated between evaluations; None if it never did.
        fallback_waves: waves that were uniform because the scheduler did not answer.
    """

    exact: float
    greedy: float
    effective_group_rate: float
    effective_rollout_rate: float
    largest_group: int
    rollouts: int
    rollouts_to_baseline: float | None
    fallback_waves: int


def measure(history: History, baseline: History) -> Measures:
    """Return the measures of a history next to the baseline's of the same seed."""
    groups = [
        (n, successes)
        for step in history.steps
        for n, successes in zip(step.num_rollouts, step.num_successes, strict=True)
    ]
    effective = [n for n, successes in groups if 0 < successes < n]
    rollouts = sum(n for n, _ in groups)
    last = history.evaluations[-1]
    return Measures(
        last.exact,
        last.greedy,
        len(effective) / len(groups),
        sum(effective) / rollouts,
        max(n for n, _ in groups),
        rollouts,
        rollouts_to_reach(history.evaluations, baseline.evaluations[-1].exact),
        sum(step.fallback_waves for step in history.steps),
    )


def rollouts_to_reach(evaluations: Sequence[Evaluation], accuracy: float) -> float | None:
    """Return when the curve first reaches an accuracy, on straight lines between points."""
    before = evaluations[0]
    if before.exact >= accuracy:
        return float(before.rollouts)
    for after in evaluations[1:]:
        if after.exact >= accuracy:
            share = (accuracy - before.exact) / (after.exact - before.exact)
            return before.rollouts + share * (after.rollouts - before.rollouts)
        before = after
    return None


def table(arms: Mapping[str, Sequence[Measures]]) -> list[tuple[str, ...]]:
    """Return rows of texts: a head, then a row per measure with a column per arm.

    Each arm has one measure per seed; several give mean ± standard deviation.
    """
    base = arms[BASELINE]
    columns = [
        (
            name,
            _spread([m.exact for m in seeds], ".3f"),
            "" if name == BASELINE else _spread(_ahead(seeds, base), "+.3f"),
            _spread([m.greedy for m in seeds], ".3f"),
            _spread([m.effective_group_rate for m in seeds], ".3f"),
            _spread([m.effective_rollout_rate for m in seeds], ".3f"),
            str(max(m.largest_group for m in seeds)),
            _reached(seeds),
        )
        for name, seeds in arms.items()
    ]
    heads = (
        "",
        "held-out accuracy",
        "  against uniform, same seed",
        "  most probable response",
        "effective group rate",
        "effective rollout rate",
        "largest group",
        "rollouts to uniform's accuracy",
    )
    return list(zip(heads, *columns, strict=True))


def findings(arms: Mapping[str, Sequence[Measures]]) -> list[str]:
    """Return one sentence per arm that is not the baseline, for or against it."""
    base = arms[BASELINE]
    return [_finding(name, seeds, base) for name, seeds in arms.items() if name != BASELINE]


def _finding(name: str, seeds: Sequence[Measures], base: Sequence[Measures]) -> str:
    ahead = _ahead(seeds, base)
    points = 100 * statistics.fmean(ahead)
    where = "above" if points > 0 else "below"
    text = (
        f"{name}: after {seeds[0].rollouts:,} rollouts it is {abs(points):.1f} points {where} "
        f"uniform in held-out accuracy"
    )
    if len(seeds) > 1:
        better = sum(a > 0 for a in ahead)
        text += f" on the mean of {len(seeds)} seeds (above in {better} of {len(seeds)})"
    reached = [m.rollouts_to_baseline for m in seeds if m.rollouts_to_baseline is not None]
    if len(reached) == len(seeds):
        after = statistics.fmean(reached)
        text += f"; it reached uniform's final accuracy after {after:,.0f}"
    elif reached:
        text += f"; it reached uniform's final accuracy in {len(reached)} of {len(seeds)}"
    else:
        text += "; it did not reach uniform's final accuracy"
    return text + "."


def write(path: Path, settings: Mapping[str, Any], runs: Mapping[str, Sequence[History]]) -> None:
    """Write settings and all that happened as JSON, for plots of one's own."""
    content = {
        "settings": dict(settings),
        "arms": {
            name: [dataclasses.asdict(history) for history in seeds] for name, seeds in runs.items()
        },
    }
    path.write_text(json.dumps(content))


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[History]]]:
    """Return the settings and histories that ``write`` wrote."""
    content = json.loads(path.read_text())
    return content["settings"], {
        name: [
            History(
                [StepOutcome(**step) for step in history["steps"]],
                [Evaluation(**evaluation) for evaluation in history["evaluations"]],
            )
            for history in seeds
        ]
        for name, seeds in content["arms"].items()
    }


def _ahead(seeds: Sequence[Measures], base: Sequence[Measures]) -> list[float]:
    return [m.exact - b.exact for m, b in zip(seeds, base, strict=True)]


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _reached(seeds: Sequence[Measures]) -> str:
    reached = [m.rollouts_to_baseline for m in seeds if m.rollouts_to_baseline is not None]
    if not reached:
        return "not reached"
    text = f"{statistics.fmean(reached):,.0f}"
    return text if len(reached) == len(seeds) else f"{text} ({len(reached)} of {len(seeds)})"

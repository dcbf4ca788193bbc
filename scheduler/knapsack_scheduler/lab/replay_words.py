"""A replay in words and tables, for the terminal and the report alike: the answer first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.lab.arms import BASELINE
from knapsack_scheduler.lab.population import BAND_EDGES, BANDS
from knapsack_scheduler.lab.replay_outcome import (
    FEWEST_BLOCKS,
    ArmOutcome,
    Column,
    Figure,
    Replay,
    relative_gain,
)
from knapsack_scheduler.lab.report import Table
from knapsack_scheduler.lab.waste import Waste

MOST_EXTRAPOLATED = 1 / 3
"""Share of a figure beyond which the log cannot support it."""

_NEARLY_NOTHING = 0.02

_SAME = 0.0005
"""Relative gain that the output shows as none."""

_UNSOLVED, _HARD, _MEDIUM, _SOLVED = (f"{edge:.0%}" for edge in BAND_EDGES)
BANDS_IN_WORDS = (
    f"solved from {_SOLVED}, easy from {_MEDIUM}, medium from {_HARD}, hard from {_UNSOLVED}, "
    "unsolved below"
)

_SURPRISE = 3.0
"""Standard errors beyond which the extrapolation is off by more than chance."""


@dataclass(frozen=True, slots=True)
class Words:
    """What to say of a replay.

    Attributes:
        log: what was read, in a sentence.
        answer: the answer, in two or three sentences, each a paragraph.
        support: how far the log can support it.
        limits: what no replay can tell.
    """

    log: str
    answer: list[str]
    support: list[str]
    limits: list[str]


def in_words(replay: Replay, waste: Waste, budget_share: float, half: Replay | None) -> Words:
    """Return what to say of a replay.

    Args:
        replay: with the arms that were asked for.
        waste: of the log.
        budget_share: that it was made with.
        half: a replay of the baseline and the best arm with half of the rollouts.
    """
    return Words(
        _log_sentence(replay),
        [
            _waste_sentence(waste),
            *_best_sentences(replay, budget_share),
            *_half_sentence(half),
        ],
        _support_sentences(replay, budget_share),
        [
            "A replay cannot tell what the training would have become: other rollouts make "
            "another policy, whose rewards are in no log. It says what the same prompts, at "
            "the success rates they had, would have given each way of dividing. Nor does it "
            "count the time that a step waits for the rewards of a wave.",
        ],
    )


def unsupported_share(outcome: ArmOutcome) -> float:
    """Return the share of an arm's weakest figure that is extrapolated, 0..1."""
    figures = (outcome.effective_group_rate, outcome.effective_rollout_rate, outcome.value)
    return max(figure.unsupported for figure in figures)


def answer_table(replay: Replay) -> Table:
    """Return the arms side by side."""
    baseline = replay.outcome(BASELINE)
    rows = [
        [
            outcome.arm.name,
            _percent(outcome.effective_group_rate.total),
            _percent(outcome.effective_rollout_rate.total),
            _gain(outcome, baseline),
            _percent(outcome.beyond_log),
            _percent(unsupported_share(outcome)),
            f"{outcome.largest_group:,}",
            *_tokens(replay, outcome),
        ]
        for outcome in replay.outcomes
    ]
    effective, sizes = replay.log.effective, replay.log.group_sizes
    logged = [
        "as logged",
        _percent(effective.mean()),
        _percent(sizes[effective].sum() / sizes.sum()),
        "",
        "",
        "",
        f"{sizes.max():,}",
    ]
    if replay.log.tokens is not None:
        logged.append("")
    heads = ["policy", "groups", "rollouts", "value", "not logged", "extrapolated", "largest"]
    heads += ["tokens"] if replay.log.tokens is not None else []
    caption = (
        "Effective groups and the rollouts in them, value against uniform with a 95% interval; "
        "how many of the rollouts the log does not have, and how much of the arm's weakest "
        "figure is extrapolated for them; the largest group"
    )
    caption += "; expected tokens against uniform's." if replay.log.tokens is not None else "."
    return Table(heads, [logged, *rows], caption)


def parts_table(replay: Replay) -> Table:
    """Return what is measured of every figure, what is extrapolated, what was predicted."""
    rows = []
    for outcome in replay.outcomes:
        groups, rollouts = outcome.effective_group_rate, outcome.effective_rollout_rate
        rows.append(
            [
                outcome.arm.name,
                *_parts(groups, _percent),
                *_parts(rollouts, _percent),
                *_parts(outcome.value, _amount),
            ]
        )
        if outcome.arm.objective != replay.valued:
            rows[-1][-1] = "-"
    heads = ["policy"]
    for name in ("groups", "rollouts", "value"):
        heads += [name, "+", "predicted"]
    return Table(
        heads,
        rows,
        "Effective groups, effective rollouts and value: measured, + extrapolated, and what the "
        f"policy's own last decision of each step expected. Value is {replay.valued!r}.",
    )


def bands_table(replay: Replay) -> Table:
    """Return who got the rollouts, by how hard the prompts are."""
    groups = np.bincount(replay.bands, minlength=len(BANDS))
    sizes = np.bincount(replay.bands, replay.log.group_sizes, len(BANDS))
    effective = np.bincount(replay.bands, replay.log.effective, len(BANDS))
    rows = [
        [
            band,
            f"{groups[at]:,}",
            _percent(effective[at] / groups[at]) if groups[at] else "-",
            _mean(sizes[at], groups[at]),
            *(_mean(outcome.band_rollouts[at], groups[at]) for outcome in replay.outcomes),
        ]
        for at, band in enumerate(BANDS)
    ]
    once = ~replay.hindsight.revisits
    if once.any():
        rows.append(
            [
                "(seen once)",
                f"{np.count_nonzero(once):,}",
                _percent(replay.log.effective[once].mean()),
                _mean(float(replay.log.group_sizes[once].sum()), int(once.sum())),
                *("" for _ in replay.outcomes),
            ]
        )
    names = [short_name(outcome.arm.name) for outcome in replay.outcomes]
    return Table(
        ["prompts", "groups", "effective", "logged", *names],
        rows,
        f"Mean rollouts of a group by the prompt's success rate at the step ({BANDS_IN_WORDS})"
        f"{'; those seen once are among them.' if once.any() else '.'}",
    )


def short_name(arm: str) -> str:
    """Return the name of an arm fit for the head of a narrow column."""
    return arm.replace("posterior-", "").replace("-waves", " waves")


def _log_sentence(replay: Replay) -> str:
    log = replay.log
    sizes = log.group_sizes
    usual = int(np.median(sizes))
    again = log.group_prompt.size - len(np.unique(log.group_prompt))
    return (
        f"{_count(log.rewards.size, 'rollout')} in {_count(sizes.size, 'group')} (usually of "
        f"{usual}) of {_count(len(log.prompt_ids), 'prompt')}, in "
        f"{_count(log.steps.size, 'step')} from {log.steps[0]} to {log.steps[-1]}; "
        f"{_percent(again / sizes.size)} of the groups are of a prompt seen in an earlier step."
    )


def _waste_sentence(waste: Waste) -> str:
    text = (
        f"{_percent(waste.share)} of your rollouts ({waste.wasted_rollouts:,} of "
        f"{waste.rollouts:,}) lay in groups with equal rewards, which teach nothing: "
        f"{_percent(waste.failed_rollouts / waste.rollouts)} in groups that all failed, "
        f"{_percent(waste.passed_rollouts / waste.rollouts)} in groups that all passed."
    )
    if waste.tokens:
        share = _percent(waste.wasted_tokens / waste.tokens)
        text += f" They were {share} of the tokens."
    return text


def best_of(replay: Replay) -> ArmOutcome | None:
    """Return the outcome with the most value beside the baseline's, None if there is none.

    A policy that the log can judge goes before one that it cannot.
    """
    others = [one for one in replay.outcomes if one.arm.name != BASELINE]
    return max(
        others,
        key=lambda one: (unsupported_share(one) <= MOST_EXTRAPOLATED, one.value.total),
        default=None,
    )


def _best_sentences(replay: Replay, budget_share: float) -> list[str]:
    baseline, best = replay.outcome(BASELINE), best_of(replay)
    if baseline is None or best is None or baseline.value.total <= 0.0:
        return []
    gain, error = relative_gain(best, baseline)
    spent = "the same rollouts" if budget_share == 1.0 else f"{_percent(budget_share)} of them"
    if abs(gain) < _SAME:
        return [f"With {spent}, no policy differs from uniform in value."]
    if error is not None and abs(gain) <= error:
        return [
            f"With {spent}, no policy is told apart from uniform in value: the best is "
            f"{best.arm.name} at {_signed(gain)} ± {100 * error:.1f}."
        ]
    less = "less" if gain < 0.0 else "more"
    within = "" if error is None else f" (± {100 * error:.1f})"
    groups, level_groups = best.effective_group_rate, baseline.effective_group_rate
    rollouts, level_rollouts = best.effective_rollout_rate, baseline.effective_rollout_rate
    return [
        f"With {spent}, {best.arm.name} would have had {_percent(abs(gain))}{within} {less} "
        f"value than uniform: {_percent(groups.total)} effective groups instead of "
        f"{_percent(level_groups.total)}, with {_percent(rollouts.total)} of the rollouts in "
        f"them instead of {_percent(level_rollouts.total)}.",
        _measured_sentence(best, baseline, gain),
    ]


def _measured_sentence(best: ArmOutcome, baseline: ArmOutcome, gain: float) -> str:
    """Say how much of a gain is there without extrapolation."""
    if best.value.extrapolated < _NEARLY_NOTHING * abs(gain) * baseline.value.total:
        return "All of this is measured."
    measured = best.value.measured / baseline.value.total - 1.0
    rests = " The lead rests on what is extrapolated." if measured < gain / 2 else ""
    return (
        f"Of these {_signed(gain)}, {_signed(measured)} is measured, and the rest extrapolated "
        f"for the {_percent(best.beyond_log)} of its rollouts that go beyond the log's groups."
        f"{rests}"
    )


def _half_sentence(half: Replay | None) -> list[str]:
    """Say how the best arm does where the log has nearly all of what it would generate."""
    if half is None:
        return []
    baseline, best = half.outcome(BASELINE), best_of(half)
    if baseline is None or best is None or baseline.value.total <= 0.0:
        return []
    gain, error = relative_gain(best, baseline)
    within = "" if error is None else f" (± {100 * error:.1f})"
    measured = best.value.measured / baseline.value.total - 1.0
    return [
        f"With half of the rollouts, the log has all but {_percent(best.beyond_log)} of what "
        f"{best.arm.name} would generate: it is then at {_signed(gain)}{within} in value against "
        f"uniform with half, {_signed(measured)} measured."
    ]


def _support_sentences(replay: Replay, budget_share: float) -> list[str]:
    log = replay.log
    shares = {one.arm.name: unsupported_share(one) for one in replay.outcomes}
    weak = [name for name, share in shares.items() if share > MOST_EXTRAPOLATED]
    worst = max(shares, key=shares.__getitem__)
    if weak:
        sentences = [
            f"The log cannot support the figures of {', '.join(weak)}: more than a third of one "
            "of them is extrapolated. What could: a log with larger groups, `knapsack-rl "
            f"simulate`, or a run of its own.{_smaller_budget(budget_share)}"
        ]
    elif shares[worst] > _NEARLY_NOTHING:
        sentences = [
            f"At most {_percent(shares[worst])} of a figure is extrapolated ({worst}). A lead "
            "over uniform smaller than that may still rest on it."
            f"{_smaller_budget(budget_share)}"
        ]
    elif _extrapolates_well(replay):
        sentences = ["The log supports all figures: next to nothing is extrapolated."]
    else:
        sentences = ["Next to nothing is extrapolated."]
    sentences += _check_sentence(replay)
    if not replay.hindsight.revisits.any():
        sentences.append(
            "No prompt is seen twice, so statistics have nothing to go by: only waves can differ "
            "from uniform, and what is extrapolated rests on the other prompts alone."
        )
    if log.steps.size < FEWEST_BLOCKS:
        sentences.append(f"Intervals need {FEWEST_BLOCKS} steps; there are {log.steps.size}.")
    if replay.widened_steps:
        sentences.append(
            f"In {replay.widened_steps:,} steps the bounds of a group could not hold the budget "
            "and were widened."
        )
    return sentences


def _extrapolates_well(replay: Replay) -> bool:
    """Return whether what the log can tell of the extrapolation speaks for it."""
    check = replay.check
    off = abs(check.predicted - check.effective)
    return bool(off <= _SURPRISE * max(check.variance, 1.0) ** 0.5)


def _check_sentence(replay: Replay) -> list[str]:
    """Say how the extrapolation does where the log can tell."""
    check = replay.check
    if check.groups == 0:
        return []
    off = abs(check.predicted - check.effective)
    verdict = "no more apart than by chance"
    if not _extrapolates_well(replay):
        verdict = (
            f"off by {_percent(off / max(check.effective, 1))}, more than by chance, so do not "
            "rely on what is extrapolated (it counts groups with rewards on both sides of the "
            "success threshold only, and takes success rates to drift steadily)"
        )
    return [
        f"The extrapolation, tried on the log: of {check.groups:,} half groups with equal rewards "
        f"it expected {check.predicted:,.0f} to become effective with their other half, and "
        f"{check.effective:,} did: {verdict}. Beyond the log's group size it cannot be tried."
    ]


def _smaller_budget(budget_share: float) -> str:
    if budget_share < 1.0:
        return ""
    return (
        " With --budget-share 0.5 all policies are compared at half the budget, where the log "
        "has most of what they would generate."
    )


def _gain(outcome: ArmOutcome, baseline: ArmOutcome | None) -> str:
    if baseline is None or baseline.value.total <= 0.0:
        return "-"
    if outcome is baseline:
        return "0%"
    gain, error = relative_gain(outcome, baseline)
    return _signed(gain) if error is None else f"{_signed(gain)} ± {100 * error:.1f}"


def _tokens(replay: Replay, outcome: ArmOutcome) -> list[str]:
    baseline = replay.outcome(BASELINE)
    if replay.log.tokens is None:
        return []
    if baseline is None or outcome is baseline:
        return ["0%" if baseline is not None else "-"]
    level = max(baseline.sum_of(Column.TOKENS), 1.0)
    return [_signed(outcome.sum_of(Column.TOKENS) / level - 1.0)]


def _parts(figure: Figure, shown: Callable[[float], str]) -> list[str]:
    return [shown(figure.measured), shown(figure.extrapolated), shown(figure.predicted)]


def _mean(total: float, count: float) -> str:
    return f"{total / count:.1f}" if count else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%"


def _amount(value: float) -> str:
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0
    return f"{value:,.{digits}f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

"""What is odd about a log, above all what makes a replay of it worthless, in sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.lab.outcome_log import OutcomeLog

_UID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MOST_LEVELS = 1000
_LOOKED_AT = 1000


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence on the log.

    Attributes:
        text: the sentence.
        serious: figures mean little while it holds.
    """

    text: str
    serious: bool = False


def check_log(log: OutcomeLog, success_threshold: float) -> list[Remark]:
    """Return what is to be said of a log before its figures, the serious remarks first."""
    remarks = [
        *_prompt_remarks(log),
        *_size_remarks(log),
        *_reward_remarks(log, success_threshold),
    ]
    return sorted(remarks, key=lambda remark: not remark.serious)


def _prompt_remarks(log: OutcomeLog) -> list[Remark]:
    prompts, steps, groups = len(log.prompt_ids), log.steps.size, log.group_prompt.size
    if prompts == 1 and log.rewards.size > 1:
        return [
            Remark(
                f"Every rollout has the same prompt id, {_shown(log.prompt_ids[0])}: the column "
                "does not tell prompts apart. Name another one with --prompt-column.",
                serious=True,
            )
        ]
    counts = np.bincount(log.group_prompt, minlength=prompts)
    if steps > 1 and prompts > 1 and bool((counts == steps).all()) and _are_places(log):
        return [
            Remark(
                f"Every step has the same {prompts:,} prompt ids, the numbers from "
                f"{_least(log)}: that looks like a place in the batch, which is another prompt "
                "in each step. Statistics of it mean nothing.",
                serious=True,
            )
        ]
    if steps > 1 and groups == prompts:
        if _are_uids(log):
            return [
                Remark(
                    "Every step has new prompt ids, and they look like random ones, such as "
                    f"{_shown(log.prompt_ids[0])}: an id made anew for each step never comes "
                    "back, so no policy can learn from it, here or in the service. Use the "
                    "data set's own id, or the prompt's text.",
                    serious=True,
                )
            ]
        return [
            Remark(
                f"No prompt comes back: {prompts:,} ids in {steps:,} steps. Either this is less "
                "than one epoch, and only waves can know more than uniform; or the ids are made "
                "anew for each step, and then no policy can ever learn from them: use ids that "
                "are the same in every epoch."
            )
        ]
    return []


def _size_remarks(log: OutcomeLog) -> list[Remark]:
    remarks = []
    sizes = log.group_sizes
    usual = int(np.median(sizes))
    if log.missing:
        remarks.append(
            Remark(
                f"{log.missing:,} rollouts have no reward. They are taken as never finished: "
                "they are no failures, and in none of the figures."
            )
        )
    if usual == 1:
        remarks.append(
            Remark(
                f"{_percent(sizes == 1)} of the groups have one rollout, which has nothing to "
                "differ from. Is the step column the trainer's step, the same for a whole "
                "batch, and the prompt id the same for all rollouts of a prompt?",
                serious=True,
            )
        )
        return remarks
    per_step = np.diff(log.group_rows[log.step_groups])
    twice = per_step >= 1.9 * np.median(per_step)
    if twice.any() and log.steps.size > 2:
        which = log.steps[twice]
        remarks.append(
            Remark(
                f"{which.size:,} of {log.steps.size:,} steps, the first of them {which[0]}, have "
                "twice the usual rollouts or more: was a run that was resumed logged twice "
                "there? Rows are never taken for duplicates."
            )
        )
    double = (sizes >= 2 * usual) & ~np.repeat(twice, np.diff(log.step_groups))
    if double.any():
        remarks.append(
            Remark(
                f"{np.count_nonzero(double):,} groups have {2 * usual} rollouts or more where "
                f"{usual} are usual: a prompt that stands in a step several times is one group "
                "here."
            )
        )
    if np.mean(sizes != usual) > 0.2:
        remarks.append(
            Remark(
                f"Groups have from {sizes.min()} to {sizes.max()} rollouts. If their sizes were "
                "chosen after seeing rewards of the same step (waves, dynamic sampling), the "
                "first n of a group are not what n rollouts would have been, and figures lean "
                "towards the log."
            )
        )
    return remarks


def _reward_remarks(log: OutcomeLog, threshold: float) -> list[Remark]:
    remarks = []
    low, high = float(log.rewards.min()), float(log.rewards.max())
    levels = np.unique(log.rewards[: 10**6])
    count = f"more than {_MOST_LEVELS:,}" if levels.size > _MOST_LEVELS else f"{levels.size:,}"
    if low == high:
        remarks.append(
            Remark(f"Every reward is {low:g}: there is nothing to learn from.", serious=True)
        )
    elif not low <= threshold < high:
        remarks.append(
            Remark(
                f"Rewards are from {low:g} to {high:g}, so with the threshold of {threshold:g} "
                f"{'every' if low > threshold else 'no'} rollout is a success and all prompts "
                "look alike. Choose one in between with --success-threshold.",
                serious=True,
            )
        )
    elif levels.size > 2:
        remarks.append(
            Remark(
                f"There are {count} distinct rewards, from {low:g} to {high:g}. Groups count as "
                f"effective when their rewards differ; success rates are of rewards above "
                f"{threshold:g}. What is extrapolated only counts groups whose rewards would "
                "come to lie on both sides of it, which is too few."
            )
        )
    groups = log.group_prompt.size
    all_differ = groups >= 100 and log.group_sizes.min() > 1 and bool(log.effective.all())
    if all_differ and levels.size > 2:
        remarks.append(
            Remark(
                "Not one group has equal rewards, as is usual where they are this fine: a bonus "
                "for format or length makes groups differ that say nothing of success. Give the "
                "reward without it with --reward-column to see what success alone tells. Unless "
                "groups were filtered out before the log was written: then nothing can be told."
            )
        )
    elif all_differ:
        remarks.append(
            Remark(
                "Not one group has equal rewards: they were filtered out before the log was "
                "written (dynamic sampling). What they cost is not in it, and no policy can be "
                "judged by what is left. Log before the filter.",
                serious=True,
            )
        )
    return remarks


def _are_uids(log: OutcomeLog) -> bool:
    return all(_UID.fullmatch(name) for name in log.prompt_ids[:_LOOKED_AT])


def _are_places(log: OutcomeLog) -> bool:
    """Return whether the ids are consecutive numbers from 0 or 1."""
    if not all(name.isdecimal() and len(name) < 10 for name in log.prompt_ids):
        return False
    numbers = sorted(int(name) for name in log.prompt_ids)
    return numbers[0] in (0, 1) and numbers[-1] - numbers[0] == len(numbers) - 1


def _least(log: OutcomeLog) -> int:
    return min(int(name) for name in log.prompt_ids)


def _percent(which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    return f"{100 * which.mean():.0f}%"


def _shown(name: str) -> str:
    return repr(name if len(name) <= 50 else name[:47] + "...")

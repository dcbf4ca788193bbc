"""A caller's rewards -> columns of finished rollouts.

Rewards come as one sequence per prompt, or flat in the order of the rollouts. Elements
are anything that ``float`` takes. None and NaN stand for a rollout that never finished:
it is missing, not failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from knapsack_trainer_client.arguments import LARGEST_GROUP, LARGEST_REWARD, check_int
from knapsack_trainer_client.errors import refused


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Rewards of finished rollouts as parallel columns.

    Attributes:
        positions: prompts that have any, by position in the batch.
        num_rewards: how many of ``rewards`` belong to each of them.
        rewards: finite float32 numbers, in the order of the prompts.
        completion_tokens: length of each completion; empty if unknown.
    """

    positions: list[int]
    num_rewards: list[int]
    rewards: list[float]
    completion_tokens: list[int]


def check_outcomes(
    rewards: Iterable[Any],
    completion_tokens: Iterable[Any] | None,
    num_rollouts: Sequence[int],
    most_rollouts: Sequence[int],
) -> Outcomes:
    """Return what was rewarded, by prompt; missing rollouts are left out.

    Args:
        rewards: one sequence per prompt, or as many numbers as ``num_rollouts`` sums to.
        completion_tokens: None, or of the shape of ``rewards``; looked at only where
            there is a reward.
        num_rollouts: sizes of the groups in a flat sequence.
        most_rollouts: most rollouts that each prompt may have.

    Raises:
        InvalidRequest: a shape that does not fit, a reward that is infinite or not a
            number, a negative length, or more rewards than rollouts.
    """
    groups = to_groups("rewards", rewards, num_rollouts)
    lengths = None
    if completion_tokens is not None:
        lengths = to_groups("completion_tokens", completion_tokens, num_rollouts)
    outcomes = Outcomes([], [], [], [])
    for position, group in enumerate(groups):
        kept = []
        for index, raw in enumerate(group):
            reward = to_reward(f"rewards[{position}][{index}]", raw)
            if reward is None:
                continue
            kept.append(reward)
            if lengths is not None:
                outcomes.completion_tokens.append(_length(lengths, position, index, len(group)))
        if len(kept) > most_rollouts[position]:
            raise refused(
                f"rewards[{position}]",
                f"{len(kept)} rewards",
                f"must be at most {most_rollouts[position]}, the rollouts allocated",
            )
        if kept:
            outcomes.positions.append(position)
            outcomes.num_rewards.append(len(kept))
            outcomes.rewards.extend(kept)
    return outcomes


def to_groups(name: str, values: Iterable[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Return ``values`` as one list per prompt.

    Raises:
        InvalidRequest: neither one sequence per prompt nor ``sum(sizes)`` numbers.
    """
    rows = to_list(name, values)
    if any(is_sequence(row) for row in rows):
        if len(rows) != len(sizes):
            raise refused(
                name, f"{len(rows)} groups", f"must be one sequence per prompt ({len(sizes)})"
            )
        return [to_list(f"{name}[{i}]", row) for i, row in enumerate(rows)]
    if not rows and len(sizes) == 0:
        return []
    total = sum(sizes)
    if len(rows) != total:
        raise refused(
            name,
            f"{len(rows)} numbers",
            f"must be one sequence per prompt ({len(sizes)}), or {total} numbers in the "
            "order of the rollouts",
        )
    groups, start = [], 0
    for size in sizes:
        groups.append(rows[start : start + size])
        start += size
    return groups


def to_list(name: str, values: Iterable[Any]) -> list[Any]:
    """Return the elements; arrays and tensors become nested lists of Python numbers."""
    tolist = getattr(values, "tolist", None)
    if callable(tolist):
        listed = tolist()
        if isinstance(listed, list):
            return listed
    elif isinstance(values, Iterable) and not isinstance(values, str | bytes | dict):
        return list(values)
    raise refused(name, values, "must be a sequence")


def to_reward(name: str, raw: Any) -> float | None:
    """Return a reward; None where the rollout is missing (None or NaN).

    Raises:
        InvalidRequest: infinite, too large for a float32, or not a number.
    """
    if raw is None:
        return None
    try:
        reward = float(raw)
    except (TypeError, ValueError, OverflowError):
        raise refused(name, raw, "must be a number, or None for a missing rollout") from None
    if math.isnan(reward):
        return None
    if abs(reward) > LARGEST_REWARD:
        raise refused(name, raw, "must be finite and fit into a float32")
    return reward


def is_sequence(value: object) -> bool:
    """Return whether a value stands for several: a 0-dimensional array does not."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def _length(lengths: list[list[Any]], position: int, index: int, size: int) -> int:
    name = f"completion_tokens[{position}]"
    if len(lengths[position]) != size:
        raise refused(
            name, f"{len(lengths[position])} numbers", f"must be as many as rewards ({size})"
        )
    return check_int(f"{name}[{index}]", lengths[position][index], 0, LARGEST_GROUP)

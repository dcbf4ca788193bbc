"""TRL's advantages for groups of any size.

The formulas are those of ``GRPOTrainer`` with ``rewards.view(-1, num_generations)``
replaced by the groups as they are; with equal groups they give TRL's numbers. Computed in
float64, and a group whose rewards are all equal has advantage exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from knapsack_trainer_client.groups import group_advantages

EPSILON = 1e-4
"""TRL adds it to every standard deviation that it divides by."""

ScaleRewards: TypeAlias = Literal["group", "batch", "none"]
Aggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum"]

SCALES: tuple[ScaleRewards, ...] = ("group", "batch", "none")
AGGREGATIONS: tuple[Aggregation, ...] = ("sum_then_normalize", "normalize_then_sum")


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """The rewards of a batch, row by row.

    Attributes:
        by_function: one row per rollout, one column per reward function; NaN where the
            function did not apply.
        rewards: weighted sum over the functions; NaN where none applied.
        weights: of the functions.
        scale_rewards, aggregation: TRL's options of the same names.
    """

    by_function: list[list[float]]
    rewards: list[float]
    weights: list[float]
    scale_rewards: ScaleRewards
    aggregation: Aggregation

    def groups(self, sizes: Sequence[int]) -> list[list[float]]:
        """Return the rewards as one list per group."""
        groups, start = [], 0
        for size in sizes:
            groups.append(self.rewards[start : start + size])
            start += size
        return groups

    def effective_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Return the sizes of the groups whose rewards are not all equal."""
        return [len(group) for group in self.groups(sizes) if len(set(_known(group))) > 1]

    def advantages(self, sizes: Sequence[int]) -> list[float]:
        """Return the advantage of every row in groups of the given sizes, one after the other.

        A row that no function scored has advantage 0 and is left out of its group.

        Raises:
            InvalidRequest: a reward is infinite.
        """
        if self.aggregation == "normalize_then_sum":
            # The combined rewards have mean 0, being sums of centred ones.
            combined = self.combined(sizes)
            divisor = _std(combined) + EPSILON
            return [0.0 if math.isnan(c) else c / divisor for c in combined]
        if self.scale_rewards == "group":
            return _flat(self.rewards, sizes, "grpo")
        centred = _flat(self.rewards, sizes, "dr_grpo")
        if self.scale_rewards == "none":
            return centred
        divisor = _std(self.rewards) + EPSILON
        return [a / divisor for a in centred]

    def combined(self, sizes: Sequence[int]) -> list[float]:
        """Return the weighted sum of the functions' advantages; NaN where none applied."""
        total = [math.nan if math.isnan(r) else 0.0 for r in self.rewards]
        for function, weight in enumerate(self.weights):
            column = [row[function] for row in self.by_function]
            for row, advantage in enumerate(_flat(column, sizes, "grpo")):
                total[row] += weight * advantage
        return total

    def zero_std_fraction(self, sizes: Sequence[int]) -> float:
        """Return TRL's ``frac_reward_zero_std``: the share of rows whose divisor is 0.

        The divisor is the spread of the group, or, for "batch" and "normalize_then_sum",
        that of the batch.
        """
        if self.aggregation == "normalize_then_sum":
            return float(_is_constant(self.combined(sizes)))
        if self.scale_rewards == "batch":
            return float(_is_constant(self.rewards))
        constant = sum(len(group) for group in self.groups(sizes) if _is_constant(group))
        return constant / len(self.rewards)


def _flat(
    rewards: list[float], sizes: Sequence[int], method: Literal["grpo", "dr_grpo"]
) -> list[float]:
    answer: list[float] = group_advantages(rewards, sizes, method=method, epsilon=EPSILON)
    return answer


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _std(values: Sequence[float]) -> float:
    known = _known(values)
    if len(known) < 2:
        return 0.0
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))


def _is_constant(values: Sequence[float]) -> bool:
    known = _known(values)
    return bool(known) and min(known) == max(known)

"""What a budget is expected to bring, beside what equal groups would bring for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.objective import EFFECTIVE
from knapsack_scheduler.core.problem import (
    Begun,
    Beliefs,
    Bounds,
    Decision,
    IntArray,
    Levels,
    Posterior,
)
from knapsack_scheduler.core.ties import fill_lowest

SAMPLE = 1024
"""Positions that equal groups are judged by, evenly spaced; a larger batch is not looked at
whole. Their mean is then uncertain by about a hundredth, another one at every step."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Expectations for one budget that has been given out to the last wave.

    Attributes:
        groups: groups that have a rollout.
        rollouts: of all waves.
        effective_groups, effective_rollouts: expected of them.
        value: expected objective.
        uniform_effective_groups, uniform_effective_rollouts, uniform_value: the same of the
            budget divided uniformly from the start, under the same beliefs.
    """

    groups: int
    rollouts: int
    effective_groups: float
    effective_rollouts: float
    value: float
    uniform_effective_groups: float
    uniform_effective_rollouts: float
    uniform_value: float


def outlook(
    objective: str, beliefs: Beliefs, bounds: Bounds, begun: IntArray, decision: Decision
) -> Outlook | None:
    """Return what to expect of a budget; None while later waves are to come.

    Args:
        objective: name of what was maximised.
        beliefs: that the decision was made by.
        bounds: of whole groups.
        begun: rollouts of each group before the decision, int64[M].
        decision: the newest wave's.
    """
    if decision.remaining:
        return None
    sizes = begun + decision.num_rollouts
    rollouts = int(sizes.sum())
    groups = int(np.count_nonzero(sizes))
    reasons = decision.reasons
    least = int(bounds.minimum.sum())
    # An extension may have had less to give than the minimums ask for.
    low = bounds.minimum if least <= rollouts else np.zeros_like(bounds.minimum)
    high = np.maximum(bounds.most, low)
    # Rollouts that were given up and came after all may be more than the bounds hold.
    further = min(rollouts - int(low.sum()), int((high - low).sum()))
    equal = low + fill_lowest(low, high, further, beliefs.tie_keys)
    step = -(-sizes.size // SAMPLE)
    some = slice(None, None, step)
    sample = equal[some]
    scale = sizes.size / max(sample.size, 1)
    nothing = Begun.nothing(sample.size)
    posterior = _part(beliefs.posterior, some)
    chances = EFFECTIVE.values(posterior, nothing, sample)
    uniform_value = reasons.uniform_value
    if begun.any():
        # That of the decision leaves the earlier waves as they were.
        uniform_value = scale * float(
            find_objective(objective).values(posterior, nothing, sample).sum()
        )
    return Outlook(
        groups,
        rollouts,
        reasons.effective_group_rate * groups,
        reasons.effective_rollout_rate * rollouts,
        reasons.value,
        scale * float(chances.sum()),
        scale * float((chances * sample).sum()),
        uniform_value,
    )


def _part(posterior: Posterior, some: slice) -> Posterior:
    levels = posterior.levels
    if levels is not None:
        levels = Levels(levels.concentration[some], levels.success)
    return Posterior(posterior.alpha[some], posterior.beta[some], levels)

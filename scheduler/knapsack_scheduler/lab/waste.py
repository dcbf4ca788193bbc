"""What a logged run spent on groups whose rewards are all equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.problem import FloatArray
from knapsack_scheduler.lab.outcome_log import OutcomeLog


@dataclass(frozen=True, slots=True)
class Waste:
    """Rollouts in groups whose rewards are all equal, which have no advantage to learn from.

    Attributes:
        rollouts, groups: of the whole log.
        failed_rollouts, passed_rollouts: in groups that all failed, that all passed.
        failed_groups, passed_groups: such groups.
        failed_share, passed_share: of each step's rollouts, float64[S].
        tokens: of the whole log, and ``wasted_tokens`` of those groups; 0 if not known.
    """

    rollouts: int
    groups: int
    failed_rollouts: int
    passed_rollouts: int
    failed_groups: int
    passed_groups: int
    failed_share: FloatArray
    passed_share: FloatArray
    tokens: int
    wasted_tokens: int

    @property
    def wasted_rollouts(self) -> int:
        """All of them."""
        return self.failed_rollouts + self.passed_rollouts

    @property
    def share(self) -> float:
        """Wasted rollouts of all, 0..1."""
        return self.wasted_rollouts / max(self.rollouts, 1)


def waste_of(log: OutcomeLog, success_threshold: float) -> Waste:
    """Return what the logged run wasted; equal rewards above the threshold are passes."""
    sizes = log.group_sizes
    equal = ~log.effective
    passed = equal & (log.successes(success_threshold) > 0)
    failed = equal & ~passed
    starts = log.step_groups[:-1]
    whole = np.add.reduceat(sizes, starts).astype(np.float64)
    tokens = log.group_tokens()
    return Waste(
        int(sizes.sum()),
        sizes.size,
        int(sizes[failed].sum()),
        int(sizes[passed].sum()),
        int(np.count_nonzero(failed)),
        int(np.count_nonzero(passed)),
        np.add.reduceat(sizes * failed, starts) / whole,
        np.add.reduceat(sizes * passed, starts) / whole,
        0 if tokens is None else int(tokens.sum()),
        0 if tokens is None else int(tokens[equal].sum()),
    )

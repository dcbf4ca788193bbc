"""A step or a policy version that is far beyond all that its run has seen.

It is a mistake of the caller nearly always: a counter of something else, a time, a number that
was not initialised. Taken, it would do harm without a word: to every prompt all that is known
would be of a policy long gone, and budgets would be uniform. So it is refused, where the caller
sees it. A jump that could be meant is taken, and told of.
"""

from __future__ import annotations

from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.state import RunState

NOTICED = 1000
"""A jump of more than this is told of: evidence as far back weighs a third of what it did."""


def step_jump(step: int, state: RunState, limits: Limits) -> int:
    """Return how far a step is beyond the run's newest one; 0 if it is not, or is the first.

    Raises:
        InvalidArgument: it is further than the limit.
    """
    if state.last_step < 0:
        return 0
    return _jump("step", step, state.last_step, limits)


def version_jump(policy_version: int, state: RunState, limits: Limits) -> int:
    """Return how far a policy version is beyond the run's newest one, likewise."""
    if state.reported_groups == 0:
        return 0
    return _jump("policy_version", policy_version, state.last_policy_version, limits)


def _jump(field: str, value: int, newest: int, limits: Limits) -> int:
    jump = value - newest
    if jump > limits.jump:
        raise InvalidArgument(
            field,
            value,
            f"must be at most {newest + limits.jump}: the run's newest is {newest}, and one so far "
            "beyond it is taken for a mistake; a scheduler with a larger max_jump takes it",
        )
    return max(jump, 0)

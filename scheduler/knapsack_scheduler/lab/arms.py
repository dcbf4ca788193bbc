"""The ways to divide a budget that are compared, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.problem import Budget

ORACLE = "oracle"
"""The policy that is told the success rates; no service has it."""

BASELINE = "uniform"
"""The arm that differences are against."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to divide the budget of every step.

    Attributes:
        name: what reports and colours know it by.
        policy: one of ``core.policy.POLICIES``, or ``ORACLE``.
        objective: a name in ``core.catalogue.OBJECTIVES``.
        waves: share of the budget of each wave, in sum 1; 0 and 0 for two waves of which
            the policy sizes the first.
    """

    name: str
    policy: str
    objective: str
    waves: tuple[float, ...]

    @property
    def wave_fractions(self) -> tuple[float, ...]:
        """What Allocate and each Extend are asked for: the last wave takes what is left."""
        return (*self.waves[:-1], 0.0)

    @property
    def planned_waves(self) -> int:
        """Waves that Allocate is asked to plan for: 2, or 0 where shares are given."""
        return 0 if any(self.waves) else len(self.waves)

    def budget(self, total: int) -> Budget:
        """Return what Allocate is asked to divide in the first wave of a step."""
        return Budget(total, wave_fraction=self.wave_fractions[0], waves=self.planned_waves)


ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, "uniform", "paper", (1.0,)),
        Arm("paper", "paper", "paper", (1.0,)),
        Arm("posterior", "posterior", "paper", (1.0,)),
        Arm("posterior-2-waves", "posterior", "paper", (0.0, 0.0)),
        Arm("posterior-3-waves", "posterior", "paper", (0.5, 0.25, 0.25)),
        Arm(ORACLE, ORACLE, "paper", (1.0,)),
    )
}
"""Every arm by name, in the order of reports."""


def find_arms(names: Sequence[str], objective: str = "paper") -> tuple[Arm, ...]:
    """Return the arms of those names with that objective, each once, in the order of names.

    Raises:
        ValueError: an unknown arm or objective; names what there is.
    """
    find_objective(objective)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"arms = {unknown[0]!r}: must be some of {', '.join(ARMS)}")
    return tuple(replace(ARMS[name], objective=objective) for name in dict.fromkeys(names))

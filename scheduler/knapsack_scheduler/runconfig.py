"""How a run decides, with every default in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The settings of a run; fixed when it is created.

    Attributes:
        policy: rule that divides the budget, one of ``core.policy.POLICIES``.
        objective: what is maximised, one of ``core.catalogue.OBJECTIVES``.
        success_threshold: a rollout is a success if its reward is above this.
        min_rollouts, max_rollouts: bounds of a prompt where a request sets none.
        visit_discount: weight left to evidence per later visit, in (0, 1].
        version_discount: weight left to evidence per policy version, in (0, 1].
        evidence_cap: most rollouts that a prompt's evidence may weigh, above 0.
        reward_levels: whether a group is effective is judged by the different rewards
            of the run, up to ``rewardlevels.MOST_LEVELS`` of them; else by success and
            failure alone.
    """

    policy: str = "posterior"
    objective: str = "paper"
    success_threshold: float = 0.5
    min_rollouts: int = 2
    max_rollouts: int = 128
    visit_discount: float = 0.5
    version_discount: float = 0.999
    evidence_cap: float = 32.0
    reward_levels: bool = True

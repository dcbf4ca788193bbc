"""Every objective by name."""

from __future__ import annotations

from knapsack_scheduler.core.objective import EFFECTIVE, PAPER, VARIANCE, Rule
from knapsack_scheduler.core.rivals import Cero, Coba, Deviation, Gvm, Hora

OBJECTIVES: dict[str, Rule] = {
    rule.name: rule
    for rule in (PAPER, EFFECTIVE, VARIANCE, Deviation(), Gvm(), Hora(), Coba(), Cero())
}
"""What can be maximised; the first three are of the family of the paper."""

POINTWISE = frozenset({"paper", "effective", "variance", "deviation", "gvm", "hora"})
"""Those of which the gains of a prompt are the same bits whatever the rest of the batch:
prompts that are alike may be counted, and gains computed once for all of them."""


def find_objective(name: str) -> Rule:
    """Return the objective of that name; ValueError naming the ones there are."""
    try:
        return OBJECTIVES[name]
    except KeyError:
        allowed = ", ".join(OBJECTIVES)
        raise ValueError(f"objective = {name!r}: must be one of {allowed}") from None

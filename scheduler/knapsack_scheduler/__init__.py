"""Divides a budget of rollouts among prompts where they teach most.

As a library, without a service: ``solve``, ``solve_posterior`` and ``solve_levels``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knapsack_scheduler.core.problem import InfeasibleBudget
    from knapsack_scheduler.core.solve import solve, solve_levels, solve_posterior

__all__ = ["InfeasibleBudget", "solve", "solve_levels", "solve_posterior"]


def __getattr__(name: str) -> object:
    """Load on first use: the command says what is not installed before NumPy is needed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from knapsack_scheduler.core import problem, solve

    return getattr(problem if name == "InfeasibleBudget" else solve, name)

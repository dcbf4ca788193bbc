"""Knapsack allocation of rollouts: the solver as a library, and the scheduler service.

``solve`` and ``solve_posterior`` need NumPy only; the service is started with
``knapsack-scheduler serve``.
"""

from knapsack_scheduler.core.problem import InfeasibleBudget
from knapsack_scheduler.core.solve import solve, solve_posterior

__all__ = ["InfeasibleBudget", "solve", "solve_posterior"]

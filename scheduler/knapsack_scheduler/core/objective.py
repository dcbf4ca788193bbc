"""What N rollouts on a prompt are worth, and what one more is worth.

The value of a group of N rollouts on a prompt of success rate p is
``V(N, p) = (1 - p^N - q^N) I(p)`` with ``q = 1 - p`` and an information gain
``I(p) = p^i q^j`` (Knapsack RL, arXiv 2509.25849, has i = 1, j = 2). One more rollout
gains ``V(N+1) - V(N) = I p q (p^(N-1) + q^(N-1))`` for N >= 1, a sum of two falling
chains. Under a Beta posterior the expectation of each chain falls by a ratio of two
numbers that grow by one per rollout. Rewards of more than two levels are in
``core/levels.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from knapsack_scheduler.core.chains import Chain, Marginals
from knapsack_scheduler.core.levels import level_marginals, level_values
from knapsack_scheduler.core.moments import AllAlike, moment
from knapsack_scheduler.core.problem import Begun, BoolArray, FloatArray, IntArray, Posterior


class Rule(Protocol):
    """What a rollout is worth: all that a policy needs to know of an objective.

    Gains must never rise with the rollouts of a group; the division is exact then.
    """

    @property
    def name(self) -> str:
        """What requests call it."""

    def at_rates(self, success_rates: FloatArray) -> Marginals:
        """Return the gains of the second and further rollouts at known success rates."""

    def expected(self, alpha: FloatArray, beta: FloatArray) -> Marginals:
        """Return the expected gains of the second and further rollouts."""

    def conditional(self, posterior: Posterior, begun: Begun) -> Marginals:
        """Return the expected gains of the next rollouts; see ``conditional_marginals``.

        Of a group that has no rollout yet the gains begin with its second.
        """

    def values(self, posterior: Posterior, begun: Begun, further: IntArray) -> FloatArray:
        """Return the expected value of each whole group; see ``expected_values``."""


@dataclass(frozen=True, slots=True)
class Objective:
    """An information gain ``I(p) = p^i q^j``; a ``Rule``.

    Attributes:
        name: what requests call it.
        i, j: exponents of the success rate and of the failure rate, 0 or more.
    """

    name: str
    i: int
    j: int

    def at_rates(self, success_rates: FloatArray) -> Marginals:
        """Return the gains of the second and further rollouts at known success rates."""
        return point_marginals(self, success_rates)

    def expected(self, alpha: FloatArray, beta: FloatArray) -> Marginals:
        """Return the expected gains of the second and further rollouts."""
        return posterior_marginals(self, alpha, beta)

    def conditional(self, posterior: Posterior, begun: Begun) -> Marginals:
        """Return the expected gains of the next rollouts of groups already begun."""
        if posterior.levels is not None:
            return level_marginals(self.i, self.j, posterior, begun)
        return conditional_marginals(self, posterior, begun)

    def values(self, posterior: Posterior, begun: Begun, further: IntArray) -> FloatArray:
        """Return the expected value of each whole group."""
        if posterior.levels is not None:
            return level_values(self.i, self.j, posterior, begun, further)
        return expected_values(self, posterior, begun, further)


PAPER = Objective("paper", 1, 2)
EFFECTIVE = Objective("effective", 0, 0)
VARIANCE = Objective("variance", 1, 1)


def point_marginals(objective: Objective, success_rates: FloatArray) -> Marginals:
    """Return the gains of the second and further rollouts at known success rates.

    Args:
        objective: what is maximised.
        success_rates: p, float64[M] in [0, 1].
    """
    p = success_rates
    q = 1.0 - p
    weight = p * q
    for _ in range(objective.i):
        weight = weight * p
    for _ in range(objective.j):
        weight = weight * q
    one = np.ones_like(p)
    return Marginals((Chain(weight, p, one, 0), Chain(weight, q, one, 0)))


def posterior_marginals(objective: Objective, alpha: FloatArray, beta: FloatArray) -> Marginals:
    """Return the expected gains of the second and further rollouts under Beta posteriors.

    ``E[p^x q^y]`` of Beta(a, b) is a product of x + y ratios, so nothing but
    multiplication and division is needed.

    Args:
        objective: what is maximised.
        alpha, beta: float64[M], > 0.
    """
    i, j = objective.i, objective.j
    weight = moment(alpha, beta, i + 1, j + 1)
    total = alpha + beta + float(i + j + 2)
    passed = Chain(weight, alpha + float(i + 1), total, 1)
    failed = Chain(weight, beta + float(j + 1), total, 1)
    return Marginals((passed, failed))


def conditional_marginals(objective: Objective, posterior: Posterior, begun: Begun) -> Marginals:
    """Return the expected gains of the next rollouts of groups already begun.

    A group that only failed so far becomes effective with the first success, worth
    ``E[I p q^(k-1)]`` as its k-th further rollout; one that only passed with the first
    failure; a mixed one already is, and gains nothing. A group of which nothing was
    delivered gains as a new one does. Rollouts still running take the first places.

    Args:
        objective: what is maximised.
        posterior: knows the delivered outcomes.
        begun: of the groups.
    """
    i, j = objective.i, objective.j
    alpha, beta = posterior.alpha, posterior.beta
    fresh = begun.delivered == 0
    new = posterior_marginals(objective, alpha, beta)
    new = new.advanced(np.maximum(begun.outstanding - 1, 0) * fresh)
    if fresh.all():
        return new
    total = alpha + beta + float(i + j + 1)
    failed_all = ~fresh & ~begun.mixed & (begun.successes == 0)
    passed_all = ~fresh & ~begun.mixed & (begun.successes > 0)
    first_success = Chain(moment(alpha, beta, i + 1, j), beta + float(j), total, 1)
    first_failure = Chain(moment(alpha, beta, i, j + 1), alpha + float(i), total, 1)
    running = begun.outstanding * ~fresh
    passed, failed = new.chains
    return Marginals(
        (
            _chosen(fresh, passed, first_failure.only(passed_all).advanced(running)),
            _chosen(fresh, failed, first_success.only(failed_all).advanced(running)),
        )
    )


def _chosen(where: BoolArray, one: Chain, other: Chain) -> Chain:
    return Chain(
        np.where(where, one.value, other.value),
        np.where(where, one.numerator, other.numerator),
        np.where(where, one.denominator, other.denominator),
        one.growth,
    )


def expected_values(
    objective: Objective,
    posterior: Posterior,
    begun: Begun,
    further: IntArray,
    alike: tuple[FloatArray, FloatArray] | None = None,
) -> FloatArray:
    """Return the expected value of each whole group in closed form, float64[M].

    For reports only: exact to about 1e-12, and not bit by bit.

    Args:
        objective: what the value is of; ``EFFECTIVE`` gives the
            probability that the group is effective.
        posterior: knows the delivered outcomes.
        begun: of the groups.
        further: rollouts of the group beside the delivered ones, int64[M].
        alike: chances that ``further`` rollouts all pass, and all fail, where known.
    """
    alpha, beta = posterior.alpha, posterior.beta
    i, j = objective.i, objective.j
    all_pass, all_fail = alike or AllAlike(alpha, beta).after(further)
    # E[p^n I] is E[p^n] times what I is once n rollouts have passed.
    if i or j:
        all_pass = all_pass * moment(alpha + further, beta, i, j)
        all_fail = all_fail * moment(alpha, beta + further, i, j)
    gain = moment(alpha, beta, i, j)
    worth = np.where(further < 2, 0.0, gain - all_pass - all_fail)
    if begun.delivered.any():
        left = gain - np.where(begun.successes > 0, all_pass, all_fail)
        worth = np.where(begun.delivered > 0, np.where(begun.mixed, gain, left), worth)
    return np.maximum(worth, 0.0)

"""What N rollouts on a prompt are worth, and what one more is worth.

The value of a group of N rollouts on a prompt of success rate p is
``V(N, p) = (1 - p^N - q^N) I(p)`` with ``q = 1 - p`` and an information gain
``I(p) = p^i q^j`` (Knapsack RL, arXiv 2509.25849, has i = 1, j = 2). One more rollout
gains ``V(N+1) - V(N) = I p q (p^(N-1) + q^(N-1))`` for N >= 1, a sum of two falling
chains. Under a Beta posterior the expectation of each chain falls by a ratio of two
numbers that grow by one per rollout. Both kinds are ``Marginals`` here, computed by
multiplication only: they never rise, also in floating point, which is what makes the
threshold rule exact, and they are the same bits on every machine. (Differences of a
table of V are neither.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray


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

    def conditional(
        self,
        alpha: FloatArray,
        beta: FloatArray,
        delivered: IntArray,
        successes: IntArray,
        mixed: BoolArray,
        outstanding: IntArray,
    ) -> Marginals:
        """Return the expected gains of the next rollouts; see ``conditional_marginals``.

        Of a group that has no rollout yet the gains begin with its second.
        """

    def values(
        self,
        alpha: FloatArray,
        beta: FloatArray,
        further: IntArray,
        delivered: IntArray,
        successes: IntArray,
        mixed: BoolArray,
    ) -> FloatArray:
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

    def conditional(
        self,
        alpha: FloatArray,
        beta: FloatArray,
        delivered: IntArray,
        successes: IntArray,
        mixed: BoolArray,
        outstanding: IntArray,
    ) -> Marginals:
        """Return the expected gains of the next rollouts of groups already begun."""
        return conditional_marginals(self, alpha, beta, delivered, successes, mixed, outstanding)

    def values(
        self,
        alpha: FloatArray,
        beta: FloatArray,
        further: IntArray,
        delivered: IntArray,
        successes: IntArray,
        mixed: BoolArray,
    ) -> FloatArray:
        """Return the expected value of each whole group."""
        return expected_values(self, alpha, beta, further, delivered, successes, mixed)


PAPER = Objective("paper", 1, 2)
EFFECTIVE = Objective("effective", 0, 0)
VARIANCE = Objective("variance", 1, 1)


_MOST_NUMBERS = 2**20
"""Gains held at once while a chain is followed: 8 MiB."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Values that fall by a ratio: ``x(t+1) = x(t) (numerator + t g) / (denominator + t g)``.

    Attributes:
        value: x(0), float64[M], >= 0.
        numerator, denominator: float64[M], ``0 <= numerator <= denominator``.
        growth: g, 1 for a Beta posterior and 0 for a known success rate.
    """

    value: FloatArray
    numerator: FloatArray
    denominator: FloatArray
    growth: int

    def ratios(self, t: int, count: int) -> FloatArray:
        """Return x(s+1) / x(s) for s = t .. t + count - 1, float64[M, count]."""
        if self.growth == 0:
            constant = self.numerator / self.denominator
            return np.broadcast_to(constant[:, None], (constant.shape[0], count))
        grown = np.arange(t, t + count, dtype=np.float64)
        ratios: FloatArray = self.numerator[:, None] + grown
        ratios /= self.denominator[:, None] + grown
        return ratios

    def take(self, rows: IntArray | BoolArray) -> Chain:
        """Return the chains of some prompts."""
        return Chain(self.value[rows], self.numerator[rows], self.denominator[rows], self.growth)

    def advanced(self, steps: IntArray) -> Chain:
        """Return the chain that begins at x(steps[m]) of each prompt m."""
        value = self.value.copy()
        for rows, block, reached in self._walk(steps):
            value[rows] = block[np.arange(rows.size), reached]
        grown = self.growth * steps.astype(np.float64)
        return Chain(value, self.numerator + grown, self.denominator + grown, self.growth)

    def summed(self, steps: IntArray) -> FloatArray:
        """Return x(0) + .. + x(steps[m] - 1) of each prompt m, float64[M]."""
        total = np.zeros_like(self.value)
        for rows, block, reached in self._walk(steps):
            before = np.arange(block.shape[1]) < reached[:, None]
            total[rows] += np.where(before, block, 0.0).sum(axis=1)
        return total

    def _walk(self, steps: IntArray) -> Iterator[tuple[IntArray, FloatArray, IntArray]]:
        """Yield the values from x(0) to x(steps[m]) in blocks: rows, values, last column.

        By accumulation, which multiplies one by one, so that the bits are the same whatever
        the blocks; as many steps at once as memory allows. A chain that reached 0 ends.
        """
        rows = np.flatnonzero((steps > 0) & (self.value > 0.0))
        value, t = self.value[rows], 0
        while rows.size:
            count = min(int(steps[rows].max()) - t, max(_MOST_NUMBERS // rows.size, 1))
            block = np.empty((rows.size, count + 1))
            block[:, 0], block[:, 1:] = value, self.take(rows).ratios(t, count)
            np.multiply.accumulate(block, axis=1, out=block)
            yield rows, block, np.minimum(steps[rows] - t, count)
            t += count
            value = block[:, count]
            going = (steps[rows] > t) & (value > 0.0)
            rows, value = rows[going], value[going]

    def replaced(self, value: FloatArray) -> Chain:
        """Return the chain with other values and the same ratios."""
        return Chain(value, self.numerator, self.denominator, self.growth)

    def only(self, keep: BoolArray) -> Chain:
        """Return the chain with the prompts that are not kept worth nothing."""
        return self.replaced(np.where(keep, self.value, 0.0))


@dataclass(frozen=True, slots=True)
class Marginals:
    """Gain of each further rollout on each prompt: the sum of two falling chains.

    ``gain(t)`` is ``passed(t) + failed(t)``, where t = 0 is the prompt's next rollout.

    Attributes:
        passed: gain of being the first failure after nothing but successes.
        failed: gain of being the first success after nothing but failures.
    """

    passed: Chain
    failed: Chain

    def __len__(self) -> int:
        return int(self.passed.value.shape[0])

    @property
    def first(self) -> FloatArray:
        """Gain of the next rollout, float64[M]."""
        return self.passed.value + self.failed.value

    def take(self, rows: IntArray | BoolArray) -> Marginals:
        """Return the marginals of some prompts."""
        return Marginals(self.passed.take(rows), self.failed.take(rows))

    def per_cost(self, costs: FloatArray) -> Marginals:
        """Return the gains per unit of cost."""
        passed, failed = self.passed, self.failed
        return Marginals(
            passed.replaced(passed.value / costs), failed.replaced(failed.value / costs)
        )

    def only(self, keep: BoolArray) -> Marginals:
        """Return the marginals with the prompts that are not kept worth nothing."""
        return Marginals(self.passed.only(keep), self.failed.only(keep))

    def summed(self, steps: IntArray) -> FloatArray:
        """Return the gain of the next ``steps[m]`` rollouts on prompt m, float64[M]."""
        return self.passed.summed(steps) + self.failed.summed(steps)

    def advanced(self, steps: IntArray) -> Marginals:
        """Return the marginals after ``steps[m]`` more rollouts on prompt m."""
        if not steps.any():
            return self
        return Marginals(self.passed.advanced(steps), self.failed.advanced(steps))


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
    return Marginals(Chain(weight, p, one, 0), Chain(weight, q, one, 0))


def posterior_marginals(objective: Objective, alpha: FloatArray, beta: FloatArray) -> Marginals:
    """Return the expected gains of the second and further rollouts under Beta posteriors.

    ``E[p^x q^y]`` of Beta(a, b) is a product of x + y ratios, so nothing but
    multiplication and division is needed.

    Args:
        objective: what is maximised.
        alpha, beta: float64[M], > 0.
    """
    i, j = objective.i, objective.j
    weight = _moment(alpha, beta, i + 1, j + 1)
    total = alpha + beta + float(i + j + 2)
    return Marginals(
        Chain(weight, alpha + float(i + 1), total, 1),
        Chain(weight, beta + float(j + 1), total, 1),
    )


def conditional_marginals(
    objective: Objective,
    alpha: FloatArray,
    beta: FloatArray,
    delivered: IntArray,
    successes: IntArray,
    mixed: BoolArray,
    outstanding: IntArray,
) -> Marginals:
    """Return the expected gains of the next rollouts of groups already begun.

    A group that only failed so far becomes effective with the first success, worth
    ``E[I p q^(k-1)]`` as its k-th further rollout; one that only passed with the first
    failure; a mixed one already is, and gains nothing. A group of which nothing was
    delivered gains as a new one does. Rollouts still running take the first places.

    Args:
        objective: what is maximised.
        alpha, beta: posteriors that know the delivered outcomes, float64[M].
        delivered: rollouts delivered, int64[M].
        successes: those that succeeded, int64[M].
        mixed: bool[M], True where rewards differ.
        outstanding: rollouts running, int64[M].
    """
    i, j = objective.i, objective.j
    fresh = delivered == 0
    new = posterior_marginals(objective, alpha, beta)
    new = new.advanced(np.maximum(outstanding - 1, 0) * fresh)
    total = alpha + beta + float(i + j + 1)
    failed_all = ~fresh & ~mixed & (successes == 0)
    passed_all = ~fresh & ~mixed & (successes > 0)
    first_success = Chain(_moment(alpha, beta, i + 1, j), beta + float(j), total, 1)
    first_failure = Chain(_moment(alpha, beta, i, j + 1), alpha + float(i), total, 1)
    begun = outstanding * ~fresh
    return Marginals(
        _chosen(fresh, new.passed, first_failure.only(passed_all).advanced(begun)),
        _chosen(fresh, new.failed, first_success.only(failed_all).advanced(begun)),
    )


def _chosen(where: BoolArray, one: Chain, other: Chain) -> Chain:
    return Chain(
        np.where(where, one.value, other.value),
        np.where(where, one.numerator, other.numerator),
        np.where(where, one.denominator, other.denominator),
        one.growth,
    )


def _moment(alpha: FloatArray, beta: FloatArray, x: int, y: int) -> FloatArray:
    """Return E[p^x q^y] of Beta(alpha, beta)."""
    total = alpha + beta
    moment = np.ones_like(alpha)
    for t in range(x):
        moment = moment * ((alpha + float(t)) / (total + float(t)))
    for t in range(y):
        moment = moment * ((beta + float(t)) / (total + float(x + t)))
    return moment


def expected_values(
    objective: Objective,
    alpha: FloatArray,
    beta: FloatArray,
    further: IntArray,
    delivered: IntArray | None = None,
    successes: IntArray | None = None,
    mixed: BoolArray | None = None,
) -> FloatArray:
    """Return the expected value of each whole group in closed form, float64[M].

    For reports only: exact to about 1e-12, and not bit by bit.

    Args:
        objective: what the value is of; ``EFFECTIVE`` gives the
            probability that the group is effective.
        alpha, beta: posteriors that know the delivered outcomes, float64[M].
        further: rollouts of the group that are not delivered, int64[M].
        delivered, successes, mixed: as in ``conditional_marginals``; None for groups
            of which nothing was delivered.
    """
    gain = _moment(alpha, beta, objective.i, objective.j)
    a = alpha + float(objective.i)
    b = beta + float(objective.j)
    n = further.astype(np.float64)
    whole = _log_rising(a + b, n)
    all_pass = np.exp(_log_rising(a, n) - whole)
    all_fail = np.exp(_log_rising(b, n) - whole)
    fresh = np.where(further < 2, 0.0, 1.0 - all_pass - all_fail)
    if delivered is None or successes is None or mixed is None:
        return gain * np.maximum(fresh, 0.0)
    begun = np.where(mixed, 1.0, 1.0 - np.where(successes > 0, all_pass, all_fail))
    return gain * np.maximum(np.where(delivered > 0, begun, fresh), 0.0)


_STIRLING_FROM = 10


def _log_rising(x: FloatArray, n: FloatArray) -> FloatArray:
    """Return log(Gamma(x + n) / Gamma(x)): Stirling's series after a shift by 10."""
    return _log_gamma(x + n) - _log_gamma(x)


def _log_gamma(x: FloatArray) -> FloatArray:
    product = x.copy()
    for t in range(1, _STIRLING_FROM):
        product = product * (x + float(t))
    z = x + float(_STIRLING_FROM)
    z2 = z * z
    series = (1.0 / 12.0 - (1.0 / 360.0 - (1.0 / 1260.0 - 1.0 / (1680.0 * z2)) / z2) / z2) / z
    result: FloatArray = (z - 0.5) * np.log(z) - z + 0.9189385332046727 + series - np.log(product)
    return result

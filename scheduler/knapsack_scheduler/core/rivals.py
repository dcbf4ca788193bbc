"""Rules of other papers, where their formula is known, in the terms of this solver.

Each is a falling chain of gains, so its best division is found exactly, whatever its
authors used. They differ from their papers where those need what nobody reports here:
success rates are the means of the run's posteriors, and state that their trainers keep
over steps is taken from the batch. ``scheduler/README.md`` says when to use which.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.chains import Chain, Marginals
from knapsack_scheduler.core.problem import Begun, FloatArray, IntArray, Posterior

_MANY = 1e15
"""Evidence of a success rate that is known."""


class SizeRule(ABC):
    """A rule that looks at a group's size only, not at how its rewards came out."""

    name: str

    @abstractmethod
    def chain(self, alpha: FloatArray, beta: FloatArray) -> Chain:
        """Return the gains of the second and further rollouts."""

    @abstractmethod
    def value(self, alpha: FloatArray, beta: FloatArray, rollouts: IntArray) -> FloatArray:
        """Return what groups of that many rollouts are worth, 0 for one and for none."""

    def expected(self, alpha: FloatArray, beta: FloatArray) -> Marginals:
        """Return the gains of the second and further rollouts under posteriors."""
        return _alone(self.chain(alpha, beta))

    def at_rates(self, success_rates: FloatArray) -> Marginals:
        """Return the gains of the second and further rollouts at known success rates."""
        return self.expected(*_known(success_rates))

    def conditional(self, posterior: Posterior, begun: Begun) -> Marginals:
        """Return the gains of the next rollouts: those after the group's size."""
        gains = self.expected(posterior.alpha, posterior.beta)
        return gains.advanced(np.maximum(begun.size - 1, 0))

    def values(self, posterior: Posterior, begun: Begun, further: IntArray) -> FloatArray:
        """Return what each whole group is worth."""
        size = further + begun.delivered
        worth = self.value(posterior.alpha, posterior.beta, size)
        return np.where(size < 2, 0.0, worth)


@dataclass(frozen=True)
class Hora(SizeRule):
    """HORA (arXiv 2605.07114): the probability of at least one success.

    ``V(N) = 1 - prod_{j<N} (b + j) / (a + b + j)``, counted from the first rollout. Of a
    group already begun it is the probability of one among the further rollouts.
    """

    name: str = "hora"

    def chain(self, alpha: FloatArray, beta: FloatArray) -> Chain:
        """Return E[p q^(n-1)] for n = 2, 3 .."""
        total = alpha + beta
        second = alpha / total * (beta / (total + 1.0))
        return Chain(second, beta + 1.0, total + 2.0, 1)

    def conditional(self, posterior: Posterior, begun: Begun) -> Marginals:
        """Return E[p q^k] from the first further rollout on, of groups already begun."""
        alpha, beta, outstanding = posterior.alpha, posterior.beta, begun.outstanding
        fresh = begun.delivered == 0
        new = self.chain(alpha, beta)
        total = alpha + beta
        next_ = Chain(alpha / total, beta, total + 1.0, 1)
        chosen = Chain(
            np.where(fresh, new.value, next_.value),
            np.where(fresh, new.numerator, next_.numerator),
            np.where(fresh, new.denominator, next_.denominator),
            1,
        )
        return _alone(chosen).advanced(np.where(fresh, np.maximum(outstanding - 1, 0), outstanding))

    def value(self, alpha: FloatArray, beta: FloatArray, rollouts: IntArray) -> FloatArray:
        """Return the probability that the first success comes after the first rollout."""
        all_fail = Chain(np.ones_like(beta), beta, alpha + beta, 1).advanced(rollouts).value
        return beta / (alpha + beta) - all_fail


@dataclass(frozen=True)
class Proportional(SizeRule):
    """Sizes in proportion to a weight: the division that minimises ``sum w^2 / N``.

    ``V(N) = w^2 (1 - 1/N)``; rounding to whole rollouts within bounds is exact too.
    """

    name: str

    @abstractmethod
    def weight2(self, p: FloatArray) -> FloatArray:
        """Return the square of the weight at success rate p."""

    def chain(self, alpha: FloatArray, beta: FloatArray) -> Chain:
        """Return w^2 / (n (n + 1)) for n = 1, 2 .."""
        weight2 = self.weight2(alpha / (alpha + beta))
        one = np.ones_like(weight2)
        return Chain(0.5 * weight2, one, 3.0 * one, 1)

    def value(self, alpha: FloatArray, beta: FloatArray, rollouts: IntArray) -> FloatArray:
        """Return w^2 (1 - 1/N)."""
        return self.weight2(alpha / (alpha + beta)) * (1.0 - 1.0 / np.maximum(rollouts, 1))


@dataclass(frozen=True)
class Deviation(Proportional):
    """DynaMO's priority: sizes in proportion to the deviation of a reward, sqrt(p q)."""

    name: str = "deviation"

    def weight2(self, p: FloatArray) -> FloatArray:
        """Return p q."""
        return p * (1.0 - p)


@dataclass(frozen=True)
class Gvm(Proportional):
    """GVM-RAFT (arXiv 2505.02391) with equal gradients: ``w = 1 / sqrt(p + a / p^(b-1))``.

    a = 0.001 and b = 2, as its code has them.
    """

    name: str = "gvm"

    def weight2(self, p: FloatArray) -> FloatArray:
        """Return p / (p^2 + a)."""
        return p / (p * p + 1e-3)


class Saturating(SizeRule):
    """A value that comes near its limit by a constant factor: ``w (1 - exp(-N s))``."""

    @abstractmethod
    def shape(self, alpha: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return w and s, both 0 or more."""

    def chain(self, alpha: FloatArray, beta: FloatArray) -> Chain:
        """Return w exp(-n s) (1 - exp(-s)) for n = 1, 2 .."""
        limit, speed = self.shape(alpha, beta)
        left = np.exp(-speed)
        return Chain(limit * left * -np.expm1(-speed), left, np.ones_like(left), 0)

    def value(self, alpha: FloatArray, beta: FloatArray, rollouts: IntArray) -> FloatArray:
        """Return what the second and further rollouts add."""
        limit, speed = self.shape(alpha, beta)
        added: FloatArray = limit * (np.exp(-speed) - np.exp(-speed * rollouts))
        return added


@dataclass(frozen=True)
class Coba(Saturating):
    """CoBA-RL (arXiv 2602.03048): ``(1 - exp(-N p q / tau)) BetaPDF(p; a, kappa - a)``.

    The density moves from easy to hard prompts as the failure rate F of the run rises:
    ``a = 1 + (kappa - 2) F~`` with F~ = F above one half and a steep sigmoid below. tau
    rises from 3 to 12 with the spread of the success rates. F and the spread are those
    of the batch here.
    """

    name: str = "coba"
    kappa: float = 11.0

    def shape(self, alpha: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the density and p q / tau."""
        p = np.clip(alpha / (alpha + beta), 0.01, 0.99)
        if p.size == 0:
            return p, p
        failure = 1.0 - math.fsum(p) / p.size
        if failure <= 0.5:
            failure = 1.0 / (1.0 + math.exp(-10.0 * (failure - 0.5)))
        a = min(max(1.0 + (self.kappa - 2.0) * failure, 1.0), self.kappa - 1.0)
        b = self.kappa - a
        scale = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
        density = p ** (a - 1.0) * (1.0 - p) ** (b - 1.0) / scale
        mean = math.fsum(p) / p.size
        spread = min(math.fsum((p - mean) ** 2) / p.size / 0.1667, 1.0)
        return density, p * (1.0 - p) / (3.0 + 9.0 * spread)


@dataclass(frozen=True)
class Cero(Saturating):
    """CERO's utility (arXiv 2606.05606): ``1 - exp(-4 q N / R)``, q the expected p (1 - p).

    R, the rollouts after which a prompt of rate 1/2 has given 63 % of its worth, is 8.
    The paper applies it to whole groups over the whole run; here it is per step.
    """

    name: str = "cero"
    rollouts: float = 8.0

    def shape(self, alpha: FloatArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return 1 and 4 q / R."""
        total = alpha + beta
        spread = alpha / total * (beta / (total + 1.0))
        return np.ones_like(alpha), 4.0 * spread / self.rollouts


def _alone(chain: Chain) -> Marginals:
    return Marginals((chain,))


def _known(success_rates: FloatArray) -> tuple[FloatArray, FloatArray]:
    return success_rates * _MANY, (1.0 - success_rates) * _MANY

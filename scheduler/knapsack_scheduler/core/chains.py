"""Falling chains: the gains of each further rollout, as products of ratios.

One more rollout gains a sum of a few terms, each of which falls by a ratio from rollout to
rollout. They are computed by multiplication only: they never rise, also in floating point,
which is what makes the threshold rule exact, and they are the same bits on every machine.
(Differences of a table of values are neither.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray

_MOST_NUMBERS = 2**20
"""Gains held at once while a chain is followed: 8 MiB."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Values that fall by a ratio: ``x(t+1) = x(t) (numerator + t g) / (denominator + t g)``.

    Attributes:
        value: x(0), float64[M], >= 0.
        numerator, denominator: float64[M], ``0 <= numerator <= denominator``.
        growth: g, 1 for a posterior and 0 for a known success rate.
        share: numerator and denominator of a second factor of the ratio, of the same
            kind; None for 1.
    """

    value: FloatArray
    numerator: FloatArray
    denominator: FloatArray
    growth: int
    share: tuple[FloatArray, FloatArray] | None = None

    @property
    def columns(self) -> list[FloatArray]:
        """All that tells one prompt's chain from another's, float64[M] each."""
        return [self.value, self.numerator, self.denominator, *(self.share or ())]

    def ratios(self, t: int, count: int) -> FloatArray:
        """Return x(s+1) / x(s) for s = t .. t + count - 1, float64[M, count].

        [M, 1] where the ratio is constant.
        """
        if self.growth == 0:
            constant = self.numerator / self.denominator
            if self.share is not None:
                constant = constant * (self.share[0] / self.share[1])
            return constant[:, None]
        grown = np.arange(t, t + count, dtype=np.float64)
        ratios: FloatArray = self.numerator[:, None] + grown
        ratios /= self.denominator[:, None] + grown
        if self.share is not None:
            ratios *= (self.share[0][:, None] + grown) / (self.share[1][:, None] + grown)
        return ratios

    def take(self, rows: IntArray | BoolArray) -> Chain:
        """Return the chains of some prompts."""
        share = self.share and (self.share[0][rows], self.share[1][rows])
        return Chain(
            self.value[rows], self.numerator[rows], self.denominator[rows], self.growth, share
        )

    def advanced(self, steps: IntArray) -> Chain:
        """Return the chain that begins at x(steps[m]) of each prompt m."""
        if int(steps.max(initial=0)) == 1:
            # The minimum of 2, which most batches have: one multiplication, as in a walk.
            value = np.where(steps > 0, self.value * self.ratios(0, 1)[:, 0], self.value)
        else:
            value = self.value.copy()
            for rows, block, reached in self._walk(steps):
                value[rows] = block[np.arange(rows.size), reached]
        grown = self.growth * steps.astype(np.float64)
        share = self.share and (self.share[0] + grown, self.share[1] + grown)
        return Chain(value, self.numerator + grown, self.denominator + grown, self.growth, share)

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
        return Chain(value, self.numerator, self.denominator, self.growth, self.share)

    def only(self, keep: BoolArray) -> Chain:
        """Return the chain with the prompts that are not kept worth nothing."""
        return self.replaced(np.where(keep, self.value, 0.0))


@dataclass(frozen=True, slots=True)
class Marginals:
    """Gain of each further rollout on each prompt: the sum of falling chains.

    Step t = 0 is the prompt's next rollout.

    Attributes:
        chains: one or more, each of what a rollout gains by being the first that differs
            from others before it that were all alike in one way. For two outcomes: after
            nothing but successes, and after nothing but failures.
    """

    chains: tuple[Chain, ...]

    def __len__(self) -> int:
        return int(self.chains[0].value.shape[0])

    @property
    def first(self) -> FloatArray:
        """Gain of the next rollout, float64[M]."""
        total = self.chains[0].value
        for chain in self.chains[1:]:
            total = total + chain.value
        return total

    def take(self, rows: IntArray | BoolArray) -> Marginals:
        """Return the marginals of some prompts."""
        return Marginals(tuple(chain.take(rows) for chain in self.chains))

    def per_cost(self, costs: FloatArray) -> Marginals:
        """Return the gains per unit of cost."""
        return Marginals(tuple(chain.replaced(chain.value / costs) for chain in self.chains))

    def only(self, keep: BoolArray) -> Marginals:
        """Return the marginals with the prompts that are not kept worth nothing."""
        return Marginals(tuple(chain.only(keep) for chain in self.chains))

    def summed(self, steps: IntArray) -> FloatArray:
        """Return the gain of the next ``steps[m]`` rollouts on prompt m, float64[M]."""
        total = self.chains[0].summed(steps)
        for chain in self.chains[1:]:
            total = total + chain.summed(steps)
        return total

    def advanced(self, steps: IntArray) -> Marginals:
        """Return the marginals after ``steps[m]`` more rollouts on prompt m."""
        if not steps.any():
            return self
        return Marginals(tuple(chain.advanced(steps) for chain in self.chains))

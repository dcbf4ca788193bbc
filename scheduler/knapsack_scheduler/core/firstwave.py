"""How many rollouts each prompt gets first where a second wave is to follow.

A large first wave spends on groups that are soon mixed, a small one leaves the second wave
to guess. What both are worth together is known in closed form. With a posterior
Beta(a, b) of the success rate p, an information gain ``I(p) = p^i q^j`` and n rollouts
first, the group only fails with probability ``A(n) = E[q^n]``, and then the k-th further
rollout gains ``E[I p q^(n+k-1)] / A(n)``: the first success. (The other side, a group that
only passes, with p and q exchanged.) Mixed groups are given nothing more. So at a price L per
rollout a prompt is worth

    W(n) = V(n) - L n + sum over both sides of  max_m  sum_{k=1..m} (E[I p q^(n+k-1)] - L A(n))

and because gains fall, the best m ends where the gain falls below ``L A(n)``. V(n) is the sum
of the gains of the second to the n-th rollout on both sides, so the sum telescopes: with e the
rollouts of the group where a side ends and S(e) the sum of its gains up to there,

    W(n) = sum over both sides of (S(e) - S(1))  -  L (n + sum over both sides of A(n) (e - n))

Each prompt gets the n with the highest W, and L is where the expected rollouts of both waves,
the bracket above, add up to the budget: Lagrange's rule, which many prompts make exact.

Rewards of more than two levels are planned for by success and failure alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.chains import Chain
from knapsack_scheduler.core.elementary import exp, log
from knapsack_scheduler.core.moments import moment
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.problem import Bounds, FloatArray, IntArray, Posterior

_STATES = 192
"""Most posteriors that are told apart."""

_CELL = 0.125
"""Log-odds of the mean that posteriors are told apart by where there are more."""

_FURTHEST = 256
"""Rollouts of a group that are looked ahead to."""

_PRICES = 14
"""Most prices that are tried."""

_CLOSE = 0.003
"""Part of the budget that the expected rollouts may be off by."""


def first_wave(
    objective: Objective, posterior: Posterior, bounds: Bounds, total: int
) -> tuple[IntArray, float]:
    """Return the first of two waves that are worth most together, and the price of a rollout.

    The same bits on every machine. Of many prompts, those of like posteriors get the same.

    Args:
        objective: what is maximised.
        posterior: of the prompts, before the first wave.
        bounds: of whole groups. Every minimum is met at once: what is spent anyway is
            better spent when it can still be learned from.
        total: rollouts of both waves, which the bounds hold.

    Returns:
        int64[M], in sum at most ``total``, and the price.
    """
    least = np.where(bounds.minimum > 0, bounds.minimum, np.minimum(bounds.most, 2))
    most = np.maximum(np.minimum(bounds.most, total), least)
    skipping = bounds.minimum == 0
    if total == 0 or not most.any():
        return bounds.minimum.copy(), 0.0
    states, of = _states(posterior)
    smallest = min(max(int(least.min()), 1), _FURTHEST)
    plans = _Plans.of(objective, *states, smallest, min(int(most.max()), _FURTHEST))
    best, price = bounds.minimum.copy(), 0.0
    closest = np.inf
    search = _Search(plans.typical_price(total / most.size, np.bincount(of)))
    for _ in range(_PRICES):
        size, spent, worth = plans.at(search.price)
        wanted = size[of]
        first = np.clip(wanted, least, most)
        expected = spent[of] + (first - wanted)
        skipped = skipping & (worth[of] <= 0.0)
        first = np.where(skipped, 0, first)
        asked = float(np.cumsum(np.where(skipped, 0.0, expected))[-1])
        off = abs(asked - total)
        if off < closest and int(first.sum()) <= total:
            best, price, closest = first, search.price, off
        if off <= _CLOSE * total or not search.goes_on(asked / total):
            break
    return best, price


class _Search:
    """The price at which as much is asked for as there is; asked for less, the higher it is.

    Attributes:
        price: to be tried.
    """

    def __init__(self, price: float) -> None:
        self.price = price
        self._low, self._high = 0.0, math.inf
        self._factor = 1.0

    def goes_on(self, ratio: float) -> bool:
        """Take the next price, after one at which ``ratio`` of the budget was asked for."""
        if ratio > 1.0:
            self._low = self.price
        else:
            self._high = self.price
        if self._low > 0.0 and self._high < math.inf:
            self.price = math.sqrt(self._low) * math.sqrt(self._high)
            return self._high > self._low * (1.0 + 1e-6)
        # What is asked for falls about as the price to the power -2/3. Where it does not,
        # each step is as long as all before it.
        factor = ratio * math.sqrt(ratio)
        farther = max if ratio > 1.0 else min
        factor = farther(factor, self._factor * self._factor)
        self._factor = min(max(factor, 2.0**-10), 2.0**10)
        self.price *= self._factor
        return self.price > 1e-200


def _states(posterior: Posterior) -> tuple[tuple[FloatArray, FloatArray], IntArray]:
    """Return alpha and beta of the states that are told apart, and the state of each prompt."""
    alpha, beta = posterior.alpha, posterior.beta
    keys = np.empty(alpha.shape, np.complex128)
    keys.real, keys.imag = alpha, beta
    different, of = np.unique(keys, return_inverse=True)
    if different.size <= _STATES:
        return (different.real.copy(), different.imag.copy()), of.astype(np.int64)
    # Cells of the mean's log-odds and of the evidence's logarithm, which matters less.
    odds, strength = log(alpha / beta), log(alpha + beta)
    width = _CELL
    while True:
        across, along = np.floor(odds / width), np.floor(strength / (2.0 * width))
        keys.real, keys.imag = across, along
        cells, of = np.unique(keys, return_inverse=True)
        if cells.size <= _STATES:
            break
        width *= 2.0
    mean = 1.0 / (1.0 + exp(-(cells.real + 0.5) * width))
    evidence = exp((cells.imag + 0.5) * (2.0 * width))
    return (mean * evidence, (1.0 - mean) * evidence), of.astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Plans:
    """What each state may be given first, and what follows.

    Rows are the states' groups that only failed, then those that only passed.

    Attributes:
        sizes: of a first wave, int64[S], rising.
        gains: of a further rollout after t alike ones, float64[2 G, T + 1], falling in t; a
            last column of -1.
        summed: of the gains before t, from the second rollout on, float64[2 G, T + 1].
        alike: chance that a first wave of each size comes out alike, float64[2 G, S].
    """

    sizes: IntArray
    gains: FloatArray
    summed: FloatArray
    alike: FloatArray

    @classmethod
    def of(
        cls, objective: Objective, alpha: FloatArray, beta: FloatArray, least: int, most: int
    ) -> _Plans:
        """Return the plans of posteriors whose first waves have ``least`` to ``most`` rollouts."""
        furthest = max(most, least, 2)
        i, j = objective.i, objective.j
        total = alpha + beta
        further = total + float(i + j + 1)
        one = np.ones_like(alpha)
        gains, alike = [], []
        for first, own, grown in (
            (moment(alpha, beta, i + 1, j), beta, beta + float(j)),
            (moment(alpha, beta, i, j + 1), alpha, alpha + float(i)),
        ):
            gains.append(_followed(Chain(first, grown, further, 1), furthest))
            alike.append(_followed(Chain(one, own, total, 1), furthest + 1))
        falling = np.concatenate(gains)
        summed = np.zeros((falling.shape[0], furthest + 1))
        np.cumsum(falling[:, 1:], axis=1, out=summed[:, 2:])
        sizes = _sizes(least, furthest)
        ended = np.concatenate([falling, np.full((falling.shape[0], 1), -1.0)], axis=1)
        return cls(sizes, ended, summed, np.concatenate(alike)[:, sizes])

    def typical_price(self, size: float, counts: IntArray) -> float:
        """Return what a rollout gains in groups of that size, a mean over the prompts."""
        states = counts.size
        at = min(max(int(size), 1), self.gains.shape[1] - 2)
        both = self.gains[:states, at] + self.gains[states:, at]
        return max(float(np.cumsum(both * counts)[-1]) / int(counts.sum()), 1e-300)

    def at(self, price: float) -> tuple[IntArray, FloatArray, FloatArray]:
        """Return what is best at a price, per state.

        Returns:
            the first wave int64[G], the rollouts expected in both waves and the worth of
            them less their price, float64[G].
        """
        end = np.maximum(self._ends(price * self.alike), self.sizes)
        more = self.alike * (end - self.sizes)
        gained = np.take_along_axis(self.summed, end, axis=1)
        states = len(gained) // 2
        spent = self.sizes + (more[:states] + more[states:])
        worth = (gained[:states] + gained[states:]) - price * spent
        best = worth.argmax(axis=1)
        rows = np.arange(states)
        return self.sizes[best], spent[rows, best], worth[rows, best]

    def _ends(self, least: FloatArray) -> IntArray:
        """Return how many gains of each row are not below each number, int64[2 G, S]."""
        columns = self.gains.shape[1]
        starts = columns * np.arange(len(self.gains))[:, None]
        flat = self.gains.ravel()
        count = np.zeros(least.shape, np.int64)
        step = 1 << (columns - 1).bit_length() - 1
        while step:
            tried = np.minimum(count + step, columns)
            reached = flat.take(starts + tried - 1) >= least
            count = np.where(reached, tried, count)
            step >>= 1
        return count


def _followed(chain: Chain, count: int) -> FloatArray:
    """Return the first values of a chain, float64[G, count]."""
    values = np.empty((chain.value.size, count))
    values[:, 0] = chain.value
    values[:, 1:] = chain.ratios(0, count - 1)
    np.multiply.accumulate(values, axis=1, out=values)
    return values


def _sizes(least: int, most: int) -> IntArray:
    """Return what a first wave may be: every size up to 16 more than the least, then by 1/8."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] + max(1, (sizes[-1] - least) // 8), most))
    return np.array(sizes, np.int64)

"""What a whole log says of a prompt's success rate at one step, from before and after it.

A group that gave N equal rewards may have become effective with more. How likely that is
depends on the prompt's rate at that step, of which the log knows more than the run did:
the group's own rewards, the prompt's visits before and after, and the run's other prompts.
Smoothing the model of ``drift.py`` joins all of them. The same rates weigh the value of
every effective group, whichever arm made it so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray
from knapsack_scheduler.lab.drift import (
    LOG_FAILURES,
    LOG_RATES,
    RATES,
    Drift,
    Visits,
    backward,
    fit_drift,
    forward,
    likelihood,
)

_FITTED_GROUPS = 10_000
"""Groups that the model is fitted to: of prompts evenly spaced in a larger log."""

_BLOCK_GROUPS = 100_000
"""Groups smoothed at once."""

_LEAST = 1e-200
"""Weight of a rate that nothing supports, so that contradictions leave a distribution."""

_LARGEST = 1024
"""Rollouts of a group that count for its rate; a larger one counts in proportion."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Distributions of the success rates of some groups.

    Attributes:
        weight: float64[M, K], over ``drift.RATES``, rows sum to 1.
    """

    weight: FloatArray

    @property
    def mean(self) -> FloatArray:
        """Expected success rate of each group, float64[M]."""
        mean: FloatArray = self.weight @ RATES
        return mean

    def gain(self, valued: Objective) -> FloatArray:
        """Return the expected information gain of each group, float64[M]."""
        gain: FloatArray = self.weight @ _gain(valued)
        return gain

    def change(
        self, successes: IntArray, further: IntArray, valued: Objective
    ) -> tuple[FloatArray, FloatArray]:
        """Return what further rollouts do to groups whose rewards are all equal so far.

        Args:
            successes: so far, int64[M]; 0 for a group that only failed.
            further: rollouts, int64[M].
            valued: the information gain.

        Returns:
            the chance that each group becomes effective, and its expected gain by that,
            float64[M].
        """
        same = np.where((successes > 0)[:, None], LOG_RATES, LOG_FAILURES)
        weight = self.weight * -np.expm1(same * further[:, None])
        return weight.sum(axis=1), weight @ _gain(valued)


class Hindsight:
    """What a log says of the success rate of each of its groups.

    Attributes:
        drift: the fitted model.
        revisits: bool[G], groups whose prompt has another one in the log.
    """

    def __init__(
        self,
        drift: Drift,
        revisits: BoolArray,
        others: npt.NDArray[np.float32],
        rollouts: IntArray,
        successes: IntArray,
    ) -> None:
        self.drift = drift
        self.revisits = revisits
        self._others = others
        self._rollouts, self._successes = rollouts, successes

    def rates(self, groups: slice | IntArray) -> Rates:
        """Return what all of the log says of the rates of some groups."""
        return self.rates_given(groups, self._rollouts[groups], self._successes[groups])

    def rates_given(
        self, groups: slice | IntArray, rollouts: IntArray, successes: IntArray
    ) -> Rates:
        """Return the same had the groups themselves given other counts."""
        n, k = _held(rollouts, successes)
        weight = self._others[groups] * likelihood(n, k) + _LEAST
        return Rates(weight / weight.sum(axis=1, keepdims=True))


def look_back(prompts: npt.NDArray[np.int32], rollouts: IntArray, successes: IntArray) -> Hindsight:
    """Return what a log says of all of its groups.

    Args:
        prompts: of each group, int32[G]; the groups of a prompt stand in order of steps.
        rollouts: of each group, int64[G], 1 or more.
        successes: those that succeeded, int64[G].
    """
    n, k = _held(rollouts, successes)
    chains = _Chains(prompts)
    drift = fit_drift(_visits(chains.sample(_FITTED_GROUPS), n, k))
    others = np.empty((prompts.size, RATES.size), np.float32)
    for visits in chains.blocks(_BLOCK_GROUPS):
        of = _visits(visits, n, k).likelihoods()
        before, after = forward(drift.start, drift.kernel, of), backward(drift.kernel, of)
        for groups, expected, fits in zip(visits, before, after, strict=True):
            weight = expected * fits + _LEAST
            others[groups] = weight / weight.sum(axis=1, keepdims=True)
    return Hindsight(drift, chains.revisits, others, rollouts, successes)


def _gain(valued: Objective) -> FloatArray:
    gain: FloatArray = RATES**valued.i * (1.0 - RATES) ** valued.j
    return gain


def _held(rollouts: IntArray, successes: IntArray) -> tuple[IntArray, IntArray]:
    """Return the counts with no group above ``_LARGEST``."""
    held = np.minimum(rollouts, _LARGEST)
    return held, np.where(held < rollouts, (successes * held) // np.maximum(rollouts, 1), successes)


def _visits(groups: list[IntArray], rollouts: IntArray, successes: IntArray) -> Visits:
    return Visits([rollouts[at] for at in groups], [successes[at] for at in groups])


class _Chains:
    """The groups of every prompt, in order.

    Attributes:
        revisits: bool[G], groups whose prompt has another one.
    """

    def __init__(self, prompts: npt.NDArray[np.int32]) -> None:
        self._order = np.argsort(prompts, kind="stable")
        sorted_ = prompts[self._order]
        starts = np.flatnonzero(np.concatenate([[True], sorted_[1:] != sorted_[:-1]]))
        lengths = np.diff(np.append(starts, prompts.size))
        self.revisits = np.zeros(prompts.size, np.bool_)
        self.revisits[self._order] = np.repeat(lengths > 1, lengths)
        longest_first = np.argsort(-lengths, kind="stable")
        self._starts, self._lengths = starts[longest_first], lengths[longest_first]

    def blocks(self, groups: int) -> Iterator[list[IntArray]]:
        """Yield the groups of some prompts, visit by visit, as ``drift.Visits`` wants them."""
        ends = np.cumsum(self._lengths)
        first = 0
        while first < ends.size:
            before = int(ends[first] - self._lengths[first])
            last = max(int(np.searchsorted(ends, before + groups, "right")), first + 1)
            yield self._by_visit(np.arange(first, last))
            first = last

    def sample(self, groups: int) -> list[IntArray]:
        """Return the groups of evenly spaced prompts, about so many, visit by visit."""
        every = max(-(-self._order.size // groups), 1)
        return self._by_visit(np.arange(0, self._lengths.size, every))

    def _by_visit(self, prompts: IntArray) -> list[IntArray]:
        lengths, starts = self._lengths[prompts], self._starts[prompts]
        return [
            self._order[starts[: int(np.count_nonzero(lengths > visit))] + visit]
            for visit in range(int(lengths[0]))
        ]

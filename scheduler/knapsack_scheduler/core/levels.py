"""Gains of rollouts whose rewards have more than two levels.

A group is effective if its rewards are not all equal. With shares pi_k of the levels that
has probability ``1 - sum_k pi_k^N``, and its value is that times the information gain
``I(p) = p^i q^j`` of the success rate p, the sum of the shares of those levels that are
successes. One more rollout gains ``sum_k I pi_k^N (1 - pi_k)``.

Under a Dirichlet posterior of the shares every term has a closed form: after N draws of
level k the posterior is a Dirichlet again, so that expectations are products of ratios.
The other levels are taken apart by class, because I(p) asks for successes and failures
only: the first different reward is of the other class, or of another level of the same.
With one level in each class all of this is the Beta posterior of ``core/objective.py``.
"""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.chains import Chain, Marginals
from knapsack_scheduler.core.moments import log_rising, moment
from knapsack_scheduler.core.problem import (
    Begun,
    BoolArray,
    FloatArray,
    IntArray,
    Levels,
    Posterior,
)


def class_weights(columns: FloatArray, success: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return the weights of successes and of failures, alpha and beta, float64[M].

    Added level by level, so that no level weighs more than its class by a rounding.

    Args:
        columns: weight of each level, float64[M, K].
        success: levels that are successes, bool[K].
    """
    alpha, beta = np.zeros(len(columns)), np.zeros(len(columns))
    for level, good in enumerate(success.tolist()):
        if good:
            alpha += columns[:, level]
        else:
            beta += columns[:, level]
    return alpha, beta


def level_marginals(i: int, j: int, posterior: Posterior, begun: Begun) -> Marginals:
    """Return the expected gains of the next rollouts, of groups new or begun.

    A new group gains by every level; one of which only level k was seen by what differs
    from it; a mixed one nothing. Of a new group the gains begin with the second rollout,
    and rollouts still running take the first places.

    Args:
        i, j: exponents of the information gain.
        posterior: with levels; knows the delivered outcomes.
        begun: of the groups, with the level that each has seen.
    """
    levels = _levels(posterior)
    fresh = begun.delivered == 0
    steps = np.where(fresh, np.maximum(begun.outstanding, 1), begun.outstanding)
    chains = []
    for k in range(levels.success.size):
        seen = np.zeros_like(fresh) if begun.level is None else begun.level == k
        open_ = fresh | (seen & ~begun.mixed)
        if open_.any():
            for chain in _first_differences(i, j, posterior, levels, k):
                chains.append(chain.only(open_).advanced(steps))
    if not chains:
        nothing = np.zeros_like(posterior.alpha)
        chains.append(Chain(nothing, nothing, np.ones_like(nothing), 1))
    return Marginals(tuple(chains))


def _first_differences(i: int, j: int, posterior: Posterior, levels: Levels, k: int) -> list[Chain]:
    """Return E[I pi_k^n (1 - pi_k)] from n = 0 on, as chains by what the difference is."""
    share = levels.concentration[:, k]
    own, other, x, y = _sides(i, j, posterior, bool(levels.success[k]))
    total = own + other + float(x + y + 1)
    chains = [Chain(moment(own, other, x, y + 1), own + float(x), total, 1, (share, own))]
    if np.count_nonzero(levels.success == levels.success[k]) > 1:
        rest = np.maximum(own - share, 0.0) / own
        inside = rest * moment(own, other, x + 1, y)
        chains.append(Chain(inside, own + float(x + 1), total, 1, (share, own + 1.0)))
    return chains


def level_values(
    i: int, j: int, posterior: Posterior, begun: Begun, further: IntArray
) -> FloatArray:
    """Return the expected value of each whole group in closed form, float64[M].

    For reports only: exact to about 1e-12, and not bit by bit.

    Args:
        i, j: exponents of the information gain; 0 and 0 give the probability that the
            group is effective.
        posterior: with levels; knows the delivered outcomes.
        begun: of the groups, with the level that each has seen.
        further: rollouts of the group beside the delivered ones, int64[M].
    """
    levels = _levels(posterior)
    gain = moment(posterior.alpha, posterior.beta, i, j)
    n = further.astype(np.float64)
    whole = log_rising(posterior.alpha + posterior.beta, n)
    fresh = begun.delivered == 0
    alike = np.zeros_like(gain)
    for k in range(levels.success.size):
        own, other, x, y = _sides(i, j, posterior, bool(levels.success[k]))
        # A level without weight never comes; the logarithm of 0 is not wanted.
        share = np.maximum(levels.concentration[:, k], np.finfo(np.float64).tiny)
        of_level = np.exp(log_rising(share, n) - whole) * moment(own + n, other, x, y)
        seen = np.zeros_like(fresh) if begun.level is None else begun.level == k
        alike += np.where(fresh | seen, of_level, 0.0)
    value = np.where(fresh & (further < 2), 0.0, gain - alike)
    return np.maximum(np.where(begun.mixed, gain, value), 0.0)


def _levels(posterior: Posterior) -> Levels:
    if posterior.levels is None:
        raise ValueError("posterior.levels = None: needs the levels of the rewards")
    return posterior.levels


def _sides(
    i: int, j: int, posterior: Posterior, success: bool
) -> tuple[FloatArray, FloatArray, int, int]:
    """Return a level's class and the other one: their weights and their exponents in I."""
    if success:
        return posterior.alpha, posterior.beta, i, j
    return posterior.beta, posterior.alpha, j, i

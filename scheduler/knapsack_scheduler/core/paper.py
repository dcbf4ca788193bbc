"""The paper's rule as its authors released it, to be compared with.

Knapsack RL (arXiv 2509.25849; github.com/liziniu/KnapsackRL) takes a success rate from a
prompt's newest rewards as it stands: prompts that sometimes succeed are divided by the
knapsack, those that never or always did get the minimum, those too little known an even
share, and what the sometimes successful can hardly use goes to the never successful.
Different from the release where that is plainly not meant: ``max_rollouts`` binds
everywhere, a prompt never seen is not taken for one that never succeeds, the gain of the
first rollout above the minimum is its own, and there is always an answer.
"""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.evidence import Visits
from knapsack_scheduler.core.many import divide_alike
from knapsack_scheduler.core.objective import PAPER
from knapsack_scheduler.core.problem import Bounds, FloatArray, IntArray, KeyArray, Recent
from knapsack_scheduler.core.ties import fill_lowest

RECENT = 16
"""Rewards that a success rate is taken from: the newest visit's, or the newest so many."""

LEAST = 8
"""Rewards below which a prompt is taken as unknown."""

_BITS = 32
"""Of the largest group."""


def recent_outcomes(visits: Visits, rows: IntArray) -> Recent:
    """Return the newest rewards of each row; -1 is a prompt never seen."""
    count = np.zeros(rows.shape)
    successes = np.zeros(rows.shape)
    known = rows >= 0
    picked = rows[known]
    taken, good = np.zeros(picked.shape), np.zeros(picked.shape)
    newest = visits.step[picked, 0]
    for slot in range(visits.rollouts.shape[1]):
        n = visits.rollouts[picked, slot].astype(np.float64)
        k = visits.successes[picked, slot].astype(np.float64)
        # All of the newest visit, then as many as are missing.
        whole = visits.step[picked, slot] == newest
        share = np.where(whole, n, np.clip(RECENT - taken, 0.0, n))
        good += np.where(n > 0.0, share * k / np.maximum(n, 1.0), 0.0)
        taken += share
    count[known], successes[known] = taken, good
    return Recent(count, successes)


def paper_sizes(recent: Recent, bounds: Bounds, total: int, tie_keys: KeyArray) -> IntArray:
    """Return the rollouts of each position, int64[M].

    Args:
        recent: newest rewards of each position's prompt.
        bounds: of the groups.
        total: the budget, which the bounds hold.
        tie_keys: break ties.
    """
    unknown = recent.rollouts < LEAST
    p = np.where(unknown, 0.5, recent.successes / np.maximum(recent.rollouts, 1.0))
    # Shares of visits are fractions: what never or always succeeded is told by counts.
    failed = ~unknown & (recent.successes == 0.0)
    solved = ~unknown & (recent.successes == recent.rollouts)
    effective = ~unknown & ~failed & ~solved
    sizes = bounds.minimum.copy()
    even = np.clip(total // max(sizes.size, 1), bounds.minimum, bounds.most)
    sizes += _level(sizes, np.where(unknown, even, sizes), total - int(sizes.sum()), tie_keys)
    rest = total - int(sizes.sum())
    useful = int(_ninety_percent(p[effective], bounds.most[effective]).sum())
    surplus = max(rest - useful, 0)
    receivers = failed if failed.any() else ~effective
    sizes += _level(sizes, np.where(receivers, bounds.most, sizes), surplus, tie_keys)
    rest = total - int(sizes.sum())
    marginals = PAPER.at_rates(p).only(effective).advanced(np.maximum(sizes - 1, 0))
    room = bounds.most - sizes
    return sizes + divide_alike(marginals, sizes, room, rest, tie_keys).num_rollouts


def _level(sizes: IntArray, most: IntArray, rollouts: int, tie_keys: KeyArray) -> IntArray:
    """Return up to ``rollouts`` more, given evenly to those below their ``most``."""
    room = int((most - sizes).sum())
    return fill_lowest(sizes, most, min(rollouts, room), tie_keys)


def _ninety_percent(p: FloatArray, most: IntArray) -> IntArray:
    """Return the rollouts after which a group is effective with 90 %, at most ``most``.

    floor(log 0.1 / log max(p, q)), found bit by bit with squares, by multiplication
    only, which is the same everywhere.
    """
    powers = [np.maximum(p, 1.0 - p)]
    for _ in range(_BITS - 1):
        powers.append(powers[-1] * powers[-1])
    left = np.ones_like(p)
    needed = np.zeros(p.shape, np.int64)
    for bit in reversed(range(_BITS)):
        fits = left * powers[bit] >= 0.1
        left = np.where(fits, left * powers[bit], left)
        needed += fits * np.int64(1 << bit)
    return np.minimum(needed, most)

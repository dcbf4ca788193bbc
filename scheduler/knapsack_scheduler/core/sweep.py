"""A pass over the gains of a batch from the first rollout up, highest prompts longest.

The gains are never all computed: they are swept in blocks of levels, and a prompt is
dropped as soon as its next gain lies below what the collector is sure to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from knapsack_scheduler.core.chains import Chain, Marginals
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray

_BLOCK = 4096
"""Gains computed at once: enough to hide NumPy's overhead, and little is wasted when
the bound falls inside the block."""

_CHUNK = 1 << 15
"""Rows swept together where the bound is known."""


class Collector(Protocol):
    """Takes the gains of a sweep and says below which they no longer matter."""

    @property
    def bound(self) -> float:
        """No gain below this can be part of the answer; never falls."""

    def add(self, rows: IntArray, gains: FloatArray) -> None:
        """Take gains of consecutive rollouts, [len(rows), levels]; -1 where there is none."""


def sweep(
    marginals: Marginals, capacity: IntArray, pairs: BoolArray | None, collector: Collector
) -> None:
    """Hand every gain that may matter to the collector, in order for each prompt.

    Args:
        marginals: gains of the next rollouts; where ``pairs``, of the second and
            further ones, the second being worth both.
        capacity: most rollouts of each position, int64[M]; 2 or more where ``pairs``.
        pairs: bool[M], positions whose first two rollouts come together.
        collector: see ``Collector``.
    """
    left = capacity
    ceiling = None
    if pairs is not None:
        # The halves of a pair are worth the same as its third rollout, which must not
        # come before them by a rounding.
        ceiling = np.where(pairs, 0.5 * marginals.first, np.inf)
        paired = np.flatnonzero(pairs)
        collector.add(paired, ceiling[paired, None])
        left = left - pairs
    rows = np.flatnonzero(left > 0)
    # A bound that is known beforehand drops most rows soon, whatever the others are worth:
    # a part of them at a time stays in the cache.
    size = _CHUNK if collector.bound > 0.0 else max(rows.size, 1)
    for start in range(0, rows.size, size):
        _sweep_rows(marginals, left, ceiling, collector, rows[start : start + size])


def _sweep_rows(
    marginals: Marginals,
    left: IntArray,
    ceiling: FloatArray | None,
    collector: Collector,
    active: IntArray,
) -> None:
    left = left[active]
    chains = [chain.take(active) for chain in marginals.chains]
    t = 0
    while active.size:
        # At most twice what is behind: the few that go on seldom go on for long.
        levels = max(1, min(_BLOCK // active.size, int(left.max()), 2 * t or _BLOCK))
        gains, following = _block(chains[0], t, levels)
        reached = [following]
        for chain in chains[1:]:
            more, following = _block(chain, t, levels)
            gains += more
            reached.append(following)
        if ceiling is not None:
            np.minimum(gains, ceiling[active, None], out=gains)
        last = gains[:, -1].copy()
        if int(left.min()) < levels:
            gains[np.arange(levels) >= left[:, None]] = -1.0
        collector.add(active, gains)
        t += levels
        alive = (left > levels) & (last > 0.0) & (last >= collector.bound)
        active = active[alive]
        left = left[alive] - levels
        chains = [
            chain.replaced(following).take(alive)
            for chain, following in zip(chains, reached, strict=True)
        ]


def _block(chain: Chain, t: int, levels: int) -> tuple[FloatArray, FloatArray]:
    """Return x(t) .. x(t + levels - 1) and x(t + levels), chain.value being x(t)."""
    if levels == 1:
        return chain.value[:, None].copy(), chain.value * chain.ratios(t, 1)[:, 0]
    block = np.empty((chain.value.shape[0], levels + 1))
    block[:, 0] = chain.value
    block[:, 1:] = chain.ratios(t, levels)
    np.multiply.accumulate(block, axis=1, out=block)
    return block[:, :-1], block[:, -1].copy()


def count_gains(
    like: IntArray,
    blocks: Iterable[tuple[IntArray, FloatArray]],
    chosen: Callable[[FloatArray], BoolArray],
) -> IntArray:
    """Return how many gains of each position are chosen, int64 of the shape of ``like``."""
    counts = np.zeros_like(like)
    for rows, gains in blocks:
        counts[rows] += chosen(gains).sum(axis=1)
    return counts

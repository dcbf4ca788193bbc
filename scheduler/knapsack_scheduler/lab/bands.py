"""How hard a prompt is at a step, in words: from solved to unsolved."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import FloatArray, IntArray

BANDS = ("solved", "easy", "medium", "hard", "unsolved")

_FROM = (0.95, 2 / 3, 1 / 3, 0.05)
"""Least success rate of each band but the last."""

BOUNDS = "solved above 95 %, easy above 67 %, medium above 33 %, hard above 5 %, unsolved below"
"""The bands in words."""


def band_of(success_rate: FloatArray) -> IntArray:
    """Return the band of each success rate, int64[n], a position in ``BANDS``."""
    return np.searchsorted(-np.array(_FROM), -success_rate, side="left").astype(np.int64)

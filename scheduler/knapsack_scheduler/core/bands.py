"""How hard each prompt is at present, in six bands, for people to look at.

Nothing is decided by a band: a few rewards place a prompt in one, where the posterior
keeps saying how little they prove.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.evidence import Visits
from knapsack_scheduler.core.problem import IntArray

BANDS = ("unseen", "unsolved", "hard", "medium", "easy", "solved")
"""Names of the bands, by their number."""

RECENT = 16
"""Newest rollouts that a prompt is placed by: those of its newest visits, all of a visit or
none of it, until they are as many."""

HARD, EASY = 0.25, 0.75
"""Success rates between which a prompt is medium, both included."""

BandArray = npt.NDArray[np.int8]


def bands_of(visits: Visits, rows: IntArray) -> BandArray:
    """Return the band of each row, int8[n]: 0 unseen to 5 solved.

    Of the rewards counted, none succeeded (unsolved), less than a quarter (hard), more than
    three quarters (easy), all (solved), or a share between (medium).
    """
    rollouts = np.zeros(rows.shape, np.int64)
    successes = np.zeros(rows.shape, np.int64)
    for slot in range(visits.rollouts.shape[1]):
        wanted = rollouts < RECENT
        if not wanted.any():
            break
        rollouts += visits.rollouts[rows, slot] * wanted
        successes += visits.successes[rows, slot] * wanted
    bands = np.full(rows.shape, BANDS.index("medium"), np.int8)
    bands[successes < HARD * rollouts] = BANDS.index("hard")
    bands[successes > EASY * rollouts] = BANDS.index("easy")
    bands[successes == 0] = BANDS.index("unsolved")
    bands[successes == rollouts] = BANDS.index("solved")
    bands[rollouts == 0] = BANDS.index("unseen")
    return bands


def population(bands: BandArray) -> IntArray:
    """Return how many prompts are in each band, int64[6]."""
    return np.bincount(bands, minlength=len(BANDS)).astype(np.int64)

"""Prompts in bands, by their newest rollouts."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.bands import BANDS, bands_of, population
from knapsack_scheduler.core.evidence import Visits, merge_visits


def placed(*visits: tuple[int, int]) -> str:
    """Return the band of a prompt with these visits, (rollouts, successes), oldest first."""
    seen = Visits(1)
    for step, (rollouts, successes) in enumerate(visits):
        merge_visits(seen, np.array([0]), step, 0, np.array([rollouts]), np.array([successes]))
    return BANDS[int(bands_of(seen, np.array([0]))[0])]


def test_a_band_is_the_share_of_successes() -> None:
    """Its ends belong to the medium band; nothing and everything have their own."""
    shares = [placed((8, k)) for k in range(9)]
    assert shares == ["unsolved", "hard", *["medium"] * 5, "easy", "solved"]
    assert placed() == "unseen"


def test_the_newest_sixteen_count_and_whole_visits() -> None:
    """A prompt that is solved lately is solved, whatever it was before."""
    assert placed((8, 0), (16, 16)) == "solved"
    assert placed((8, 0), (15, 15)) == "medium"
    assert placed((100, 0), (1, 1), (15, 15)) == "solved"


def test_a_population_has_every_band() -> None:
    """Counts in the order of the bands."""
    assert population(np.array([0, 5, 5, 2], np.int8)).tolist() == [1, 0, 1, 0, 0, 2]

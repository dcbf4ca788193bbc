"""The paper's dynamic program, as its authors released it, to measure against.

Written from reading ``verl/trainer/ppo/exploration_utils.py`` of github.com/liziniu/KnapsackRL.
Kept: the recursion over prompts, spent budget and further rollouts of the prompt; the
value computed with powers inside the innermost loop; full tables of values (float64) and
of choices (two int32 each), walked back from the whole budget; compiled by numba with its
plain ``njit``. Left out: the minimum is worth its value here, where the release takes it as
worth nothing (which makes its answer fall short of the optimum by a little, and changes
nothing of the work); prompts of rate 0 or 1 and the estimates and fallbacks around the
program, which are ``core/paper.py``.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def _tables(rates: np.ndarray, budget: int, room: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    prompts = len(rates)
    best = np.full((prompts + 1, budget + 1), -np.inf)
    best[0, 0] = 0.0
    choice = np.full((prompts + 1, budget + 1, 2), -1, dtype=np.int32)
    for i in range(1, prompts + 1):
        p = rates[i - 1]
        none = (1 - p**least - (1 - p) ** least) * p * ((1 - p) ** 2)
        for spent in range(budget + 1):
            if best[i - 1, spent] + none > best[i, spent]:
                best[i, spent] = best[i - 1, spent] + none
                choice[i, spent, 0] = i - 1
                choice[i, spent, 1] = 0
            for k in range(1, min(room + 1, spent + 1)):
                if best[i - 1, spent - k] == -np.inf:
                    continue
                value = (1 - p ** (k + least) - (1 - p) ** (k + least)) * p * ((1 - p) ** 2)
                reached = best[i - 1, spent - k] + value
                if reached > best[i, spent]:
                    best[i, spent] = reached
                    choice[i, spent, 0] = i - 1
                    choice[i, spent, 1] = k
    return best, choice


def solve_as_released(rates: np.ndarray, total: int, least: int, most: int) -> np.ndarray:
    """Return the sizes of groups, int64[M]: the optimum of the paper's objective."""
    _, choice = _tables(rates, total - least * len(rates), most - least, least)
    sizes = np.full(len(rates), least)
    spent = total - least * len(rates)
    for i in range(len(rates), 0, -1):
        more = int(choice[i, spent, 1])
        sizes[choice[i, spent, 0]] += more
        spent -= more
    return sizes


def table_bytes(prompts: int, total: int, least: int) -> int:
    """Return the size of both tables."""
    return 16 * (prompts + 1) * (total - least * prompts + 1)

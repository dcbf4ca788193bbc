"""Slow and obvious answers to compare the core with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from math import comb

import numpy as np

EXPONENTS = {"paper": (1, 2), "effective": (0, 0), "variance": (1, 1)}


def value(num_rollouts: int, p: float, objective: str) -> float:
    """Return (1 - p^N - q^N) p^i q^j as a sum of gains, which loses no digits."""
    if num_rollouts < 2:
        return 0.0
    i, j = EXPONENTS[objective]
    q = 1.0 - p
    weight = p ** (i + 1) * q ** (j + 1)
    return weight * sum(p ** (n - 1) + q ** (n - 1) for n in range(1, num_rollouts))


def rising(x: Fraction, n: int) -> Fraction:
    """Return x (x + 1) .. (x + n - 1) exactly."""
    product = Fraction(1)
    for t in range(n):
        product *= x + t
    return product


def beta_moment(a: Fraction, b: Fraction, x: int, y: int) -> Fraction:
    """Return E[p^x q^y] of Beta(a, b) exactly."""
    return rising(a, x) * rising(b, y) / rising(a + b, x + y)


def posterior_value(num_rollouts: int, alpha: float, beta: float, objective: str) -> float:
    """Return E[(1 - p^N - q^N) p^i q^j] of Beta(alpha, beta), exactly, as a float."""
    if num_rollouts < 2:
        return 0.0
    i, j = EXPONENTS[objective]
    a, b = Fraction(alpha), Fraction(beta)
    n = num_rollouts
    return float(
        beta_moment(a, b, i, j) - beta_moment(a, b, i + n, j) - beta_moment(a, b, i, j + n)
    )


def best_value(
    values: Sequence[Callable[[int], float]],
    total: int,
    minimum: Sequence[int],
    maximum: Sequence[int],
) -> float | None:
    """Return the highest sum of values over all divisions, or None if there is none.

    Dynamic program over prompts and rollouts. A prompt with minimum 0 gets none or at
    least 2.
    """
    best: list[float | None] = [0.0] + [None] * total
    for of, low, high in zip(values, minimum, maximum, strict=True):
        counts = [n for n in range(low, min(high, total) + 1) if not (low == 0 and n == 1)]
        worth = {n: of(n) for n in counts}
        following: list[float | None] = [None] * (total + 1)
        for spent, so_far in enumerate(best):
            if so_far is None:
                continue
            for n in counts:
                if spent + n > total:
                    break
                candidate = so_far + worth[n]
                known = following[spent + n]
                if known is None or candidate > known:
                    following[spent + n] = candidate
        best = following
    return best[total]


def chance_of(successes: int, rollouts: int, p: Fraction) -> Fraction:
    """Return the binomial probability of that many successes."""
    return comb(rollouts, successes) * p**successes * (1 - p) ** (rollouts - successes)


def value_tables(p: np.ndarray, objectives: Sequence[str], most: int) -> np.ndarray:
    """Return ``value`` of 0 .. ``most`` rollouts, [I, M, most + 1].

    Args:
        p: success rates of I instances, [I, M].
        objectives: of each instance.
    """
    i, j = np.array([EXPONENTS[name] for name in objectives]).T[:, :, None]
    q = 1.0 - p
    weight = p ** (i + 1) * q ** (j + 1)
    n = np.arange(most - 1)
    gains = weight[..., None] * (p[..., None] ** n + q[..., None] ** n)
    table = np.zeros((*p.shape, most + 1))
    table[..., 2:] = np.cumsum(gains, axis=-1)
    return table


@cache
def _posterior_column(alpha: float, beta: float, objective: str, most: int) -> tuple[float, ...]:
    return tuple(posterior_value(n, alpha, beta, objective) for n in range(most + 1))


def posterior_tables(
    alpha: np.ndarray, beta: np.ndarray, objectives: Sequence[str], most: int
) -> np.ndarray:
    """Return ``posterior_value`` of 0 .. ``most`` rollouts, exactly rounded, [I, M, most + 1].

    Every pair of alpha and beta is computed once.
    """
    return np.array(
        [
            [_posterior_column(a, b, name, most) for a, b in zip(*rows, strict=True)]
            for *rows, name in zip(alpha.tolist(), beta.tolist(), objectives, strict=True)
        ]
    )


def allowed_sizes(tables: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the tables with -inf where a size is out of bounds or a group of one.

    Args:
        tables: [I, M, K].
        low, high: bounds of the sizes, [I, M].
    """
    n = np.arange(tables.shape[-1])
    lows, highs = low[..., None], high[..., None]
    wrong = (n < lows) | (n > highs) | ((n == 1) & (lows == 0))
    return np.where(wrong, -np.inf, tables)


def best_sums(tables: np.ndarray, budget: int, costs: np.ndarray | None = None) -> np.ndarray:
    """Return the best sum of one option of each row at every total cost, [I, budget + 1].

    The textbook dynamic program, of I instances at once; -inf where nothing has that
    cost.

    Args:
        tables: values of options, -inf where not allowed, [I, M, K].
        budget: highest total cost.
        costs: cost of every option, whole numbers, [I, M, K]; None: option n costs n.
    """
    instances, rows, options = tables.shape
    best = np.full((instances, budget + 1), -np.inf)
    best[:, 0] = 0.0
    spent = np.arange(budget + 1)
    for row in range(rows):
        following = np.full_like(best, -np.inf)
        for n in range(options):
            worth = tables[:, row, n, None]
            if costs is None:
                part = best[:, : max(budget + 1 - n, 0)]
                np.maximum(following[:, n:], part + worth, out=following[:, n:])
            else:
                before = spent - costs[:, row, n, None]
                part = np.take_along_axis(best, np.maximum(before, 0), axis=1)
                np.maximum(following, np.where(before >= 0, part + worth, -np.inf), out=following)
        best = following
    return best


def best_of_all(
    tables: np.ndarray, costs: np.ndarray, budgets: np.ndarray, exactly: np.ndarray | bool = False
) -> np.ndarray:
    """Return the best sum within each budget by looking at every choice there is, [I].

    Args:
        tables: values of options, -inf where not allowed, [I, M, K].
        costs: cost of every option, [I, M, K].
        budgets: [I].
        exactly: where the whole budget must be spent, [I].
    """
    instances, rows = tables.shape[:2]
    worth, spent = np.zeros((instances, 1)), np.zeros((instances, 1))
    for row in range(rows):
        worth = (worth[:, :, None] + tables[:, row, None, :]).reshape(instances, -1)
        spent = (spent[:, :, None] + costs[:, row, None, :]).reshape(instances, -1)
    slack = 1e-9 * np.maximum(np.abs(budgets), 1.0)[:, None]
    fits = spent <= budgets[:, None] + slack
    fits &= (spent >= budgets[:, None] - slack) | ~np.asarray(exactly)[..., None]
    best: np.ndarray = np.where(fits, worth, -np.inf).max(axis=1)
    return best

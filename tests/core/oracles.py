"""Slow and obvious answers to compare the core with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from math import comb

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


def best_value_within_cost(
    values: Sequence[Callable[[int], float]],
    costs: Sequence[float],
    budget: float,
    minimum: Sequence[int],
    maximum: Sequence[int],
) -> float:
    """Return the highest sum of values of all divisions that cost at most the budget."""
    best = float("-inf")
    ranges = [range(low, high + 1) for low, high in zip(minimum, maximum, strict=True)]
    for counts in product(*ranges):
        lone = any(n == 1 and low == 0 for n, low in zip(counts, minimum, strict=True))
        cost = sum(n * c for n, c in zip(counts, costs, strict=True))
        if lone or cost > budget * (1 + 1e-12):
            continue
        best = max(best, sum(of(n) for of, n in zip(values, counts, strict=True)))
    return best


def chance_of(successes: int, rollouts: int, p: Fraction) -> Fraction:
    """Return the binomial probability of that many successes."""
    return comb(rollouts, successes) * p**successes * (1 - p) ** (rollouts - successes)

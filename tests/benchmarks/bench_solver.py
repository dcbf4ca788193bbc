"""Speed of the exact solver, as ratios to two other exact ways, in one run.

    python tests/benchmarks/bench_solver.py [--sizes 256 1024 ...]

Prompts from Beta(1/2, 1/2), 8 rollouts each on average, bounds 2..128, the paper's
objective. ``dynamic program`` is the textbook recursion over prompts and rollouts (the
paper's way), vectorised over the budget; ``heap`` takes one rollout at a time from a
priority queue. Every row is the median of interleaved repetitions; every answer is
checked to have the same value.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable

import numpy as np

from knapsack_scheduler import solve, solve_posterior

LOW, HIGH, MEAN = 2, 128, 8


def by_heap(p: np.ndarray) -> np.ndarray:
    total = MEAN * len(p)
    counts = [LOW] * len(p)
    entries = []
    for row, x in enumerate(p.tolist()):
        q = 1.0 - x
        weight = x * x * q * q * q
        entries.append((-weight * (x ** (LOW - 1) + q ** (LOW - 1)), row, weight, x, q))
    heapq.heapify(entries)
    for _ in range(total - LOW * len(p)):
        _, row, weight, x, q = entries[0]
        counts[row] += 1
        n = counts[row]
        gain = weight * (x ** (n - 1) + q ** (n - 1)) if n < HIGH else -1.0
        heapq.heapreplace(entries, (-gain, row, weight, x, q))
    return np.array(counts)


def by_dynamic_program(p: np.ndarray) -> np.ndarray:
    total = MEAN * len(p)
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((len(p), total + 1), np.int16)
    for row, x in enumerate(p):
        following = np.full(total + 1, -np.inf)
        for n in range(LOW, HIGH + 1):
            value = x * (1 - x) ** 2 * (1 - x**n - (1 - x) ** n)
            reached = best[: total + 1 - n] + value
            better = reached > following[n:]
            following[n:][better] = reached[better]
            choice[row, n:][better] = n
        best = following
    counts = np.zeros(len(p), int)
    left = total
    for row in range(len(p) - 1, -1, -1):
        counts[row] = choice[row, left]
        left -= counts[row]
    return counts


def by_sweep(p: np.ndarray) -> np.ndarray:
    return solve(p, MEAN * len(p), LOW, HIGH)


def by_sweep_posterior(p: np.ndarray) -> np.ndarray:
    return solve_posterior(0.5 + 8 * p, 0.5 + 8 * (1 - p), MEAN * len(p), LOW, HIGH)


def worth(p: np.ndarray, counts: np.ndarray) -> float:
    return float((p * (1 - p) ** 2 * (1 - p**counts - (1 - p) ** counts)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 10_000, 100_000])
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{'prompts':>9} {'sweep ms':>9} {'posterior':>10} {'heap':>8} {'dynamic program':>16}")
    for size in arguments.sizes:
        p = np.random.default_rng(size).beta(0.5, 0.5, size)
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "sweep": by_sweep,
            "posterior": by_sweep_posterior,
        }
        if size <= 10_000:
            ways["heap"] = by_heap
        if size <= 1024:
            ways["dynamic program"] = by_dynamic_program
        times: dict[str, list[float]] = {name: [] for name in ways}
        answers = {}
        for _ in range(arguments.repeat if size <= 1024 else 3):
            for name, way in ways.items():
                if name == "dynamic program" and len(times[name]) == 2:
                    continue
                start = time.perf_counter()
                answers[name] = way(p)
                times[name].append(time.perf_counter() - start)
        reference = worth(p, answers["sweep"])
        for name in ("heap", "dynamic program"):
            if name in answers and not np.isclose(worth(p, answers[name]), reference, rtol=1e-12):
                raise SystemExit(f"{name} found another value at {size} prompts")
        base = statistics.median(times["sweep"])
        cells = [f"{size:>9,}", f"{base * 1e3:>9.2f}"]
        for name, width in (("posterior", 9), ("heap", 7), ("dynamic program", 15)):
            if times.get(name):
                cells.append(f"{statistics.median(times[name]) / base:>{width}.2f}x")
            else:
                cells.append(f"{'-':>{width + 1}}")
        print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()

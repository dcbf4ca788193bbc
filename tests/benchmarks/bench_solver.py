"""Speed, memory and growth of the exact solver, as ratios within one run.

    python tests/benchmarks/bench_solver.py [--sizes 256 1024 ...]

Prompts from Beta(1/2, 1/2), 8 rollouts each on average, bounds 2..128, the paper's
objective. First against other exact ways on distinct success rates: the paper's dynamic
program as released (``paper_program.py``, needs numba), a heap that takes one rollout at a
time, and ``np.partition`` of the prompts x rollouts matrix of gains. Then the solver alone on
batches of every kind.

Times are medians of interleaved repetitions, in seconds of the processor, so that a busy
machine disturbs little; everything runs in one thread. One pass over memory is
``np.add(p, 1.0, out=column)``: a float64 column read and a column of 8 bytes per prompt
written. At the largest size every call of either begins with the cache full of something
else; "cached" is the pass when both columns lie in it, "new" when the answer is a new column,
as every answer of the solver is. Memory is the peak that tracemalloc sees of one more run
(NumPy reports its arrays to it), without the arguments; for the dynamic program it is the
size of its two tables. Every answer is checked to have the same value as the others', and
every short cut of the solver to give the same vector as dividing one by one: else the exit
code is not 0.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import math
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler import solve, solve_posterior
from knapsack_scheduler.core import many

LOW, HIGH, MEAN = 2, 128, 8
MOST_MATRIX = 2**28
"""Bytes of the matrix of gains that np.partition may have."""

CACHE = 2**27
"""Bytes that fill any cache."""

Way = Callable[[], np.ndarray]


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


def by_partition(p: np.ndarray) -> np.ndarray:
    rest = (MEAN - LOW) * len(p)
    q = 1.0 - p
    weight = p * p * q * q * q
    gains = np.empty((len(p), HIGH - LOW))
    passed, failed = weight * p ** (LOW - 1), weight * q ** (LOW - 1)
    for level in range(HIGH - LOW):
        np.add(passed, failed, out=gains[:, level])
        passed *= p
        failed *= q
    price = np.partition(gains, gains.size - rest, axis=None)[gains.size - rest]
    counts = LOW + np.count_nonzero(gains > price, axis=1)
    left = MEAN * len(p) - int(counts.sum())
    tied = np.flatnonzero((gains == price).any(axis=1))
    counts[tied[:left]] += 1
    return counts


def worth(p: np.ndarray, counts: np.ndarray) -> float:
    return math.fsum(p * (1 - p) ** 2 * (1 - p**counts - (1 - p) ** counts))


def medians(ways: dict[str, Way], repeat: int, before: Way | None = None) -> dict[str, float]:
    """Return the median seconds of every way, taken in turn, fast ones several times.

    Args:
        ways: what to measure.
        repeat: rounds.
        before: called before every call; takes no part in the times.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            began = time.thread_time()
            for _ in range(10):
                if before is not None:
                    before()
                start = time.thread_time()
                way()
                end = time.thread_time()
                times[name].append(end - start)
                if end - began > 0.02:
                    break
    return {name: statistics.median(column) for name, column in times.items()}


def peak_bytes(way: Way) -> int:
    tracemalloc.start()
    try:
        way()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def growth(times: dict[int, float]) -> str:
    """Return the slope of log time over log prompts, by least squares."""
    if len(times) < 2:
        return "-"
    x, y = np.log(list(times)), np.log(list(times.values()))
    return f"M^{np.polyfit(x, y, 1)[0]:.2f}"


def amount(number: float) -> str:
    """Return three digits or so."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def one_by_one(way: Way) -> np.ndarray:
    """Return the answer without the short cuts of large batches."""
    least, many.MANY_PROMPTS = many.MANY_PROMPTS, sys.maxsize
    try:
        return way()
    finally:
        many.MANY_PROMPTS = least


def against_others(sizes: list[int], repeat: int) -> dict[str, dict[int, float]]:
    """Print and return the times of every way at every size that it can do."""
    with_numba = importlib.util.find_spec("numba") is not None
    if not with_numba:
        print("numba is not installed: the paper's program is left out\n")
    print("Distinct rates: ms and MB of ours; times ours and MB of the others")
    names = ["ours", "heap", "np.partition", "paper's program"]
    print(f"{'prompts':>9}" + "".join(f"{name:>21}" for name in names))
    times: dict[str, dict[int, float]] = {name: {} for name in names}
    for size in sizes:
        p = np.random.default_rng(size).beta(0.5, 0.5, size)
        ways: dict[str, Way] = {"ours": lambda p=p: solve(p, MEAN * len(p), LOW, HIGH)}
        memory: dict[str, float] = {}
        if size <= 100_000:
            ways["heap"] = lambda p=p: by_heap(p)
        if size * (HIGH - LOW) * 8 <= MOST_MATRIX:
            ways["np.partition"] = lambda p=p: by_partition(p)
        if size <= 1024 and with_numba:
            from paper_program import solve_as_released, table_bytes

            solve_as_released(p[:8], 64, LOW, HIGH)
            ways["paper's program"] = lambda p=p: solve_as_released(p, MEAN * len(p), LOW, HIGH)
            memory["paper's program"] = table_bytes(size, MEAN * size, LOW)
        value = worth(p, ways["ours"]())
        slow = {name: ways.pop(name) for name in list(ways) if name in names[3:] and size > 256}
        took = medians(ways, repeat if size <= 1024 else 3)
        took |= medians(slow, 1)
        cells = [f"{size:>9,}"]
        for name in names:
            if name not in took:
                cells.append(f"{'-':>21}")
                continue
            way = (ways | slow)[name]
            if name not in memory:
                memory[name] = peak_bytes(way)
            times[name][size] = took[name]
            if not math.isclose(worth(p, way()), value, rel_tol=1e-12):
                raise SystemExit(f"{name} found another value at {size} prompts")
            ratio = took[name] / took["ours"]
            left = f"{took[name] * 1e3:.2f}" if name == "ours" else f"{amount(ratio)}x"
            cells.append(f"{left:>12}{memory[name] / 1e6:>9.2f}")
        print("".join(cells), flush=True)
    print(f"{'growth':>9}" + "".join(f"{growth(times[name]):>12}{'':9}" for name in names))
    return times


def populations(size: int) -> dict[str, Way]:
    """Return every kind of batch as what divides it."""
    rng = np.random.default_rng(size)
    p = rng.beta(0.5, 0.5, size)
    eighths, sixteenths = rng.binomial(8, p), rng.binomial(16, p)
    alpha, beta = 0.4 + sixteenths, 0.6 + 16 - sixteenths
    low = rng.integers(1, 4, size)
    few = low + rng.choice([6, 30, 126], size)
    high = low + rng.integers(0, 2 * HIGH, size)
    total = MEAN * size
    return {
        "distinct": lambda: solve(p, total, LOW, HIGH),
        "k/8": lambda q=eighths / 8: solve(q, total, LOW, HIGH),
        "k/16": lambda q=sixteenths / 16: solve(q, total, LOW, HIGH),
        "posterior of k/16": lambda: solve_posterior(alpha, beta, total, LOW, HIGH),
        "k/16, mixed bounds": lambda q=sixteenths / 16: solve(q, total, low, few),
        "k/16, skipping": lambda q=sixteenths / 16: solve(q, total, 0, HIGH),
        "distinct, mixed bounds": lambda: solve(p, total, low, high),
        "distinct, skipping": lambda: solve(p, total, 0, HIGH),
    }


@dataclass
class Kind:
    """What one kind of batch took at the largest size: seconds, bytes, passes over memory."""

    seconds: float
    memory: int
    passes: float
    cached: float


def every_kind(sizes: list[int], repeat: int) -> dict[str, Kind]:
    """Print the times of every kind of batch; return what the largest took."""
    largest = max(sizes)
    source, column = np.random.default_rng(0).random(largest), np.zeros(largest)
    other = np.zeros(CACHE // 8)
    passing = {"pass": lambda: np.add(source, 1.0, out=column)}
    cached = medians(passing, repeat)["pass"]

    def fill_cache() -> np.ndarray:
        return np.add(other, 1.0, out=other)

    print(f"\nOurs by kind of batch: ms; passes over memory and MB at {largest:,}")
    header = "".join(f"{size:>10,}" for size in sizes)
    print(f"{'kind':<23}{header}{'growth':>8}{'passes':>8}{'cached':>8}{'MB':>8}")
    batches = {size: populations(size) for size in sizes}
    result = {}
    for kind in batches[sizes[0]]:
        times = {}
        for size in sizes:
            way = batches[size][kind]
            if not np.array_equal(way(), one_by_one(way)):
                raise SystemExit(f"{kind}: another vector than one by one at {size} prompts")
            if size < largest:
                times[size] = medians({kind: way}, repeat)[kind]
        ways: dict[str, Way] = {kind: way, **passing, "new": lambda: np.add(source, 1.0)}
        took = medians(ways, repeat, fill_cache)
        times[largest] = took[kind]
        found = Kind(took[kind], peak_bytes(way), took[kind] / took["pass"], took[kind] / cached)
        cells = "".join(f"{times[size] * 1e3:>10.2f}" for size in sizes)
        print(
            f"{kind:<23}{cells}{growth(times):>8}{amount(found.passes):>8}"
            f"{amount(found.cached):>8}{found.memory / 1e6:>8.1f}",
            flush=True,
        )
        result[kind] = found
    print(
        f"one pass: {took['pass'] * 1e3:.2f} ms, cached {cached * 1e3:.2f} ms, "
        f"into a new column {took['new'] * 1e3:.2f} ms"
    )
    return result


def whole_process(size: int) -> float:
    """Return the largest resident set, in MB, of a process that divides one distinct batch."""
    # The high-water mark of the process itself: getrusage counts its parent's before exec.
    code = (
        "import numpy as np; from knapsack_scheduler import solve; "
        f"p = np.random.default_rng(0).beta(0.5, 0.5, {size}); solve(p, {MEAN * size}); "
        "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 1024, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--repeat", type=int, default=9)
    arguments = parser.parse_args()
    sizes = sorted(arguments.sizes)
    times = against_others(sizes, arguments.repeat)
    kinds = every_kind(sizes, arguments.repeat)
    print()
    for size, took in times["paper's program"].items():
        print(f"paper's program / ours at {size:,}: {amount(took / times['ours'][size])}x")
    name = f"{max(sizes):,}"
    for kind in ("distinct", "distinct, mixed bounds"):
        print(f"{name} {kind}: {kinds[kind].seconds:.3g} s, {kinds[kind].memory / 1e6:.0f} MB")
    print(f"{name} distinct, whole process: {whole_process(max(sizes)):.0f} MB resident at most")
    for kind in ("distinct", "k/8", "k/16", "posterior of k/16", "k/16, mixed bounds"):
        print(
            f"{name} {kind}: {amount(kinds[kind].passes)}x one pass over memory, "
            f"{amount(kinds[kind].cached)}x a cached one"
        )


if __name__ == "__main__":
    main()

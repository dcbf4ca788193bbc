"""How near any two waves can come to the oracle that knows every success rate.

    python tests/benchmarks/bound_two_waves.py [--scenarios 1000 1110] [--seed 0]

On scenarios drawn at random, four ways to give a step's budget in two waves:

- half: what the scheduler does when asked to give half of the budget first;
- planned: what it does when asked to plan for two waves;
- population: knows the exact distribution of the success rates at every step, but not which
  prompt has which, and forgets each prompt after its step;
- ideal: knows the law that success rates are drawn and move by, and what common learning did
  since, and filters each prompt's whole history exactly through it, on a grid of log-odds. Its
  first wave is once of a share of the budget, and once of the sizes that are best for a second
  wave to follow: per prompt the n that maximises the expected value of both waves less the
  rollouts of both at one price, which is the optimum for many prompts.

The population and the shares of the ideal are given the best of several shares in hindsight, per
scenario. Values are expected ones over the luck of the second wave, and of all rollouts for the
oracle; what all of them see of the first wave is the same luck. Success rates move as under the
ideal. Nobody has what the last two know: what they do not reach, no two waves will, but for luck.
110 scenarios take about half an hour.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import numpy as np

from knapsack_scheduler.core.problem import Budget
from knapsack_scheduler.core.solve import solve
from knapsack_scheduler.lab.population import (
    Luck,
    batches,
    draw_population,
    drift,
    information_gain,
    success_rates,
)
from knapsack_scheduler.lab.random_scenarios import random_scenario
from knapsack_scheduler.lab.scenario import Scenario
from knapsack_scheduler.lab.tracker import Tracker
from knapsack_scheduler.runconfig import RunConfig

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
MOST = 128
LARGEST_FIRST = 25

# Log-odds of the grid, never and always at its ends.
ODDS = np.concatenate([[-np.inf], np.arange(-9.0, 9.01, 0.15), [np.inf]])
RATES = 1.0 / (1.0 + np.exp(-ODDS))
GAINS = RATES * (1.0 - RATES) ** 2
# A normal distribution as three points.
GROWTH, GROWTH_WEIGHT = np.array([-(1.5**0.5), 0.0, 1.5**0.5]), np.full(3, 1.0 / 3.0)

_FAILED = (1.0 - RATES)[:, None] ** np.arange(MOST + 1)
_PASSED = RATES[:, None] ** np.arange(MOST + 1)
_TABLE = np.concatenate(
    [(GAINS * RATES)[:, None] * _FAILED, (GAINS * (1.0 - RATES))[:, None] * _PASSED,
     _FAILED, _PASSED], axis=1,
)  # fmt: skip


class Gains:
    """What rollouts gain under beliefs over the grid, [prompts, rollouts before].

    Attributes:
        success, failure: of the first success after nothing but failures; the other way round.
        all_failed, all_passed: chances of these.
    """

    def __init__(self, beliefs: np.ndarray) -> None:
        columns = np.split(beliefs @ _TABLE, 4, axis=1)
        self.success, self.failure, self.all_failed, self.all_passed = columns

    def at_once(self, total: int) -> np.ndarray:
        """Return the sizes that are worth most if nothing follows, 2 or more each."""
        more = (self.success + self.failure)[:, 2:MOST]
        return 2 + highest(more, np.full(len(more), MOST - 2), total - 2 * len(more))

    def before_a_second(self, total: int, price: float) -> tuple[np.ndarray, float]:
        """Return the sizes that are worth most if a second wave follows, and the price."""
        sizes = np.arange(2, LARGEST_FIRST + 1)
        rows = np.arange(len(self.success))
        first = np.cumsum((self.success + self.failure)[:, 1:], axis=1)[:, : sizes.size]
        for _ in range(4):
            worth, spent = first - price * sizes, np.tile(sizes.astype(float), (len(rows), 1))
            for gain, chance in (
                (self.success, self.all_failed),
                (self.failure, self.all_passed),
            ):
                least = price * chance[:, sizes]
                end = np.stack([np.searchsorted(-g[:MOST], -at) for g, at in zip(gain, least)])  # noqa: B905
                end = np.maximum(end, sizes)
                summed = np.pad(np.cumsum(gain[:, :MOST], axis=1), ((0, 0), (1, 0)))
                worth += summed[rows[:, None], end] - summed[rows[:, None], sizes]
                worth -= least * (end - sizes)
                spent += chance[:, sizes] * (end - sizes)
            best = worth.argmax(axis=1)
            asked = float(spent[rows, best].sum())
            if abs(asked - total) < 0.004 * total:
                break
            price *= (asked / total) ** 1.5
        chosen = sizes[best]
        while chosen.sum() > total:
            chosen = np.maximum(chosen - 1, 2)
        return chosen, price

    def then(self, first: np.ndarray, passed: np.ndarray, total: int) -> np.ndarray:
        """Return the second wave after ``passed`` of ``first`` succeeded."""
        at = np.minimum(first[:, None] + np.arange(MOST), MOST - 1)
        rows = np.arange(first.size)[:, None]
        after_failures = self.success[rows, at] / self.all_failed[rows, first[:, None]]
        after_passes = self.failure[rows, at] / self.all_passed[rows, first[:, None]]
        nothing = np.zeros_like(after_failures)
        gains = np.where((passed == first)[:, None], after_passes, nothing)
        gains = np.where((passed == 0)[:, None], after_failures, gains)
        return highest(gains, MOST - first, total - int(first.sum()))


def highest(gains: np.ndarray, capacity: np.ndarray, total: int) -> np.ndarray:
    """Return how many of the ``total`` highest gains each row has; they fall within a row."""
    wide = gains.shape[1]
    open_ = np.where(np.arange(wide) < capacity[:, None], gains, -1.0).ravel()
    total = min(total, int(np.minimum(capacity, wide).sum()))
    if total <= 0:
        return np.zeros(len(gains), np.int64)
    return np.bincount(np.argpartition(-open_, total - 1)[:total] // wide, minlength=len(gains))


def value(rates: np.ndarray, first: np.ndarray, passed: np.ndarray, second: np.ndarray) -> float:
    """Return the expected value of both waves, known the outcome of the first."""
    chance = np.where(passed == 0, 1.0 - (1.0 - rates) ** second, 1.0 - rates**second)
    mixed = (passed > 0) & (passed < first)
    return float((rates * (1.0 - rates) ** 2 * np.where(mixed, 1.0, chance)).sum())


def moved(shift: np.ndarray | float, deviation: float) -> np.ndarray:
    """Return where each point of the grid goes, [from, to]."""
    inner = ODDS[1:-1]
    away = (inner[None, :] - (inner + shift)[:, None]) / max(deviation, 0.075)
    kernel = np.exp(-0.5 * away * away) + 1e-300
    matrix = np.eye(ODDS.size)
    matrix[1:-1, 1:-1] = kernel / kernel.sum(axis=1, keepdims=True)
    return matrix


def places(logits: np.ndarray) -> np.ndarray:
    """Return the point of the grid that each is nearest to."""
    inner = np.searchsorted((ODDS[1:-2] + ODDS[2:-1]) / 2.0, logits) + 1
    return np.where(np.isinf(logits), np.where(logits > 0, ODDS.size - 1, 0), inner)


class Filter:
    """What the ideal believes of every prompt: weights of grid and growth."""

    def __init__(self, scenario: Scenario, logits: np.ndarray) -> None:
        self._scenario = scenario
        spread = np.bincount(places(logits), minlength=ODDS.size) / logits.size
        self._weights = np.tile(spread[None, :, None] * GROWTH_WEIGHT, (logits.size, 1, 1))
        self._seen = np.zeros(logits.size, np.int64)
        self._learned = [0.0]

    def beliefs(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Return the beliefs of some prompts at a step, [prompts, grid]."""
        drift_law, per_epoch = self._scenario.drift, self._scenario.run.steps_per_epoch
        waited = step - self._seen[rows]
        for steps in np.unique(waited[waited > 0]).tolist():
            late = rows[waited == steps]
            part = steps / per_epoch
            common = self._learned[step] - self._learned[step - steps]
            for g, deviate in enumerate(GROWTH):
                shift = (drift_law.per_epoch + drift_law.spread * deviate) * part + common
                self._weights[late, :, g] @= moved(shift, drift_law.walk * part**0.5)
        self._seen[rows] = step
        self._weights[rows] /= self._weights[rows].sum(axis=(1, 2), keepdims=True)
        return self._weights[rows].sum(axis=2)

    def learn(self, rows: np.ndarray, size: np.ndarray, passed: np.ndarray, common: float) -> None:
        """Take in a step's outcomes, and what all prompts learned of it."""
        tiny = 1e-300
        chance = passed[:, None] * np.log(np.maximum(RATES, tiny))
        chance = chance + (size - passed)[:, None] * np.log(np.maximum(1.0 - RATES, tiny))
        chance -= chance.max(axis=1, keepdims=True)
        self._weights[rows] *= np.exp(chance)[:, :, None]
        if self._scenario.learning.own:
            taught = rows[(passed > 0) & (passed < size)]
            own = moved(self._scenario.learning.own * GAINS[1:-1], 0.0)
            self._weights[taught] = np.einsum("pgd,gh->phd", self._weights[taught], own)
        self._learned.append(self._learned[-1] + common)


def run(scenario: Scenario, seed: int) -> dict[str, float]:
    """Return the value of every way after the first epoch."""
    law, total = scenario.run, scenario.run.total_rollouts
    count = law.prompts_per_step
    population = draw_population(scenario, seed)
    logits = population.logits.copy()
    ideal, price = Filter(scenario, logits), 0.01
    config = RunConfig(min_rollouts=law.min_rollouts, max_rollouts=law.max_rollouts)
    trackers = {"half": Tracker(config), "planned": Tracker(config)}
    values: defaultdict[str, float] = defaultdict(float)
    step = 0
    for epoch in range(law.epochs):
        for rows in batches(scenario, seed, epoch):
            rates = success_rates(logits[rows])
            luck = Luck(seed, step, count)

            def passed_of(size: np.ndarray, luck: Luck = luck, rates: Any = rates) -> np.ndarray:
                passed = luck.passed(rates, int(size.max()))
                return (passed & (np.arange(passed.shape[1]) < size[:, None])).sum(axis=1)

            def note(name: str, amount: float, counts: bool = epoch > 0) -> None:
                values[name] += amount * counts

            def alone(size: np.ndarray, rates: Any = rates) -> float:
                differ = 1.0 - rates**size - (1.0 - rates) ** size
                return float((differ * rates * (1.0 - rates) ** 2).sum())

            note("uniform", alone(np.full(count, total / count)))
            note("oracle", alone(solve(rates, total, law.min_rollouts, law.max_rollouts)))
            ids = tuple(population.prompt_ids[row] for row in rows.tolist())
            budgets = {"half": Budget(total, wave_fraction=0.5), "planned": Budget(total, waves=2)}
            for name, budget in budgets.items():
                note(name, _scheduler(trackers[name], step, ids, budget, luck, rates))

            spread = np.bincount(places(logits), minlength=ODDS.size) / logits.size
            unknown = Gains(np.tile(spread, (count, 1)))
            known = Gains(ideal.beliefs(rows, step))
            for share in SHARES:
                wave = max(round(share * total), 2 * count)
                even = wave // count + (np.arange(count) < wave % count)
                for name, gains, first in (
                    (f"population {share}", unknown, even),
                    (f"ideal {share}", known, known.at_once(wave)),
                ):
                    passed = passed_of(first)
                    note(name, value(rates, first, passed, gains.then(first, passed, total)))
            first, price = known.before_a_second(total, price)
            second = known.then(first, passed_of(first), total)
            note("ideal sizes", value(rates, first, passed_of(first), second))

            size = first + second
            passed = passed_of(size)
            gain = information_gain(rates, (passed > 0) & (passed < size))
            common = scenario.learning.transfer * float(gain.mean())
            ideal.learn(rows, size, passed, common)
            logits += common
            logits[rows] += scenario.learning.own * gain
            logits += drift(scenario, population, seed, step)
            step += 1
    return dict(values)


def _scheduler(
    tracker: Tracker,
    step: int,
    ids: tuple[str, ...],
    budget: Budget,
    luck: Luck,
    rates: np.ndarray,
) -> float:
    """Return the value of the scheduler's two waves, and report both to it."""
    count = rates.size
    done = np.zeros(count, np.int64)
    result = 0.0
    for wave in range(2):
        if wave == 0:
            new = tracker.allocate(step, ids, tracker.bounds(count), budget).num_rollouts
        else:
            new = tracker.extend().num_rollouts
            before = luck.passed(rates, int(done.max()))
            passed = (before & (np.arange(before.shape[1]) < done[:, None])).sum(axis=1)
            result = value(rates, done, passed, new)
        outcomes = luck.passed(rates, int((done + new).max()))
        place = np.arange(outcomes.shape[1])
        chosen = (place >= done[:, None]) & (place < (done + new)[:, None])
        owner = np.repeat(np.arange(count), new)
        tracker.report(owner, outcomes[chosen].astype(np.float32), policy_version=step)
        done = done + new
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenarios", type=int, nargs=2, default=(1000, 1110))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = []
    for number in range(*arguments.scenarios):
        scenario = random_scenario(number)
        values = run(scenario, arguments.seed)
        for name in ("population", "ideal"):
            values[name] = max(values[f"{name} {share}"] for share in SHARES)
        rates = success_rates(draw_population(scenario, arguments.seed).logits)
        size = scenario.run.rollouts_per_prompt
        effective = float((1.0 - rates**size - (1.0 - rates) ** size).mean())
        found.append((effective, values))
    print("Random scenarios, value after the first epoch. At the start, of uniform's groups")
    for title, least, most in (
        ("any share is effective", 0.0, 1.1),
        ("half and more are effective", 0.5, 1.1),
        ("less than half are effective", 0.0, 0.5),
    ):
        of = [values for effective, values in found if least <= effective < most]
        print(f"\n{title}: {len(of)} scenarios")
        for name in ("oracle", "half", "planned", "population", "ideal", "ideal sizes"):
            above = sum(100.0 * (v[name] / v["uniform"] - 1.0) for v in of) / max(len(of), 1)
            reached = sum(v[name] >= v["oracle"] for v in of)
            print(f"  {name:<12} {above:+6.2f}% over uniform, reaches the oracle on {reached}")


if __name__ == "__main__":
    main()

"""A simulated run: every arm on the same prompts, in the same order, with the same luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.problem import (
    Begun,
    BoolArray,
    FloatArray,
    IntArray,
    Posterior,
)
from knapsack_scheduler.core.solve import solve
from knapsack_scheduler.lab.arms import ORACLE, Arm
from knapsack_scheduler.lab.population import (
    BANDS,
    Luck,
    bands_of,
    batches,
    draw_population,
    drift,
    information_gain,
    success_rates,
)
from knapsack_scheduler.lab.scenario import Scenario
from knapsack_scheduler.lab.tracker import Tracker
from knapsack_scheduler.runconfig import RunConfig


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of one arm with one seed, a number per step unless said otherwise.

    Attributes:
        arm, seed: whose.
        epoch: of each step, from 0.
        groups: prompts with a rollout.
        effective_groups: those whose rewards differ.
        rollouts: given.
        effective_rollouts: those in groups whose rewards differ.
        value: realised, under the true success rates; see ``realised_values``.
        predicted_effective_groups, predicted_effective_rollouts, predicted_value: expected
            at the decision of the last wave.
        largest_group: rollouts of the largest group.
        tokens: expected completion tokens of the rollouts, from the true mean lengths.
        band_rollouts: [steps, 5], by true success rate, in the order of ``BANDS``.
        band_groups: [steps, 5].
        success_rate: mean over all prompts at the start and after each epoch, [epochs + 1].
    """

    arm: Arm
    seed: int
    epoch: IntArray
    groups: FloatArray
    effective_groups: FloatArray
    rollouts: FloatArray
    effective_rollouts: FloatArray
    value: FloatArray
    predicted_effective_groups: FloatArray
    predicted_effective_rollouts: FloatArray
    predicted_value: FloatArray
    largest_group: FloatArray
    tokens: FloatArray
    band_rollouts: FloatArray
    band_groups: FloatArray
    success_rate: FloatArray


@dataclass(frozen=True, slots=True)
class _Group:
    """What an arm did in one step: sizes, what came out, what was expected."""

    num_rollouts: IntArray
    successes: IntArray
    expected: tuple[float, float, float]

    @property
    def effective(self) -> BoolArray:
        return (self.successes > 0) & (self.successes < self.num_rollouts)


@dataclass(slots=True)
class _Side:
    """An arm under way."""

    arm: Arm
    logits: FloatArray
    tracker: Tracker | None
    steps: list[dict[str, float]] = field(default_factory=list)
    bands: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    success_rate: list[float] = field(default_factory=list)


def simulate(
    scenario: Scenario,
    arms: Sequence[Arm],
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Trace]:
    """Return what every arm does with one seed, in the order of ``arms``.

    Luck is common: rollout j of a prompt in a step has the same in every arm, so that arms
    differ in what they ask only. With learning their success rates part, their luck does
    not.

    Args:
        scenario: the prompts.
        arms: what to compare.
        seed: 0 or more.
        on_step: called with the number of steps done.

    Raises:
        ValueError: an arm cannot do the scenario.
    """
    run = scenario.run
    for arm in arms:
        if arm.policy == "paper" and run.min_rollouts == 0:
            raise ValueError(
                f"arms = {arm.name!r}: needs run.min_rollouts of 1 or more, scenario "
                f"{scenario.name!r} has 0"
            )
    population = draw_population(scenario, seed)
    sides = [_Side(arm, population.logits.copy(), _tracker(scenario, arm)) for arm in arms]
    for side in sides:
        side.success_rate.append(float(success_rates(side.logits).mean()))
    step = 0
    for epoch in range(run.epochs):
        for rows in batches(scenario, seed, epoch):
            prompt_ids = tuple(population.prompt_ids[row] for row in rows.tolist())
            luck = Luck(seed, step, rows.size)
            moved = drift(scenario, population, seed, step)
            for side in sides:
                rates = success_rates(side.logits[rows])
                group = _act(scenario, side, step, prompt_ids, rates, luck)
                _record(side, group, rates, population.tokens[rows])
                side.logits += moved
                _learn(scenario, side, rows, information_gain(rates, group.effective))
            step += 1
            on_step(step)
        for side in sides:
            side.success_rate.append(float(success_rates(side.logits).mean()))
    epochs = np.repeat(np.arange(run.epochs), run.steps_per_epoch)
    return [_trace(side, seed, epochs) for side in sides]


def realised_values(
    objective_name: str, rates: FloatArray, num_rollouts: IntArray, successes: IntArray
) -> FloatArray:
    """Return what each group was worth, known its success rate and what came out.

    ``I(p)`` where the rewards differ, else 0, for the objectives with an ``I``; what the
    rule itself says of a group of that size, for the others.
    """
    effective = (successes > 0) & (successes < num_rollouts)
    objective = find_objective(objective_name)
    if isinstance(objective, Objective):
        return np.where(effective, rates**objective.i * (1.0 - rates) ** objective.j, 0.0)
    sure = 1e12
    known = Posterior(np.maximum(rates * sure, 1e-9), np.maximum((1.0 - rates) * sure, 1e-9))
    return objective.values(known, Begun.nothing(rates.size), num_rollouts)


def _tracker(scenario: Scenario, arm: Arm) -> Tracker | None:
    if arm.policy == ORACLE:
        return None
    return Tracker(
        RunConfig(
            policy=arm.policy,
            objective=arm.objective,
            min_rollouts=scenario.run.min_rollouts,
            max_rollouts=scenario.run.max_rollouts,
        )
    )


def _act(
    scenario: Scenario,
    side: _Side,
    step: int,
    prompt_ids: tuple[str, ...],
    rates: FloatArray,
    luck: Luck,
) -> _Group:
    """Divide the step's budget, wave by wave, and see what comes out."""
    if side.tracker is None:
        return _ask_oracle(scenario, side.arm, prompt_ids, rates, luck)
    tracker, total = side.tracker, scenario.run.total_rollouts
    size = np.zeros(rates.size, np.int64)
    expected = (0.0, 0.0, 0.0)
    for wave, fraction in enumerate(side.arm.wave_fractions):
        if wave == 0:
            bounds, budget = tracker.bounds(rates.size), side.arm.budget(total)
            decision = tracker.allocate(step, prompt_ids, bounds, budget)
        else:
            decision = tracker.extend(fraction)
        before, size = size, size + decision.num_rollouts
        passed = luck.passed(rates, int(size.max()))
        place = np.arange(passed.shape[1])
        new = (place >= before[:, None]) & (place < size[:, None])
        owner = np.repeat(np.arange(rates.size), decision.num_rollouts)
        tracker.report(owner, passed[new].astype(np.float32), policy_version=step)
        reasons = decision.reasons
        expected = (reasons.effective_group_rate, reasons.effective_rollout_rate, reasons.value)
    return _Group(size, _successes(luck, rates, size), expected)


def _ask_oracle(
    scenario: Scenario,
    arm: Arm,
    prompt_ids: tuple[str, ...],
    rates: FloatArray,
    luck: Luck,
) -> _Group:
    run = scenario.run
    size = solve(
        rates,
        run.total_rollouts,
        run.min_rollouts,
        run.max_rollouts,
        arm.objective,
        prompt_ids=prompt_ids,
    )
    chance = np.where(size > 0, 1.0 - rates**size - (1.0 - rates) ** size, 0.0)
    groups, rollouts = max(int(np.count_nonzero(size)), 1), max(int(size.sum()), 1)
    worth = find_objective(arm.objective).at_rates(rates).summed(np.maximum(size - 1, 0))
    expected = (
        float(chance.sum()) / groups,
        float((chance * size).sum()) / rollouts,
        float(worth.sum()),
    )
    return _Group(size, _successes(luck, rates, size), expected)


def _successes(luck: Luck, rates: FloatArray, size: IntArray) -> IntArray:
    passed = luck.passed(rates, int(size.max()))
    given = np.arange(passed.shape[1]) < size[:, None]
    successes: IntArray = (passed & given).astype(np.int64).sum(axis=1)
    return successes


def _record(side: _Side, group: _Group, rates: FloatArray, tokens: FloatArray) -> None:
    size, effective = group.num_rollouts, group.effective
    groups, rollouts = int(np.count_nonzero(size)), int(size.sum())
    value = realised_values(side.arm.objective, rates, size, group.successes).sum()
    side.steps.append(
        {
            "groups": groups,
            "effective_groups": int(np.count_nonzero(effective)),
            "rollouts": rollouts,
            "effective_rollouts": int(size[effective].sum()),
            "value": float(value),
            "predicted_effective_groups": group.expected[0] * groups,
            "predicted_effective_rollouts": group.expected[1] * rollouts,
            "predicted_value": group.expected[2],
            "largest_group": int(size.max()),
            "tokens": float((size * tokens).sum()),
        }
    )
    band = bands_of(rates)
    side.bands.append(
        (
            np.bincount(band, weights=size, minlength=len(BANDS)),
            np.bincount(band[size > 0], minlength=len(BANDS)),
        )
    )


def _learn(scenario: Scenario, side: _Side, rows: IntArray, gain: FloatArray) -> None:
    if scenario.learns:
        side.logits += scenario.learning.transfer * float(gain.mean())
        side.logits[rows] += scenario.learning.own * gain


def _trace(side: _Side, seed: int, epochs: IntArray) -> Trace:
    columns: Any = {name: np.array([s[name] for s in side.steps]) for name in side.steps[0]}
    band_rollouts, band_groups = zip(*side.bands, strict=True)
    return Trace(
        arm=side.arm,
        seed=seed,
        epoch=epochs,
        band_rollouts=np.array(band_rollouts),
        band_groups=np.array(band_groups),
        success_rate=np.array(side.success_rate),
        **columns,
    )

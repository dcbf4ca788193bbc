"""The simulation: budgets, luck, drift, learning."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from knapsack_scheduler.lab.arms import ARMS, find_arms
from knapsack_scheduler.lab.population import (
    BANDS,
    Luck,
    bands_of,
    batches,
    draw_population,
    information_gain,
    success_rates,
)
from knapsack_scheduler.lab.scenario import Scenario
from knapsack_scheduler.lab.simulate import Trace, realised_values, simulate
from knapsack_scheduler.lab.tracker import Tracker

SMALL: dict[str, Any] = {"prompts": 96, "prompts_per_step": 32, "epochs": 3}


def scenario(*bands: dict[str, Any], run: dict[str, Any] | None = None, **more: Any) -> Scenario:
    """Return a small scenario."""
    band = tuple({"share": 1.0 / len(bands), "logit_mean": 0.0} | b for b in bands)
    return Scenario.model_validate(
        {"name": "small", "run": SMALL | (run or {}), "band": band} | more
    )


def changed(world: Scenario, **parts: Any) -> Scenario:
    """Return the scenario with some parts replaced."""
    return Scenario.model_validate(world.model_dump() | parts)


WIDE = scenario({"logit_mean": -3.0}, {"logit_sd": 1.5}, {"logit_mean": 3.0, "always": 0.2})


def by_name(traces: list[Trace]) -> dict[str, Trace]:
    """Return traces by the names of their arms."""
    return {trace.arm.name: trace for trace in traces}


def same(one: Trace, other: Trace) -> bool:
    """Return whether every number of two traces is the same."""
    return all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(Trace)
        if f.name not in ("arm", "seed")
    )


@pytest.mark.parametrize("least", [0, 1, 2])
def test_every_arm_spends_the_budget_within_the_bounds(least: int) -> None:
    """To the rollout, in every step."""
    run = {"min_rollouts": least, "max_rollouts": 12, "rollouts_per_prompt": 4.5}
    world = changed(WIDE, run=SMALL | run)
    arms = find_arms([name for name in ARMS if least or name != "paper"])
    for trace in simulate(world, arms, 0):
        assert (trace.rollouts == 144).all()
        assert (trace.band_rollouts.sum(axis=1) == 144).all()
        assert (trace.largest_group <= 12).all()
        assert (trace.groups <= 32).all()
        assert least == 0 or (trace.groups == 32).all()
        assert trace.epoch.tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_the_paper_s_rule_refuses_to_skip() -> None:
    """As the service does."""
    world = scenario({}, run={"min_rollouts": 0})
    with pytest.raises(ValueError, match=r"'paper': needs run\.min_rollouts"):
        simulate(world, find_arms(["paper"]), 0)


def test_luck_is_common() -> None:
    """What one arm does neither depends on which others run, nor is it another seed's."""
    world = changed(WIDE, learning={"own": 3.0, "transfer": 1.0})
    together = by_name(simulate(world, find_arms(list(ARMS)), 4))
    for name in ("posterior-2-waves", "oracle", "uniform"):
        [alone] = simulate(world, find_arms([name]), 4)
        assert same(alone, together[name])
        [other] = simulate(world, find_arms([name]), 5)
        assert not same(alone, other)


def test_a_larger_group_begins_with_the_smaller_one_s_rollouts() -> None:
    """Rollout j of a prompt at a step is the same rollout in every arm."""
    half = np.full(32, 0.5)
    passed = Luck(0, 3, 32).passed(half, 100)
    assert passed.shape == (32, 100)
    again = Luck(0, 3, 32)
    for most in (5, 40, 100):
        assert np.array_equal(again.passed(half, most), passed[:, :most])
    assert not np.array_equal(Luck(0, 4, 32).passed(half, 100), passed)
    assert not np.array_equal(Luck(1, 3, 32).passed(half, 100), passed)
    assert passed.mean() == pytest.approx(0.5, abs=0.03)
    assert not np.array_equal(passed[:, :32], passed[:, 32:64])
    assert (Luck(0, 3, 32).passed(half + 0.1, 100) >= passed).all()
    # Uniform asks rollouts 0 to 7 of every prompt: its outcomes are known beforehand.
    [trace] = simulate(WIDE, find_arms(["uniform"]), 0)
    population = draw_population(WIDE, 0)
    for step, rows in enumerate([r for e in range(3) for r in batches(WIDE, 0, e)]):
        p = success_rates(population.logits[rows])
        passed = Luck(0, step, 32).passed(p, 8)
        effective = passed.any(axis=1) & ~passed.all(axis=1)
        assert trace.effective_groups[step] == effective.sum()
        assert trace.value[step] == pytest.approx((p * (1 - p) ** 2)[effective].sum())


def test_waves_report_one_rollout_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tracker is told of a group, wave by wave, are its first rollouts, each once."""
    told: dict[int, dict[int, list[float]]] = {}
    report = Tracker.report

    def spy(self: Tracker, owner: Any, rewards: Any, policy_version: int) -> Any:
        groups = told.setdefault(self.allocation.step, {})
        for position, reward in zip(owner.tolist(), rewards.tolist(), strict=True):
            groups.setdefault(position, []).append(reward)
        return report(self, owner, rewards, policy_version)

    monkeypatch.setattr(Tracker, "report", spy)
    [trace] = simulate(WIDE, find_arms(["posterior-3-waves"]), 0)
    population = draw_population(WIDE, 0)
    for step, rows in enumerate([r for e in range(3) for r in batches(WIDE, 0, e)]):
        passed = Luck(0, step, 32).passed(success_rates(population.logits[rows]), 256)
        for position, rewards in told[step].items():
            assert rewards == passed[position, : len(rewards)].tolist()
        assert sum(map(len, told[step].values())) == trace.rollouts[step]
        mixed = sum(0 < sum(g) < len(g) for g in told[step].values())
        assert mixed == trace.effective_groups[step]


def test_bands_have_their_shares_and_exact_rates() -> None:
    """Of 96 prompts: a third each, and a fifth of the easy ones never fails."""
    population = draw_population(WIDE, 1)
    assert np.isposinf(population.logits).sum() == round(0.2 * 32)
    assert (population.logits[:32] < 0.5).all()
    rates = np.array([0.0, 0.019, 0.02, 0.25, 0.75, 0.98, 1.0])
    assert [BANDS[b] for b in bands_of(rates)] == [
        "unsolved", "unsolved", "hard", "medium", "easy", "solved", "solved",
    ]  # fmt: skip


def test_epochs_draw_every_prompt_once() -> None:
    """In another order each time; what fills no batch is left out."""
    world = scenario({}, run={"prompts": 100})
    epochs = [batches(world, 0, epoch) for epoch in range(2)]
    for rows in epochs:
        assert rows.shape == (3, 32)
        assert np.unique(rows).size == 96
    assert not np.array_equal(*epochs)


def test_drift_moves_everybody_alike() -> None:
    """A logit of 0 that grows by 1 an epoch ends at 3, in every arm; infinite ones stay."""
    world = scenario({"logit_sd": 0.0}, drift={"per_epoch": 1.0})
    for trace in simulate(world, find_arms(list(ARMS)), 0):
        assert trace.success_rate == pytest.approx(1 / (1 + np.exp(-np.arange(4.0))))
    fixed = scenario({"never": 0.5, "always": 0.5}, drift={"per_epoch": 1.0, "walk": 2.0})
    [trace] = simulate(fixed, find_arms(["posterior-2-waves"]), 0)
    assert trace.success_rate.tolist() == [0.5] * 4
    assert not trace.value.any()


def test_what_groups_teach_comes_back() -> None:
    """With learning the arms' success rates part, and rise with both rates; without, never."""
    still = simulate(WIDE, find_arms(["uniform", "oracle"]), 0)
    assert still[0].success_rate.tolist() == still[1].success_rate.tolist()
    ends = []
    for learning in ({"own": 2.0}, {"own": 4.0}, {"own": 4.0, "transfer": 2.0}):
        world = changed(WIDE, learning=learning)
        uniform, oracle = simulate(world, find_arms(["uniform", "oracle"]), 0)
        assert uniform.success_rate[-1] > uniform.success_rate[0]
        assert uniform.success_rate[-1] != oracle.success_rate[-1]
        ends.append(uniform.success_rate[-1])
    assert ends == sorted(ends)
    # One prompt grows by what its own group taught: own * p (1-p)^2 if it was effective.
    alone = scenario(
        {"logit_sd": 0.0},
        run={"prompts": 1, "prompts_per_step": 1, "epochs": 2, "rollouts_per_prompt": 64.0},
        learning={"own": 8.0},
    )
    [trace] = simulate(alone, find_arms(["uniform"]), 0)
    logit = 8.0 * 0.125
    p = 1 / (1 + np.exp(-logit))
    logit += 8.0 * p * (1 - p) ** 2
    assert trace.success_rate[1:] == pytest.approx([p, 1 / (1 + np.exp(-logit))])


def test_groups_whose_rewards_are_equal_teach_nothing() -> None:
    """And the others p (1-p)^2."""
    gain = information_gain(np.array([0.5, 0.5, 0.2]), np.array([True, False, True]))
    assert gain.tolist() == pytest.approx([0.125, 0.0, 0.128])


def test_an_oracle_gets_what_it_expects() -> None:
    """It knows the rates, so that predicted and realised differ by luck alone."""
    world = scenario({"logit_sd": 2.0}, run={"prompts": 1024, "prompts_per_step": 256})
    for seed in range(2):
        [trace] = simulate(world, find_arms(["oracle"]), seed)
        for predicted, realised in (
            (trace.predicted_effective_groups, trace.effective_groups),
            (trace.predicted_effective_rollouts, trace.effective_rollouts),
            (trace.predicted_value, trace.value),
        ):
            assert realised.sum() == pytest.approx(predicted.sum(), rel=0.03)


def test_values_are_those_of_the_objective() -> None:
    """I(p) of effective groups; for rules without an I, what the rule says of the size."""
    rates = np.array([0.5, 0.2, 0.2, 1.0])
    n, k = np.array([4, 8, 8, 8]), np.array([1, 0, 3, 8])
    assert realised_values("paper", rates, n, k).tolist() == pytest.approx([0.125, 0, 0.128, 0])
    assert realised_values("effective", rates, n, k).tolist() == [1, 0, 1, 0]
    assert realised_values("variance", rates, n, k).tolist() == pytest.approx([0.25, 0, 0.16, 0])
    hora = realised_values("hora", rates, n, k)
    # Counted from the first rollout, as the rule has it.
    expected = [0.5 - 0.5**4, 0.8 - 0.8**8, 0.8 - 0.8**8, 0.0]
    assert hora == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("objective", ["deviation", "gvm", "hora", "coba", "cero"])
def test_every_objective_can_be_simulated(objective: str) -> None:
    """Also those that look at a group's size only, also with rates of exactly 0 and 1."""
    world = scenario({"never": 0.3, "always": 0.3, "logit_sd": 2.0}, run={"epochs": 2})
    for trace in simulate(world, find_arms(list(ARMS), objective), 0):
        assert np.isfinite(trace.value).all()
        assert (trace.rollouts == 256).all()

"""What the policies win when success rates drift: whole simulated runs.

Value is the realised objective, the sum of p (1-p)^2 over groups whose rewards differ, with
the true p that no policy but the oracle sees. Seeds are fixed and draws are common.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest

from knapsack_scheduler.lab.arms import find_arms
from knapsack_scheduler.lab.measures import FIRST, GROUP_RATE, LATER, VALUE, Results
from knapsack_scheduler.lab.random_scenarios import random_scenario
from knapsack_scheduler.lab.scenario import load_scenario, shipped_names
from knapsack_scheduler.lab.simulate import simulate

RANDOM = tuple(f"random-{k}" for k in range(12))
NARROW = ("random-208", "random-230", "random-246")
"""One band, and a few prompts that never succeed: what no Beta distribution is like."""

SEEDS = {"shipped": 2, "random": 3}


@cache
def results(name: str) -> Results:
    """Return a scenario simulated with the arms that the claims are about."""
    arms = find_arms(["uniform", "posterior", "posterior-2-waves", "oracle"])
    if name in (*RANDOM, *NARROW):
        scenario, seeds = random_scenario(int(name.removeprefix("random-"))), SEEDS["random"]
    else:
        scenario, seeds = load_scenario(name), SEEDS["shipped"]
    runs = [{t.arm.name: t for t in simulate(scenario, arms, seed)} for seed in range(seeds)]
    return Results(scenario, arms, tuple(runs))


def gain(name: str, arm: str, window: str = LATER) -> float:
    """Return the value against uniform in %, the mean over paired seeds."""
    return results(name).against_uniform(arm, VALUE, window).mean


@pytest.mark.parametrize("name", [*shipped_names(), *RANDOM, *NARROW])
def test_posterior_is_not_below_uniform(name: str) -> None:
    """Once prompts have been seen, allocating by the posterior is worth at least as much."""
    assert gain(name, "posterior") >= 0.0


@pytest.mark.parametrize("name", shipped_names())
def test_waves_win_before_anything_is_known(name: str) -> None:
    """In the first epoch only waves can know more than uniform."""
    assert gain(name, "posterior-2-waves", FIRST) > 0.0
    assert gain(name, "posterior", FIRST) == pytest.approx(0.0, abs=0.5)


def reached(names: Sequence[str]) -> list[str]:
    """Return the scenarios on which two waves are worth what the one-shot oracle is."""
    return [n for n in names if gain(n, "posterior-2-waves") >= gain(n, "oracle")]


def test_two_waves_reach_the_one_shot_oracle_on_most() -> None:
    """Seeing half of the outcomes is worth as much as knowing every success rate, on most."""
    names = (*shipped_names(), *RANDOM)
    assert len(reached(names)) > len(names) / 2, reached(names)
    assert len(reached(shipped_names())) > len(shipped_names()) / 2


def test_what_two_waves_reach_depends_on_how_many_prompts_are_within_reach() -> None:
    """Where few groups are effective, half of a group does not tell which few prompts succeed."""

    def effective(name: str) -> float:
        return results(name).level("uniform", GROUP_RATE, LATER).mean

    within = [n for n in RANDOM if effective(n) >= 0.5]
    beyond = [n for n in RANDOM if effective(n) < 0.35]
    assert len(reached(within)) > len(within) / 2, reached(within)
    assert len(reached(beyond)) < len(beyond) / 2, reached(beyond)


@pytest.mark.parametrize("names", [shipped_names(), RANDOM], ids=["shipped", "random"])
def test_two_waves_are_above_uniform_everywhere(names: tuple[str, ...]) -> None:
    """And above one shot on most scenarios."""
    assert all(gain(n, "posterior-2-waves") > 0.0 for n in names)
    above = [n for n in names if gain(n, "posterior-2-waves") > gain(n, "posterior")]
    assert len(above) > len(names) / 2, above

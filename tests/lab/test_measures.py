"""What is said of an arm follows from its numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from knapsack_scheduler.lab.arms import ARMS
from knapsack_scheduler.lab.measures import (
    ALL,
    FIRST,
    GROUP_RATE,
    LATER,
    VALUE,
    Results,
    verdict,
)
from knapsack_scheduler.lab.scenario import Band, Run, Scenario
from knapsack_scheduler.lab.simulate import Trace
from knapsack_scheduler.lab.simulate_tables import main_table, overview_table

WORLD = Scenario(
    name="made up",
    run=Run(prompts=20, prompts_per_step=10, epochs=2),
    band=(Band(share=1.0, logit_mean=0.0),),
)


def trace(
    name: str,
    seed: int,
    groups: float,
    rollouts: float,
    value: float,
    bands: tuple[float, ...] = (16, 16, 16, 16, 16),
) -> Trace:
    """Return four steps of ten groups and 80 rollouts with those numbers each."""
    flat = {
        "groups": 10.0,
        "effective_groups": groups,
        "rollouts": 80.0,
        "effective_rollouts": rollouts,
        "value": value,
        "predicted_effective_groups": groups,
        "predicted_effective_rollouts": rollouts,
        "predicted_value": value,
        "largest_group": 9.0,
        "tokens": 0.0,
    }
    return Trace(
        arm=ARMS[name],
        seed=seed,
        epoch=np.array([0, 0, 1, 1]),
        band_rollouts=np.tile(bands, (4, 1)).astype(float),
        band_groups=np.full((4, 5), 2.0),
        success_rate=np.array([0.5, 0.5, 0.5]),
        **{key: np.full(4, number) for key, number in flat.items()},
    )


def results(*of_paper: tuple[float, float, float], bands: tuple[float, ...]) -> Results:
    """Return uniform at 5 of 10 groups, 40 of 80 rollouts and value 2, and a paper arm."""
    seeds = [
        {
            "uniform": trace("uniform", seed, 5, 40, 2.0),
            "paper": trace("paper", seed, *numbers, bands),
        }
        for seed, numbers in enumerate(of_paper)
    ]
    return Results(WORLD, (ARMS["uniform"], ARMS["paper"]), tuple(seeds))


EVEN = (16, 16, 16, 16, 16)


def test_a_rule_that_starves_others_is_named() -> None:
    """Above in one measure and below in another: what it wins, what it loses, and whose."""
    found = results((4, 56, 1.85), (4.1, 57, 1.85), bands=(8, 8, 48, 16, 0))
    assert verdict(found, "paper") == (
        "paper wins effective rollout rate (+20.6 points) and loses effective group rate (-9.5 "
        "points) and value (-7.5%), by starving others: it gives 60% of the rollouts to medium "
        "prompts (uniform 20%) and 0% to unsolved ones (uniform 20%)."
    )


def test_what_is_not_sure_is_neither_won_nor_lost() -> None:
    """A difference counts only with its whole interval."""
    found = results((4, 56, 1.9), (5.2, 57, 2.2), bands=EVEN)
    assert verdict(found, "paper") == (
        "paper is above uniform in effective rollout rate (+20.6 points), and not below it in "
        "effective group rate and value."
    )
    nothing = results((4, 30, 1.9), (6, 50, 2.1), bands=EVEN)
    assert "not to be told from uniform" in verdict(nothing, "paper")
    worse = results((4, 30, 1.9), (4, 31, 1.8), bands=EVEN)
    assert "above in nothing" in verdict(worse, "paper")


def test_one_seed_has_differences_and_no_interval() -> None:
    """Said in the table, and the sign is all there is for the sentence."""
    found = results((4, 56, 1.9), bands=EVEN)
    assert "starving" in verdict(found, "paper")
    table = main_table(found)
    assert "one seed, so no interval" in table.caption
    assert table.rows[1][4] == "-5.0"


def test_differences_are_paired_by_seed() -> None:
    """Seeds that move both arms alike leave no doubt."""
    seeds = [
        {
            "uniform": trace("uniform", k, 5, 40, 2.0 * (k + 1)),
            "paper": trace("paper", k, 5, 40, 2.2 * (k + 1)),
        }
        for k in range(4)
    ]
    found = Results(WORLD, (ARMS["uniform"], ARMS["paper"]), tuple(seeds))
    difference = found.against_uniform("paper", VALUE, LATER)
    assert difference.mean == pytest.approx(10.0)
    assert difference.half == pytest.approx(0.0, abs=1e-9)
    assert found.level("paper", VALUE).half > 1.0  # type: ignore[operator]


def test_windows_are_of_epochs() -> None:
    """The first epoch, the later ones, all."""
    one = trace("uniform", 0, 5, 40, 2.0)
    one.value[2:] = 6.0
    found = Results(WORLD, (ARMS["uniform"],), ({"uniform": one},))
    assert [found.level("uniform", VALUE, w).mean for w in (ALL, FIRST, LATER)] == [4.0, 2.0, 6.0]
    assert found.per_epoch("uniform", VALUE).tolist() == [[2.0, 6.0]]
    assert found.windows == (ALL, FIRST, LATER)


def test_what_cannot_be_compared_is_left_open() -> None:
    """Where uniform is worth nothing there is no percentage, and no group has no rate."""
    seeds = ({"uniform": trace("uniform", 0, 0, 0, 0), "paper": trace("paper", 0, 0, 0, 0)},)
    found = Results(WORLD, (ARMS["uniform"], ARMS["paper"]), seeds)
    assert math.isnan(found.against_uniform("paper", VALUE).mean)
    assert found.against_uniform("paper", GROUP_RATE).mean == 0.0
    assert main_table(found).rows[1][4:7] == ["-", "-", "-"]
    assert overview_table([found]).rows == [["made up", "-"]]
    assert "not to be told" in verdict(found, "paper")

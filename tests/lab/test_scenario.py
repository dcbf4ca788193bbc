"""Scenario files: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.lab.random_scenarios import random_scenario
from knapsack_scheduler.lab.scenario import load_scenario, shipped_names

BAND = "[[band]]\nshare = 1.0\nlogit_mean = 0.0\n"


def written(folder: Path, text: str) -> str:
    """Return the path of a scenario file."""
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_shipped_scenario_loads() -> None:
    """Each says in a sentence what it stands for."""
    assert {"base", "hard", "saturated", "fast-drift", "static", "cold-start", "learning"} <= set(
        shipped_names()
    )
    for name in shipped_names():
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario.about


def test_a_file_has_defaults_and_its_own_name(tmp_path: Path) -> None:
    """One band is enough; whole numbers stand for numbers."""
    scenario = load_scenario(written(tmp_path, BAND + "logit_sd = 2\n[run]\nprompts = 512\n"))
    assert scenario.name == "mine"
    assert scenario.run.total_rollouts == 1024
    assert scenario.run.steps_per_epoch == 4
    assert scenario.band[0].logit_sd == 2.0
    assert not scenario.learns


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "band: is missing"),
        (BAND + "colour = 'red'\n", "band[0].colour = 'red': no such key; there are share"),
        (BAND + "[runs]\n", "runs = {}: no such key; there are name, about, run"),
        (BAND + "[run]\nprompt = 5\n", "run.prompt = 5: no such key; there are prompts, "),
        (BAND + "[run]\nepochs = 2.5\n", "run.epochs = 2.5: must be a valid integer"),
        (BAND + "[run]\nepochs = '2'\n", "run.epochs = '2': must be a valid integer"),
        (BAND + "[run]\nepochs = true\n", "run.epochs = True: must be a valid integer"),
        (BAND + "[run]\nepochs = 0\n", "run.epochs = 0: must be greater than or equal to 1"),
        (BAND + "[run]\nmax_rollouts = 1\n", "run.max_rollouts = 1: must be greater than"),
        (BAND + "[run]\nprompts = 9\n", "run.prompts_per_step = 128: must be at most prompts, 9"),
        (
            BAND + "[run]\nrollouts_per_prompt = 1\n",
            "run.rollouts_per_prompt = 1: must be from min_rollouts, 2, to max_rollouts, 128",
        ),
        (
            BAND + "[run]\nmin_rollouts = 200\n",
            "run.min_rollouts = 200: must be at most max_rollouts, 128",
        ),
        (BAND.replace("1.0", "1.2"), "band[0].share = 1.2: must be less than or equal to 1"),
        (BAND.replace("1.0", "0.9"), "the shares of all bands must add up to 1, not 0.9"),
        (BAND + "logit_sd = nan\n", "band[0].logit_sd = nan: must be a finite number"),
        (BAND + "never = 0.7\nalways = 0.6\n", "band[0].never = 0.7: must be at most 1 - always"),
        (BAND + "[drift]\nwalk = -1\n", "drift.walk = -1: must be greater than or equal to 0"),
        (BAND + "[learning]\nown = 'fast'\n", "learning.own = 'fast': must be a valid number"),
        ("band = 3\n", "band = 3: must be a valid"),
        ("band = []\n", "band = []: there must be one or more"),
        ("band = [", "is no TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    """Key, value and what is allowed, in one line."""
    with pytest.raises(ConfigError) as raised:
        load_scenario(written(tmp_path, text))
    assert said in str(raised.value)
    assert "mine.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    """Nobody has to try once per fault."""
    text = BAND + "logit_sd = -1\n[run]\nepochs = 0\n[drift]\nwalk = -1\n"
    with pytest.raises(ConfigError) as raised:
        load_scenario(written(tmp_path, text))
    faults = str(raised.value).split("; ")
    assert [fault.split(" = ")[0].split(": ")[-1] for fault in faults] == [
        "run.epochs", "band[0].logit_sd", "drift.walk",
    ]  # fmt: skip


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """An unknown name lists the shipped ones; a file says why not."""
    with pytest.raises(ConfigError, match=r"'nobody'.*base.*cold-start"):
        load_scenario("nobody")
    with pytest.raises(ConfigError, match="No such file"):
        load_scenario(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no TOML"):
        load_scenario(str(tmp_path / "binary.toml"))


def test_random_scenarios_are_valid_and_the_same_again() -> None:
    """A number names a scenario."""
    drawn = [random_scenario(k) for k in range(200)]
    assert drawn == [random_scenario(k) for k in range(200)]
    assert len({scenario.band for scenario in drawn}) == 200
    assert 60 < sum(scenario.learns for scenario in drawn) < 140

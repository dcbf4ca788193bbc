"""The demo as a user runs it, and a training run whose scheduler is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from knapsack_trainer_client import BudgetClient, RolloutClient, RunConfig
from knapsack_trainer_client.demo import processes
from knapsack_trainer_client.demo.model import new_model, save
from knapsack_trainer_client.demo.task import World
from knapsack_trainer_client.demo.train import Evaluation, Schedule, train


def test_the_demo_runs_from_end_to_end_and_leaves_nothing(tmp_path: Path) -> None:
    """Equal rollouts in every arm, a table, a picture, and no process left behind."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "knapsack_trainer_client.cli", "demo", "--smoke", "--seeds", "2",
         "--out", tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    started = [demo.stdout.readline() for _ in range(2)]
    servers = [psutil.Process(int(line.split("pid ")[1].split()[0])) for line in started]
    rest, errors = demo.communicate(timeout=500)
    assert demo.returncode == 0, errors
    assert errors == ""
    assert not any(server.is_running() for server in servers)
    assert "held-out accuracy" in rest
    assert "knapsack 2 waves: after 384 rollouts" in rest
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["arms"]) == {"uniform", "knapsack", "knapsack 2 waves"}
    for seeds in found["arms"].values():
        assert len(seeds) == 2
        for history in seeds:
            for step in history["steps"]:
                assert sum(step["num_rollouts"]) == 96
                assert step["fallback_waves"] == 0
                assert min(step["num_rollouts"]) >= 2
    for history in found["arms"]["uniform"]:
        assert {n for step in history["steps"] for n in step["num_rollouts"]} == {6}
    # Every arm of a seed sees the same prompts from the same model.
    for seed in range(2):
        arms = [seeds[seed] for seeds in found["arms"].values()]
        for arm in arms:
            assert [s["prompt_ids"] for s in arm["steps"]] == [
                s["prompt_ids"] for s in arms[0]["steps"]
            ]
            assert arm["evaluations"][0] == arms[0]["evaluations"][0]


def test_ctrl_c_stops_the_demo_and_its_servers(tmp_path: Path) -> None:
    """At once, with exit code 130 and without a traceback."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "knapsack_trainer_client.cli", "demo", "--quick",
         "--out", tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    started = [demo.stdout.readline() for _ in range(2)]
    servers = [psutil.Process(int(line.split("pid ")[1].split()[0])) for line in started]
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=200)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert not any(server.is_running() for server in servers)


def test_kill_9_of_the_scheduler_costs_a_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every step has its whole budget, and afterwards every rollout is counted once."""
    said: list[str] = []
    schedule = Schedule(8, 16, 96, 1e-3, 4, seed=1)
    world = World(0)
    problems = world.problems(48, 1)
    save(new_model(0), tmp_path / "model")
    steps = 0

    def on_step(_newest: Evaluation) -> None:
        nonlocal steps
        steps += 1
        if steps in (2, 5):
            os.kill(scheduler.pid, signal.SIGKILL)

    with (
        processes.scheduler(f"sqlite:///{tmp_path / 'stats.db'}", said.append) as scheduler,
        processes.generation_server(str(tmp_path / "model"), said.append) as generator,
        RolloutClient(generator.address) as rollouts,
        BudgetClient(
            scheduler.address,
            "run",
            config=RunConfig(policy="posterior"),
            outbox=tmp_path / "outbox.db",
        ) as budget,
    ):
        history = train(
            new_model(0), problems, problems[:8], schedule, budget, rollouts, tmp_path / "w",
            wave_fraction=0.5, on_step=on_step,
        )  # fmt: skip
        assert budget.flush(60)
        with BudgetClient(scheduler.address, "run", timeout=60, outbox=False) as reader:
            run = reader.run()
            stats: dict[str, Any] = {s.prompt_id: s for s in reader.prompt_stats()}

    assert [sum(step.num_rollouts) for step in history.steps] == [96] * 8
    told: dict[str, list[int]] = {}
    for step in history.steps:
        for prompt_id, n, successes in zip(
            step.prompt_ids, step.num_rollouts, step.num_successes, strict=True
        ):
            sums = told.setdefault(prompt_id, [0, 0])
            sums[0] += n
            sums[1] += successes
    assert run.total_rollouts == 8 * 96
    assert {p: [s.total_rollouts, s.total_successes] for p, s in stats.items()} == told
    assert sum("the scheduler died (SIGKILL) and was started again" in line for line in said) == 2

"""Real trainings with TRL and a real scheduler: every advantage by hand, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from knapsack_trainer_client import BudgetClient
from knapsack_trainer_client.integrations.trl_checks import LOSS_TYPES

from real_scheduler import PATIENCE
from tiny_trl import (
    GROUP,
    Recording,
    by_hand,
    check_rows,
    groups_of,
    never,
    new_trainer,
    partly,
    reward,
    rows,
)

SCRIPT = Path(__file__).with_name("tiny_trl.py")


def check_batches(batches: list[dict[str, Any]], **formula: Any) -> list[list[int]]:
    """Compare every advantage with one by hand; return the group sizes of each batch."""
    sizes = []
    for batch in batches:
        expected = by_hand(groups_of(batch["ids"]), batch["rewards"], **formula)
        assert batch["advantages"] == pytest.approx(expected, abs=1e-6, rel=1e-6)
        # Rows of a prompt stand together, with its own columns.
        sizes.append([len(list(group)) for _, group in groupby(batch["ids"])])
        assert len(sizes[-1]) == len(groups_of(batch["ids"]))
        columns = {row["id"]: row["prompt"] for row in rows(16)}
        assert batch["prompts"] == [columns[name] for name in batch["ids"]]
    return sizes


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_trains_on_the_groups_advantages(
    loss_type: str, shared_scheduler: Any, tmp_path: Path
) -> None:
    """Unequal groups within the budget, advantages by hand, and the loss gets exactly those."""
    options: dict[str, Any] = {"loss_type": loss_type, "run_name": loss_type}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    trainer = new_trainer(tmp_path, shared_scheduler.address, **options)

    trainer.train()

    sizes = check_batches(trainer.batches)
    assert len(sizes) == 6
    assert all(sum(groups) == 8 for groups in sizes)
    assert any(len(set(groups)) > 1 for groups in sizes)
    made = [a for batch in trainer.batches for a in batch["advantages"]]
    assert sorted(trainer.trained) == sorted(made)
    check_rows(trainer.rows)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    with BudgetClient(shared_scheduler.address, loss_type, timeout=PATIENCE) as client:
        known = {s.prompt_id: s for s in client.prompt_stats()}
    for name in known:
        scores = [
            scores[0]
            for batch in trainer.batches
            for row, scores in zip(batch["ids"], batch["rewards"], strict=True)
            if row == name
        ]
        assert (known[name].total_rollouts, known[name].total_successes) == (
            len(scores),
            sum(scores),
        )
        assert 1.0 <= known[name].mean_completion_tokens <= 3.0


FORMULAS = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]


@pytest.mark.parametrize(("scale", "aggregation"), FORMULAS)
@pytest.mark.parametrize(
    "functions", [[reward], [reward, partly], [never, partly]], ids=["one", "two", "unscored"]
)
def test_every_scale_and_aggregation(
    scale: str, aggregation: str, functions: list[Any], shared_scheduler: Any, tmp_path: Path
) -> None:
    """Advantages by hand with one and two functions, missing rewards and unscored rows."""
    weights = [1.0, 0.5][: len(functions)]
    trainer = new_trainer(
        tmp_path,
        shared_scheduler.address,
        reward_funcs=functions,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        reward_weights=weights,
        num_generations=8,
        per_device_train_batch_size=16,
        max_steps=4,
        run_name=f"{scale}-{aggregation}-{'-'.join(f.__name__ for f in functions)}",
    )

    trainer.train()

    check_batches(trainer.batches, scale=scale, aggregation=aggregation, weights=weights)
    if functions[0] is never:
        everything = [r for batch in trainer.batches for r in batch["rewards"]]
        assert any(all(score != score for score in row) for row in everything)


@pytest.mark.parametrize(
    ("options", "batches", "steps"),
    [
        ({"gradient_accumulation_steps": 2}, 4, [0, 1, 2, 3]),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2, [0, 2]),
        ({"num_iterations": 2}, 2, [0, 2]),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
            8,
            [0, 0, 1, 1, 2, 2, 3, 3],
        ),
    ],
    ids=["accumulated", "long-batches", "iterations", "short-batches"],
)
def test_accumulation_and_iterations(
    options: dict[str, Any], batches: int, steps: list[int], shared_scheduler: Any, tmp_path: Path
) -> None:
    """One allocation for each generation batch, however many gradients are taken of it."""
    data = Dataset.from_list(rows(8))
    options = options | {"max_steps": 4, "run_name": f"batches-{len(steps)}-{options}"}
    trainer = new_trainer(tmp_path, shared_scheduler.address, data=data, **options)

    trainer.train()

    assert [batch["step"] for batch in trainer.batches] == steps
    assert len(trainer.batches) == batches
    check_batches(trainer.batches)
    total = 8 * trainer.args.steps_per_generation
    assert all(len(batch["ids"]) == total for batch in trainer.batches)
    assert trainer._budget.stats().allocations == batches
    made = [a for batch in trainer.batches for a in batch["advantages"]]
    assert sorted(trainer.trained) == sorted(made * trainer.num_iterations)


def test_logged_fractions_and_tables_are_those_of_the_groups(
    shared_scheduler: Any, tmp_path: Path
) -> None:
    """frac_reward_zero_std and the completions table say what was trained on."""
    tables: list[list[float]] = []

    class Tabled(Recording):
        def log(self, *args: Any, **kwargs: Any) -> None:
            tables.append(list(self._logs["advantages"]))
            super().log(*args, **kwargs)

    trainer = new_trainer(
        tmp_path, shared_scheduler.address, trainer=Tabled, max_steps=8, run_name="tables"
    )

    trainer.train()

    logged = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    assert len(logged) == len(trainer.batches) == 8
    for entry, batch, table in zip(logged, trainer.batches, tables, strict=False):
        groups = groups_of(batch["ids"])
        mixed = [g for g in groups if len({batch["rewards"][i][0] for i in g}) > 1]
        constant = 1 - sum(map(len, mixed)) / len(batch["ids"])
        assert entry["frac_reward_zero_std"] == pytest.approx(constant)
        assert entry["knapsack/effective_rollout_rate"] == pytest.approx(1 - constant)
        assert entry["knapsack/effective_group_rate"] == pytest.approx(len(mixed) / len(groups))
        assert entry["knapsack/largest_group"] == max(map(len, groups))
        assert entry["knapsack/fallback"] == 0
        assert table == pytest.approx(batch["advantages"], abs=1e-6)


def test_evaluation_is_left_alone(shared_scheduler: Any, tmp_path: Path) -> None:
    """Evaluation allocates and reports nothing and keeps its equal groups."""
    evaluated: list[tuple[list[str], list[float]]] = []

    class Evaluated(Recording):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if not self.model.training:
                ids = [row["id"] for row in inputs]
                evaluated.append((ids, output["advantages"].tolist()))
            return output

    trainer = new_trainer(
        tmp_path,
        shared_scheduler.address,
        trainer=Evaluated,
        more={"eval_dataset": Dataset.from_list(rows())},
        eval_strategy="steps",
        eval_steps=3,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        run_name="evaluated",
    )

    trainer.train()

    assert len(evaluated) == 4
    for ids, _ in evaluated:
        assert [len(list(group)) for _, group in groupby(ids)] == [2, 2]
    assert trainer._budget.stats().allocations == 6
    assert trainer._budget.run().total_rollouts == 6 * 8
    check_batches(trainer.batches)


def run_script(asked: dict[str, Any], launcher: list[str] | None = None) -> int:
    """Train in a process of its own; return its exit code."""
    command = [*(launcher or [sys.executable]), str(SCRIPT), json.dumps(asked)]
    log = Path(asked["folder"]).with_suffix(".log").open("a")
    with log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            timeout=500,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    return done.returncode


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    """Return what a process of the script saw."""
    path = folder / f"seen-{rank}.json"
    assert path.exists(), folder.with_suffix(".log").read_text()[-4000:]
    answer: dict[str, Any] = json.loads(path.read_text())
    return answer


def test_two_processes_share_the_groups(shared_scheduler: Any, tmp_path: Path) -> None:
    """With DDP a group may lie in two processes; each has its own rows' advantages by hand."""
    folder = tmp_path / "ddp"
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = {"per_device_train_batch_size": 6, "max_steps": 5, "run_name": "ddp"}
    asked = {"address": shared_scheduler.address, "folder": str(folder), "options": options}
    run_script(asked, [*launcher, "--nproc-per-node=2"])

    ranks = [seen(folder, rank) for rank in range(2)]
    straddling = 0
    for first, second in zip(ranks[0]["batches"], ranks[1]["batches"], strict=True):
        # Rewards are gathered: the same in both.
        assert first["rewards"] == second["rewards"]
        whole = {
            "ids": first["ids"] + second["ids"],
            "prompts": first["prompts"] + second["prompts"],
            "rewards": first["rewards"],
            "advantages": first["advantages"] + second["advantages"],
        }
        (sizes,) = check_batches([whole])
        assert sum(sizes) == 12
        straddling += first["ids"][-1] == second["ids"][0]
    assert straddling
    assert len(ranks[0]["batches"]) == 5
    for rank in ranks:
        made = [a for batch in rank["batches"] for a in batch["advantages"]]
        assert sorted(rank["trained"]) == sorted(made)
    assert ranks[0]["log"][-2]["knapsack/largest_group"] > GROUP
    with BudgetClient(shared_scheduler.address, "ddp", timeout=PATIENCE) as client:
        assert client.run().total_rollouts == 5 * 12


def test_resumed_is_the_same_as_uninterrupted(shared_scheduler: Any, tmp_path: Path) -> None:
    """Killed amid a step and resumed from a checkpoint, it allocates as if nothing had been."""
    # Across epochs TRL resumes with another order of prompts unless it does not shuffle.
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "shuffle_dataset": False}
    straight = new_trainer(
        tmp_path / "straight",
        shared_scheduler.address,
        **options | {"run_name": "straight", "save_strategy": "no"},
    )
    straight.train()
    broken = tmp_path / "broken"
    broken.mkdir()
    asked = {"address": shared_scheduler.address, "folder": str(broken)}
    again = asked | {"options": options | {"run_name": "broken"}}

    assert run_script(again | {"kill_in": 6}) == -9
    with BudgetClient(shared_scheduler.address, "broken", timeout=PATIENCE) as client:
        # Two steps beyond the checkpoint are reported, and a third has its allocation.
        assert client.run().last_step == 6
        assert client.run().total_rollouts == 6 * 8
    run_script(again | {"resume": True})

    whole, resumed = straight.batches, seen(broken)["batches"]
    assert [batch["step"] for batch in resumed] == [4, 5, 6, 7]
    assert [batch["ids"] for batch in resumed] == [batch["ids"] for batch in whole[4:]]
    assert [batch["advantages"] for batch in resumed] == [b["advantages"] for b in whole[4:]]
    assert any(len(set(map(len, groups_of(batch["ids"])))) > 1 for batch in resumed)
    with (
        BudgetClient(shared_scheduler.address, "broken", timeout=PATIENCE) as client,
        BudgetClient(shared_scheduler.address, "straight", timeout=PATIENCE) as other,
    ):
        assert client.run().rewinds == 2
        assert client.prompt_stats() == other.prompt_stats()


def test_training_outlives_the_scheduler(scheduler: Any, tmp_path: Path) -> None:
    """Killed mid-run: equal groups meanwhile, unequal ones again when it is back."""

    class Outage(Recording):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            step = self.state.global_step
            if self.model.training and step == 4:
                scheduler.kill()
            if self.model.training and step == 8:
                scheduler.start()
                assert self._budget.flush(PATIENCE)
            return super()._generate_and_score_completions(inputs)

    # The first call after the kill waits for all of the timeout, the later ones do not.
    trainer = new_trainer(tmp_path, scheduler.address, trainer=Outage, timeout=5.0, max_steps=14)

    trainer.train()

    sizes = check_batches(trainer.batches)
    fallback = [e["knapsack/fallback"] for e in trainer.state.log_history if "reward" in e]
    assert fallback == [0.0] * 4 + [1.0] * 4 + [0.0] * 6
    assert sizes[4:8] == [[GROUP, GROUP]] * 4
    assert any(len(set(groups)) > 1 for groups in sizes[8:])
    assert trainer._budget.flush(PATIENCE)
    assert trainer._budget.run().total_rollouts == 14 * 8


WAVES = {"num_generations": 4, "per_device_train_batch_size": 16, "max_steps": 5}
"""Four prompts a batch, in two waves of two rollouts on the mean."""


@pytest.mark.parametrize(("scale", "aggregation"), FORMULAS)
def test_two_waves_are_one_batch(
    scale: str, aggregation: str, shared_scheduler: Any, tmp_path: Path
) -> None:
    """Advantages by hand over both waves' groups, the budget exact, all of it trained on once."""
    functions, weights = [never, partly], [1.0, 0.5]
    trainer = new_trainer(
        tmp_path,
        shared_scheduler.address,
        reward_funcs=functions,
        reward_weights=weights,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        num_iterations=2,
        more={"waves": 2, "run_id": f"waves-{scale}-{aggregation}"},
        **WAVES | {"max_steps": 6},
    )

    trainer.train()

    sizes = check_waves(trainer, scale=scale, aggregation=aggregation, weights=weights)
    assert len(sizes) == 3
    assert any(len(set(groups)) > 1 for groups in sizes)
    made = [a for batch in whole_batches(trainer) for a in batch["advantages"]]
    assert sorted(trainer.trained) == sorted(made * 2)
    assert trainer._budget.stats().allocations == 2 * 3


def test_two_waves_survive_the_scheduler(scheduler: Any, tmp_path: Path) -> None:
    """Killed between the waves of a step, the batch is completed and its reports come later."""

    class Outage(Recording):
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                scheduler.kill()
            return super()._calculate_rewards(*args, **kwargs)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            if self.state.global_step == 3:
                scheduler.start()
                assert self._budget.flush(60)
            return super()._generate_and_score_completions(inputs)

    trainer = new_trainer(tmp_path, scheduler.address, trainer=Outage, more={"waves": 2}, **WAVES)

    trainer.train()

    check_waves(trainer)
    check_rows(trainer.rows)
    logged = [e for e in trainer.state.log_history if "reward" in e]
    assert [e["knapsack/fallback"] for e in logged] == [0.0, 0.0, 1.0, 0.0, 0.0]
    for entry, batch in zip(logged, whole_batches(trainer), strict=True):
        groups = groups_of(batch["ids"])
        mixed = [g for g in groups if len({batch["rewards"][i][0] for i in g}) > 1]
        constant = 1 - sum(map(len, mixed)) / 16
        assert entry["frac_reward_zero_std"] == pytest.approx(constant)
        assert entry["knapsack/largest_group"] == max(map(len, groups))
    assert trainer._budget.run().total_rollouts == 5 * 16


@pytest.mark.timeout(300)
def test_two_waves_in_two_processes(shared_scheduler: Any, tmp_path: Path) -> None:
    """Each process has its share of each wave, and its own rows' advantages."""
    folder = tmp_path / "ddp"
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    asked = {
        "address": shared_scheduler.address,
        "folder": str(folder),
        "options": {"per_device_train_batch_size": 8, "max_steps": 4, "run_name": "ddp-waves"},
        "more": {"waves": 2},
    }
    run_script(asked, [*launcher, "--nproc-per-node=2"])

    ranks = [seen(folder, rank) for rank in range(2)]
    for step in range(4):
        waves = [[rank["batches"][2 * step + wave] for rank in ranks] for wave in range(2)]
        halves = [rank["batches"][2 * step + 1]["advantages"] for rank in ranks]
        ids = [name for wave in waves for part in wave for name in part["ids"]]
        rewards = [row for wave in waves for row in wave[0]["rewards"]]
        found = [a for wave in range(2) for half in halves for a in half[4 * wave :][:4]]
        assert len(ids) == len(found) == 16
        assert found == pytest.approx(by_hand(groups_of(ids), rewards), abs=1e-6)
    for rank in ranks:
        check_rows(rank["rows"])


def whole_batches(trainer: Any) -> list[dict[str, Any]]:
    """Return what was recorded by wave as whole batches."""
    firsts, seconds = trainer.batches[::2], trainer.batches[1::2]
    return [
        {
            "step": first["step"],
            "advantages": second["advantages"],
            **{name: first[name] + second[name] for name in ("ids", "prompts", "rewards")},
        }
        for first, second in zip(firsts, seconds, strict=True)
    ]


def check_waves(trainer: Any, **formula: Any) -> list[list[int]]:
    """Compare every advantage with one by hand; return the group sizes of each batch."""
    sizes = []
    for batch, first in zip(whole_batches(trainer), trainer.batches[::2], strict=True):
        groups = groups_of(batch["ids"])
        expected = by_hand(groups, batch["rewards"], **formula)
        assert batch["advantages"] == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert len(first["ids"]) == len(batch["ids"]) // 2
        columns = {row["id"]: row["prompt"] for row in rows(16)}
        assert batch["prompts"] == [columns[name] for name in batch["ids"]]
        sizes.append([len(group) for group in groups])
    return sizes

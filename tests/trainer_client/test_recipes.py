"""The pages for trainers say what is so: their code runs, their links lead somewhere."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import knapsack_trainer_client
from knapsack_trainer_client import BudgetClient, group_advantages, repeat_by_allocation

from real_scheduler import PATIENCE

FOLDER = Path(__file__).resolve().parents[2] / "trainer_client"
RECIPES = (FOLDER / "RECIPES.md").read_text(encoding="utf-8")


def block(having: str) -> str:
    """Return the only Python block that has a certain text."""
    blocks = re.findall(r"^```python\n(.*?)^```", RECIPES, re.MULTILINE | re.DOTALL)
    (found,) = [code for code in blocks if having in code]
    return str(found)


def names(**more: Any) -> dict[str, Any]:
    """Return what the pages' code may use: what the package exports, and a loop's own names."""
    return vars(knapsack_trainer_client) | more


def test_a_stream_as_it_is_written(shared_scheduler: Any) -> None:
    """Every prompt is planned, run and reported."""
    with BudgetClient(shared_scheduler.address, "recipe-stream", timeout=PATIENCE) as client:
        more = {
            "client": client,
            "prompts": [f"p{i}" for i in range(20)],
            "id_of": str,
            "run": lambda prompt, count: [1.0] * count,
            "version": 3,
        }
        exec(block("PromptStream(client"), names(**more))

        run = client.run()
        assert (run.known_prompts, run.total_rollouts, run.last_policy_version) == (20, 160, 3)


def test_batches_as_they_are_written(shared_scheduler: Any) -> None:
    """Every batch is reported and verified."""
    rng = random.Random(0)
    verified: list[int] = []

    def by_group(rewards: list[float], ids: list[str]) -> list[float]:
        verified.append(len(rewards))
        sizes = [ids.count(group) for group in dict.fromkeys(ids)]
        return list(group_advantages(rewards, sizes))

    with BudgetClient(shared_scheduler.address, "recipe-batches", timeout=PATIENCE) as client:
        more = {
            "client": client,
            "loader": [["a", "b", "c"]] * 4,
            "id_of": str,
            "generate": list,
            "score": lambda prompts: [float(rng.random() < 0.3) for _ in prompts],
            "by_group": by_group,
        }
        exec(block("budgeted_batches("), names(**more))
        assert client.run().total_rollouts == sum(verified) == 4 * 24


@pytest.mark.parametrize("scaled", [True, False])
def test_rewards_for_slime_are_those_of_the_groups(scaled: bool) -> None:
    """Advantages by group_index, in any order of samples, in slime's own interface."""
    defined = names()
    exec(block("def post_process"), defined)
    order = random.Random(2).sample(range(9), 9)
    groups = repeat_by_allocation([10, 11, 12], [2, 4, 3])
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    samples = [
        SimpleNamespace(group_index=groups[i], get_reward_value=lambda args, i=i: rewards[i])
        for i in order
    ]

    raw, shaped = defined["post_process"](SimpleNamespace(grpo_std_normalization=scaled), samples)

    expected = group_advantages(rewards, [2, 4, 3], scale="std" if scaled else "none")
    assert raw == [rewards[i] for i in order]
    assert shaped == pytest.approx([expected[i] for i in order])


def test_links_lead_somewhere() -> None:
    """Files that the pages name are there."""
    for page in ("README.md", "RECIPES.md"):
        text = (FOLDER / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (FOLDER / link).exists(), link
        for path in re.findall(r"`((?:tests|trainer_client)/[\w/.]+)`", text):
            assert (FOLDER.parent / path).exists(), path
        for word in ("TODO", "DIFF", "RESULT"):
            assert word not in text

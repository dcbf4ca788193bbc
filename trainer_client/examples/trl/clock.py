"""The demo's task for TRL: a tokenizer, a warmed-up model, prompts, a reward, a curve."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from knapsack_trainer_client.demo.model import (
    MAX_TOKENS,
    exact_accuracy,
    greedy_accuracy,
    new_model,
    warm_up,
)
from knapsack_trainer_client.demo.task import HOURS, OPERATORS, Problem, World

__all__ = ["MAX_TOKENS", "Curve", "Setup", "options", "reward"]

WARM_UP_STEPS = 1000
PROBLEMS = 1024
HELD_OUT = 1000


class Setup:
    """A world, a model that was shown a demonstrator's examples, and problems, of a seed.

    The model is kept in ``folder``, so that two scripts begin with the same one.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        world = World(seed)
        self.model = new_model(seed)
        warm = folder / f"warm-{seed}.pt"
        if warm.exists():
            self.model.load_state_dict(torch.load(warm))
        else:
            warm_up(self.model, world, WARM_UP_STEPS, seed)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), warm)
        self.held_out = world.problems(HELD_OUT, 1_000_000 + seed)
        problems = world.problems(PROBLEMS, seed, {p.prompt_id for p in self.held_out})
        self.dataset = Dataset.from_list([_row(problem) for problem in problems])
        self.tokenizer = _tokenizer()


def reward(completion_ids: list[list[int]], answer: list[list[int]], **_: Any) -> list[float]:
    """Return 1.0 for each completion of the right length that ends right, else 0.0."""
    return [
        float(len(ids) == len(right) and ids[-2:] == right[-2:])
        for ids, right in zip(completion_ids, answer, strict=True)
    ]


class Curve(TrainerCallback):  # type: ignore[misc]
    """Evaluates on the held-out problems every few steps and writes what it found."""

    def __init__(self, setup: Setup, path: Path, every: int = 8) -> None:
        self._setup = setup
        self._path = path
        self._every = every
        self._points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the warmed-up model."""
        self._look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look every few steps."""
        if state.global_step % self._every == 0:
            self._look(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the share of rows in groups that teach nothing."""
        if logs and "frac_reward_zero_std" in logs:
            self._points[-1]["frac_reward_zero_std"] = float(logs["frac_reward_zero_std"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the curve."""
        self._path.write_text(json.dumps(self._points))

    def _look(self, step: int) -> None:
        model = self._setup.model
        training = model.training
        model.eval()
        point = {
            "step": float(step),
            "accuracy": float(exact_accuracy(model, self._setup.held_out).mean()),
            "greedy": greedy_accuracy(model, self._setup.held_out),
        }
        self._points.append(point)
        model.train(training)


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="GRPO with TRL on the demo's task, on a CPU.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(found.seed)
    return found


def _row(problem: Problem) -> dict[str, Any]:
    words = [str(t) if t < HOURS else chr(ord("a") + t - HOURS) for t in problem.prompt[:-1]]
    return {"prompt": " ".join([*words, "="]), "answer": list(problem.answer)}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the token ids of the task."""
    words = [*map(str, range(HOURS)), *(chr(ord("a") + i) for i in range(OPERATORS))]
    vocabulary = {word: i for i, word in enumerate([*words, "=", "<end>", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )

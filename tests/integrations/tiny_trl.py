"""A training with TRL small enough for a test: a random model, and what it did.

As a script it trains and writes what each process saw:

    python tiny_trl.py '{"address": ..., "folder": ..., "steps": 6, ...}'
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from knapsack_trainer_client.integrations.trl import BudgetedGRPOTrainer

from real_scheduler import PATIENCE

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GROUP = 4
PROMPTS = 4
"""Prompts of the training set; two batches of two an epoch with the default options."""

torch.set_num_threads(1)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per letter."""
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def new_model() -> Qwen2ForCausalLM:
    """Return a model of a few thousand random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(LETTERS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def rows(count: int = PROMPTS) -> list[dict[str, Any]]:
    """Return prompts that succeed with probabilities of about 1, 1/2, 1/8 and 1/20."""
    hardness = [1, 2, 8, 20]
    return [
        {"prompt": LETTERS[i] + "z", "id": f"prompt-{i}", "hardness": hardness[i % 4]}
        for i in range(count)
    ]


def reward(completion_ids: list[list[int]], hardness: list[int], **_: Any) -> list[float]:
    """Reward completions whose first token is a multiple of the hardness."""
    return [float(ids[0] % hard == 0) for ids, hard in zip(completion_ids, hardness, strict=True)]


def partly(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Reward by the last token; does not apply where the sum of the tokens is odd."""
    return [None if sum(ids) % 2 else 0.1 * ids[-1] for ids in completion_ids]


def never(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Apply to no completion whose first token is a multiple of three."""
    return [None if ids[0] % 3 == 0 else float(ids[0] % 2) for ids in completion_ids]


class Recording(BudgetedGRPOTrainer):
    """Keeps what it trained on, each generation batch a dict of lists by row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.trained: list[float] = []
        # Of each row in the loss: its prompt's and its completion's first token, its advantage.
        self.rows: list[tuple[int, int, float]] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = super()._calculate_rewards(inputs, *args, **kwargs)
        if self.model.training:
            self.batches.append(
                {
                    "step": self.state.global_step,
                    "ids": [row["id"] for row in inputs],
                    "prompts": args[0],
                    "rewards": gathered.tolist(),
                }
            )
        return gathered

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches[-1]["advantages"] = output["advantages"].tolist()
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        if self.model.training:
            self.trained += inputs["advantages"].tolist()
            first = inputs["prompt_mask"].argmax(dim=1, keepdim=True)
            letters = inputs["prompt_ids"].gather(1, first)[:, 0].tolist()
            tokens = inputs["completion_ids"][:, 0].tolist()
            self.rows += zip(letters, tokens, inputs["advantages"].tolist(), strict=True)
        return super()._compute_loss(model, inputs)


def config(folder: Path, **options: Any) -> GRPOConfig:
    """Return a configuration that trains on the CPU and reports to nobody."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": GROUP,
        "max_completion_length": 3,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "beta": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "run_name": "run",
    }
    return GRPOConfig(str(folder), **(chosen | options))


def new_trainer(
    folder: Path,
    address: Any,
    trainer: Callable[..., Any] = Recording,
    data: Any = None,
    reward_funcs: Any = reward,
    more: dict[str, Any] | None = None,
    timeout: float = PATIENCE,
    **options: Any,
) -> Any:
    """Return a trainer; ``more`` are arguments of the trainer, ``options`` of the config.

    The timeout is that of the client that it makes, so that a busy machine is no outage.
    """
    chosen = {"scheduler": address, "prompt_id_column": "id", "max_rollouts": 64} | (more or {})
    made = trainer(
        model=new_model(),
        reward_funcs=reward_funcs,
        args=config(folder, **options),
        train_dataset=Dataset.from_list(rows()) if data is None else data,
        processing_class=new_tokenizer(),
        **chosen,
    )
    if made._budget is not None:
        made._budget._client._timeout = timeout
    return made


def check_rows(seen: list[tuple[int, int, float]]) -> None:
    """Compare the sign of every row's advantage in the loss with ``reward`` of its completion."""
    vocabulary = new_tokenizer().get_vocab()
    hardness = {vocabulary[row["prompt"][0]]: row["hardness"] for row in rows(16)}
    for letter, token, advantage in seen:
        assert advantage == 0 or (advantage > 0) == (token % hardness[letter] == 0)


def groups_of(ids: list[str]) -> list[list[int]]:
    """Return the rows of each prompt, for batches without duplicate prompts."""
    by_id: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        by_id.setdefault(name, []).append(row)
    return list(by_id.values())


def _mean_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def by_hand(
    groups: list[list[int]],
    rewards: list[list[float]],
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    weights: list[float] | None = None,
) -> list[float]:
    """Return the advantages of all rows by TRL's formula, written out for its groups."""
    weights = weights or [1.0] * len(rewards[0])
    scored = [not all(map(math.isnan, row)) for row in rewards]
    total = [
        sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))
        for row in rewards
    ]
    answer = [0.0] * len(rewards)
    if aggregation == "normalize_then_sum":
        summed = [0.0] * len(rewards)
        for function, weight in enumerate(weights):
            for group in groups:
                known = [i for i in group if not math.isnan(rewards[i][function])]
                if len(known) < 2:
                    continue
                mean, std = _mean_std([rewards[i][function] for i in known])
                for i in known:
                    summed[i] += weight * (rewards[i][function] - mean) / (std + 1e-4)
        known = [i for i in range(len(rewards)) if scored[i]]
        mean, std = _mean_std([summed[i] for i in known])
        for i in known:
            answer[i] = (summed[i] - mean) / (std + 1e-4)
        return answer
    _, of_batch = _mean_std([total[i] for i in range(len(rewards)) if scored[i]])
    for group in groups:
        known = [i for i in group if scored[i]]
        if len(known) < 2:
            continue
        mean, std = _mean_std([total[i] for i in known])
        divisor = {"group": std + 1e-4, "batch": of_batch + 1e-4, "none": 1.0}[scale]
        for i in known:
            answer[i] = (total[i] - mean) / divisor
    return answer


def dying(step: int) -> Callable[..., list[float]]:
    """Return the reward that ends the process with signal 9 when it is asked in a step."""

    def scored(completion_ids: list[list[int]], trainer_state: Any, **rest: Any) -> list[float]:
        if trainer_state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return reward(completion_ids, **rest)

    return scored


def main() -> None:
    """Train as the first argument says and write what this process saw."""
    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    scored = dying(asked["kill_in"]) if "kill_in" in asked else reward
    trainer = new_trainer(
        folder,
        asked["address"],
        reward_funcs=scored,
        more=asked.get("more"),
        **asked.get("options", {}),
    )
    trainer.train(resume_from_checkpoint=asked.get("resume", False))
    rank = trainer.accelerator.process_index
    seen = {
        "batches": trainer.batches,
        "trained": trainer.trained,
        "rows": trainer.rows,
        "log": trainer.state.log_history,
    }
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()

"""The model: a small Qwen2, trained here and served by the generation server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from knapsack_trainer_client.demo.task import END, LONGEST, PAD, VOCABULARY, Problem, World

MAX_TOKENS = LONGEST + 1
"""Tokens of the longest right response."""

# One bar per saved shard would hide the demo's own.
disable_progress_bar()  # type: ignore[no-untyped-call]


def new_model(seed: int) -> Any:
    """Return a model of about 0.1 M parameters with random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LONGEST + 4,
        # The usual 0.02 is for wide models; this one learns several times slower from it.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config)


def save(model: Any, folder: Path) -> None:
    """Write the model to a folder that appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    os.replace(partial, folder)


def warm_up(
    model: Any, world: World, steps: int, seed: int, on_step: Callable[[], object] | None = None
) -> None:
    """Train the model on the demonstrator's examples, 128 a step."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _ in range(steps):
        tokens, labels = world.demonstrations(128, rng)
        logits = model(input_ids=torch.from_numpy(tokens)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.from_numpy(labels)[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step()
    model.eval()


def response_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each response token, by teacher forcing.

    Returns:
        float32[R, T] and a mask of the same shape, 1.0 where there is a token.
    """
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width, most = max(map(len, rows)), max(map(len, responses))
    tokens = torch.full((len(rows), width), PAD)
    places = torch.zeros((len(rows), most), dtype=torch.int64)
    targets = torch.zeros((len(rows), most), dtype=torch.int64)
    mask = torch.zeros((len(rows), most))
    for at, (row, prompt, response) in enumerate(zip(rows, prompts, responses, strict=True)):
        tokens[at, : len(row)] = torch.tensor(row)
        size = len(response)
        places[at, :size] = torch.arange(len(prompt) - 1, len(prompt) - 1 + size)
        targets[at, :size] = torch.tensor(list(response))
        mask[at, :size] = 1.0
    # Padding stands behind every real token, where a causal model does not see it.
    logits = model(input_ids=tokens).logits
    picked = torch.take_along_dim(logits, places[:, :, None], dim=1)
    logprobs = picked.log_softmax(dim=-1).gather(-1, targets[:, :, None]).squeeze(-1)
    return logprobs, mask


def exact_accuracy(model: Any, problems: Sequence[Problem]) -> npt.NDArray[np.float64]:
    """Return the probability that the model writes each problem's right chain.

    By teacher forcing, so without sampling noise. A response with a wrong hour between
    and a right last one is rewarded too; this does not count it.
    """
    found = []
    with torch.inference_mode():
        for start in range(0, len(problems), 512):
            part = problems[start : start + 512]
            logprobs, mask = response_logprobs(
                model, [p.prompt for p in part], [p.answer for p in part]
            )
            found.append((logprobs * mask).sum(dim=1).exp().double().numpy())
    return np.concatenate(found)


def greedy_accuracy(model: Any, problems: Sequence[Problem]) -> float:
    """Return the share of problems that the most probable response solves."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(problems), 512):
            part = problems[start : start + 512]
            rows = [[*p.prompt, *p.answer] for p in part]
            width = max(map(len, rows))
            tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
            best = model(input_ids=tokens).logits.argmax(dim=-1)
            for at, problem in enumerate(part):
                first = len(problem.prompt) - 1
                said = best[at, first : first + len(problem.answer)].tolist()
                right += said == list(problem.answer)
    return right / len(problems)

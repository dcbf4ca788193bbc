"""Models that vLLM runs on the CPU, and what Hugging Face computes with them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from small_engines import VOCABULARY, small_model


def tiny_model(seed: int = 0, tied: bool = False, vocabulary: int = VOCABULARY) -> Any:
    """Return a model with random weights and the least head size of vLLM on the CPU, 32."""
    return small_model(
        seed,
        tied,
        vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
    )


def greedy(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return what Hugging Face generates greedily with a folder's weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
        found.append(answer[0, len(prompt) :].tolist())
    return found


async def idle(engine: Any) -> bool:
    """Wait until the engine has nothing to do; False if it still has after a minute."""
    end = asyncio.get_running_loop().time() + 60
    while (status := engine.status()).running or status.waiting:
        if asyncio.get_running_loop().time() > end:
            return False
        await asyncio.sleep(0.01)
    return True


def unequal(prompts: int = 256, total: int = 2048) -> list[int]:
    """Return numbers from 2 to 128 that sum to the total, most of them small."""
    draw = random.Random(7)
    sizes = [2] * prompts
    while sum(sizes) < total:
        at = min(int(draw.expovariate(1 / 12)), prompts - 1)
        sizes[at] = min(sizes[at] + draw.randint(1, 16), 128, sizes[at] + total - sum(sizes))
    draw.shuffle(sizes)
    assert (min(sizes), max(sizes), sum(sizes)) == (2, 128, total)
    return sizes

"""Models that vLLM runs on the CPU, and what Hugging Face computes with them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 23
END = 22


def tiny_model(seed: int = 0, tied: bool = False, vocabulary: int = VOCABULARY) -> Any:
    """Return a model with random weights and the least head size of vLLM on the CPU, 32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


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
    """Wait until the engine has nothing to do; False if it still has after a second."""
    for _ in range(100):
        status = engine.status()
        if status.running == status.waiting == 0:
            return True
        await asyncio.sleep(0.01)
    return False


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

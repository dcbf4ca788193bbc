"""Small models and short groups for the tests of engines."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from knapsack_genserver.engine import Completion, Engine, Group, Sampling

VOCABULARY = 23
END = 22


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}


def small_model(
    seed: int = 0, tied: bool = False, vocabulary: int = VOCABULARY, **sizes: float
) -> Any:
    """Return a model with random weights, large enough that its tokens are not uniform.

    The sizes are fields of its configuration, where others than the usual ones are wanted.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=None,
        **{**_SIZES, **sizes},
    )
    return Qwen2ForCausalLM(config).eval()


def group(
    prompt: list[int] | None = None, num_rollouts: int = 4, seed: int = 1, **options: Any
) -> Group:
    """Return a group with short rollouts."""
    sampling = {
        key: options.pop(key)
        for key in ("temperature", "top_p", "top_k", "stop_token_ids")
        if key in options
    }
    return Group(
        prompt or [1, 2, 3],
        num_rollouts,
        Sampling(options.pop("max_tokens", 8), **sampling),
        seed,
        **options,
    )


async def all_of(engine: Engine, *groups: Group) -> list[list[Completion]]:
    """Return the rollouts of each group, asked for together, in the order of indices."""
    streams = [engine.generate(each) for each in groups]
    found = []
    for stream in streams:
        found.append(sorted([c async for c in stream], key=lambda c: c.index))
    return found

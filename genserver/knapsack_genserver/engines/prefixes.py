"""What a model has made of prompts, kept while there is room.

A group that is given in chunks, or asked for in waves, is prefilled once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt that has been through the model.

    Attributes:
        layers: keys and values of each layer, [heads, tokens, size].
        logits: of the next token, [vocabulary].
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


class PrefixCache:
    """Prompts by their tokens; the least recently used are forgotten first.

    For one thread. Must be cleared when the weights change.

    Attributes:
        queried_tokens, hit_tokens: looked up so far, and found.
    """

    def __init__(self, max_tokens: int) -> None:
        self._most = max_tokens
        self._held: OrderedDict[Prompt, Prefix] = OrderedDict()
        self._tokens = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    def look_up(self, prompts: Sequence[Prompt]) -> dict[Prompt, Prefix]:
        """Return those of the prompts that are held. One that repeats is found, too."""
        found: dict[Prompt, Prefix] = {}
        seen: set[Prompt] = set()
        for prompt in prompts:
            self.queried_tokens += len(prompt)
            if prompt in self._held:
                self._held.move_to_end(prompt)
                found[prompt] = self._held[prompt]
            if prompt in self._held or prompt in seen:
                self.hit_tokens += len(prompt)
            seen.add(prompt)
        return found

    def keep(self, prefixes: dict[Prompt, Prefix]) -> None:
        """Hold prompts, as far as there is room."""
        for prompt, prefix in prefixes.items():
            if len(prompt) > self._most or prompt in self._held:
                continue
            self._held[prompt] = prefix
            self._tokens += len(prompt)
        while self._tokens > self._most:
            prompt, _ = self._held.popitem(last=False)
            self._tokens -= len(prompt)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._tokens = 0


def cut(
    cache: DynamicCache, logits: torch.Tensor, prompts: Sequence[Prompt]
) -> dict[Prompt, Prefix] | None:
    """Return the prompts of a left-padded batch one by one.

    None if the model keeps something else than the keys and values of every token, such
    as those of a sliding window.
    """
    layers: list[Any] = cache.layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return None
    found = {}
    for row, prompt in enumerate(prompts):
        tokens = slice(-len(prompt), None)
        pairs = [
            (layer.keys[row, :, tokens].clone(), layer.values[row, :, tokens].clone())
            for layer in layers
        ]
        found[prompt] = Prefix(pairs, logits[row].clone())
    return found


def join(config: Any, prefixes: Sequence[Prefix]) -> tuple[DynamicCache, torch.Tensor]:
    """Return a left-padded batch of prompts, as ``cut`` took it apart, and its logits."""
    longest = max(prefix.layers[0][0].shape[1] for prefix in prefixes)
    cache = DynamicCache(config=config)
    for index in range(len(prefixes[0].layers)):
        padded: list[Any] = []
        for which in (0, 1):
            parts = [prefix.layers[index][which] for prefix in prefixes]
            heads, _, size = parts[0].shape
            batch = parts[0].new_zeros((len(parts), heads, longest, size))
            for row, part in enumerate(parts):
                batch[row, :, longest - part.shape[1] :] = part
            padded.append(batch)
        cache.update(padded[0], padded[1], index)
    return cache, torch.stack([prefix.logits for prefix in prefixes])

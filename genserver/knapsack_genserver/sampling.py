"""Draws tokens from logits with given uniform numbers."""

from __future__ import annotations

import torch

from knapsack_genserver.engine import Sampling

_MOST_NUMBERS = 2**24
"""Probabilities held at once in float64: 128 MiB."""


def draw(
    logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token and its log-probability per row, int64[R] and float64[R].

    By inversion of the cumulative distribution, so that a row's token depends on its
    own logits and number only.

    Args:
        logits: [R, vocabulary], finite.
        sampling: temperature, top_k and top_p, applied in this order.
        uniforms: float64[R] in [0, 1).
    """
    rows = max(1, _MOST_NUMBERS // logits.shape[1])
    if logits.shape[0] > rows:
        parts = [
            draw(part, sampling, numbers)
            for part, numbers in zip(
                torch.split(logits, rows), torch.split(uniforms, rows), strict=True
            )
        ]
        return torch.cat([t for t, _ in parts]), torch.cat([p for _, p in parts])
    scores = logits.double()
    if sampling.temperature == 0.0:
        logprobs = scores.log_softmax(dim=-1)
        tokens = scores.argmax(dim=-1)
    else:
        logprobs = _kept(scores / sampling.temperature, sampling).log_softmax(dim=-1)
        cumulative = logprobs.exp().cumsum(dim=-1)
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = (cumulative <= target).sum(dim=-1)
        # Rounding may put the target on the very end, behind the last likely token.
        likely = logprobs > -torch.inf
        last = likely.shape[1] - 1 - likely.flip(-1).int().argmax(dim=-1)
        tokens = torch.minimum(tokens, last)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _kept(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the scores with tokens outside top_k and top_p at minus infinity."""
    size = scores.shape[-1]
    if 0 < sampling.top_k < size:
        kth = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = (before >= sampling.top_p).scatter(-1, order, before >= sampling.top_p)
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores

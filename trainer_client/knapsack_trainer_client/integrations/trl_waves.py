"""The two halves of a generation batch of TRL -> one batch, as if generated at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from knapsack_trainer_client.errors import refused

# What stands where there is no token. Of log-probabilities and ratios TRL reads none there.
_BY_TOKEN = {
    "prompt_ids": None,
    "prompt_mask": 0,
    "completion_ids": None,
    "completion_mask": 0,
    "tool_mask": 1,
    "old_per_token_logps": 0.0,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "importance_sampling_ratio": 1.0,
}
"""Fill of each tensor of one row per rollout and one column per token; None: the pad token."""

_LEFT = ("prompt_ids", "prompt_mask")
"""Tensors that are filled up on the left."""


def joined(first: Mapping[str, Any], second: Mapping[str, Any], pad_token: int) -> dict[str, Any]:
    """Return the batch with the rows of the first before those of the second.

    Args:
        first, second: what ``GRPOTrainer._generate_and_score_completions`` returned.
        pad_token: fills up the shorter prompts and completions.

    Raises:
        InvalidRequest: something else than tokens, such as images.
    """
    for name in first.keys() ^ second.keys() | first.keys() - _BY_TOKEN.keys():
        if name not in ("advantages", "num_items_in_batch"):
            raise refused("waves", 2, f"must be 1 where a batch has {name!r}")
    answer: dict[str, Any] = {}
    for name, value in first.items():
        if name == "num_items_in_batch":
            answer[name] = value + second[name]
        elif name == "advantages":
            answer[name] = torch.cat([value, second[name]])
        else:
            fill = _BY_TOKEN[name]
            halves = [value, second[name]]
            width = max(half.size(1) for half in halves)
            answer[name] = torch.cat(
                [
                    _widened(half, width, pad_token if fill is None else fill, name in _LEFT)
                    for half in halves
                ]
            )
    return answer


def _widened(rows: Any, width: int, fill: float, left: bool) -> Any:
    missing = width - rows.size(1)
    if not missing:
        return rows
    return torch.nn.functional.pad(rows, (missing, 0) if left else (0, missing), value=fill)

"""Rows of prompts by their ids, as a dict would give them."""

from __future__ import annotations

import random

import pytest

from knapsack_scheduler import promptindex
from knapsack_scheduler.promptindex import PromptIndex


@pytest.mark.parametrize(
    "hashed",
    [hash, lambda _: 7, lambda id_: hash(id_) % 50 - 25, lambda id_: (hash(id_) % 97) << 40],
    ids=["hash", "all alike", "few", "high bits only"],
)
def test_ids_are_found_as_in_a_dict(hashed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their hashes: known, unknown and repeated ids, in batches of every size."""
    monkeypatch.setattr(promptindex, "hash", hashed, raising=False)
    monkeypatch.setattr(promptindex, "TEXTS_AT_ONCE", 64)
    draw = random.Random(0)
    index, known = PromptIndex(), {}
    for size in (0, 1, 2, 5, 300, 1, 300, 40, 300):
        asked = [f"prompt-{draw.randrange(400)}-é" for _ in range(size)]
        assert index.find(asked).tolist() == [known.get(each, -1) for each in asked]
        new = [each for each in dict.fromkeys(asked) if each not in known]
        known.update(zip(new, range(len(known), len(known) + len(new)), strict=True))
        index.add(new)
        assert index.ids == list(known)
        assert index.find(index.ids).tolist() == list(range(len(known)))

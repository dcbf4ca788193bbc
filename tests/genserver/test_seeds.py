"""Random numbers by counter: uniform, independent, and the same everywhere."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from knapsack_genserver.seeds import group_seeds, rollout_keys, uniforms

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, in plain integers."""
    state, out = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(0, MASK))
def test_keys_are_the_published_generator(seed: int) -> None:
    """Rollout i has the i-th number of SplitMix64, and its tokens the generator of its key."""
    expected = splitmix64(seed, 5)
    assert rollout_keys(seed, np.arange(5)).tolist() == expected
    tokens = splitmix64(expected[3], 4)
    key = rollout_keys(seed, np.array([3]))
    assert [uniforms(key, t)[0] for t in range(4)] == [(n >> 11) * 2.0**-53 for n in tokens]
    assert group_seeds(seed, 1, 3) == expected[1:4]


def test_numbers_are_uniform_and_unrelated() -> None:
    """By chi-square over cells, along tokens, rollouts and neighbouring seeds."""
    keys = np.concatenate([rollout_keys(seed, np.arange(100)) for seed in range(50)])
    table = np.stack([uniforms(keys, t) for t in range(20)])
    assert table.min() >= 0
    assert table.max() < 1
    # 0.999999 quantiles of chi-square with 63 and with 255 degrees of freedom.
    for cells, limit in ((64, 130.0), (256, 383.0)):
        counts = np.bincount((table.ravel() * cells).astype(int), minlength=cells)
        wanted = table.size / cells
        assert ((counts - wanted) ** 2 / wanted).sum() < limit
    pairs = [
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table[:, 100:], table[:, :-100]),
    ]
    for a, b in pairs:
        r = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(r) * np.sqrt(a.size) < 5

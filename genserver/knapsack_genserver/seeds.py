"""Random numbers by counter: what is drawn depends on names, never on batching.

SplitMix64 (Steele, Lea, Flood 2014) as a hash: the state is the name of the draw, so the
t-th token of the i-th rollout of a group has its uniform number whoever computes it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = 2**64 - 1
Keys = npt.NDArray[np.uint64]


def _mix(state: Keys) -> Keys:
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def group_seeds(request_seed: int, first: int, count: int) -> list[int]:
    """Return the seeds of ``count`` prompts' groups from position ``first`` on, 64 bits each."""
    seeds: list[int] = rollout_keys(request_seed, np.arange(first, first + count)).tolist()
    return seeds


def rollout_keys(seed: int, indices: npt.NDArray[np.integer]) -> Keys:
    """Return a key per rollout of a group, uint64 of the shape of ``indices``."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(seed & _MASK) + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniforms(keys: Keys, token_index: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) per rollout for its token of that index."""
    step = np.uint64((token_index + 1) * int(_GOLDEN) & _MASK)
    with np.errstate(over="ignore"):
        return (_mix(keys + step) >> np.uint64(11)).astype(np.float64) * 2.0**-53

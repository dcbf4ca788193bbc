"""Rewards of groups of any size -> advantages, repeated items, loss weights.

Lists give lists, NumPy arrays give arrays and torch tensors give tensors on the same
device, without importing either: whoever passes one has imported it. Statistics are
computed in float64 whatever comes in.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from knapsack_trainer_client.arguments import check_int
from knapsack_trainer_client.errors import refused
from knapsack_trainer_client.rewards import is_sequence, to_groups, to_list, to_reward

Method: TypeAlias = Literal["grpo", "dr_grpo", "rloo"]
Scale: TypeAlias = Literal["std", "population_std", "none"]
Mode: TypeAlias = Literal["sample", "prompt", "sqrt"]


@runtime_checkable
class HasNumRollouts(Protocol):
    """Anything that says how many rollouts each prompt has, such as an ``Allocation``."""

    @property
    def num_rollouts(self) -> Sequence[int]:
        """Rollouts of each prompt."""


Counts: TypeAlias = HasNumRollouts | Iterable[int]
"""Rollouts of each prompt: an allocation, or the numbers themselves."""


def group_advantages(
    rewards: Any,
    group_sizes: Counts | None = None,
    *,
    method: Method = "grpo",
    scale: Scale | None = None,
    clip: float | None = None,
    epsilon: float = 1e-6,
    min_std: float = 0.0,
) -> Any:
    """Return the advantage of every rollout within its group, in the shape of ``rewards``.

    With r a reward, mean and std over the N rewards of its group (std unbiased, divided by
    N - 1, as ``torch.std``):

    - ``"grpo"``: (r - mean) / (max(std, min_std) + epsilon)
    - ``"dr_grpo"``: r - mean
    - ``"rloo"``: r - mean of the other N - 1 rewards, which is N / (N - 1) (r - mean)

    So rloo is dr_grpo times N / (N - 1), and grpo is dr_grpo divided by the spread of the
    group. With groups of different sizes these factors differ from group to group: rloo
    takes out the bias (N - 1) / N of a baseline that contains the rollout itself, which
    is 0.5 for a group of 2 and 0.99 for one of 93.

    A group whose rewards are all exactly equal gets exactly 0.0, in whatever precision
    they came, and so does a group of one. None or NaN is a missing rollout: advantage
    0.0, and left out of N, mean and std.

    One success among N failures has a grpo advantage near sqrt(N): 2.5 for 8, 9.5 for 93.
    ``clip`` bounds that by cutting off, ``min_std`` by dividing the whole group by less.

    Args:
        rewards: one sequence per group (lists, arrays or tensors), or all rewards in one
            flat sequence with ``group_sizes``. A matrix is one group per row.
        group_sizes: rollouts of each group, for flat rewards: numbers or an allocation.
        method: the baseline, as above.
        scale: "std" divides by max(std, min_std) + epsilon, "population_std" by the std
            that is divided by N instead of N - 1, "none" does not divide. None: what the method
            says, which is "std" for grpo and "none" for the others.
        clip: bound of the absolute advantage, above 0; None for no bound.
        epsilon: added to std, 0 or more.
        min_std: least std that is divided by, 0 or more, in units of the rewards.

    Returns:
        Nested lists for nested lists, a flat container for a flat one. Floating arrays
        and tensors keep their type; integer arrays give float64, integer tensors float32.

    Raises:
        InvalidRequest: a shape that does not fit, or a reward that is infinite or not a
            number.
    """
    if method not in ("grpo", "dr_grpo", "rloo"):
        raise refused("method", method, 'must be "grpo", "dr_grpo" or "rloo"')
    if scale not in (None, "std", "population_std", "none"):
        raise refused("scale", scale, 'must be "std", "population_std" or "none"')
    if clip is not None and not clip > 0:
        raise refused("clip", clip, "must be above 0, or None")
    if not epsilon >= 0:
        raise refused("epsilon", epsilon, "must be 0 or more")
    if not min_std >= 0:
        raise refused("min_std", min_std, "must be 0 or more")
    divisor = scale or ("std" if method == "grpo" else "none")

    def one_group(position: int, group: Sequence[Any]) -> list[float]:
        known = [to_reward(f"rewards[{position}][{i}]", raw) for i, raw in enumerate(group)]
        advantages = _centred(known, method, divisor, epsilon, min_std)
        if clip is None:
            return advantages
        return [min(max(a, -clip), clip) for a in advantages]

    rows = to_list("rewards", rewards)
    if group_sizes is not None:
        groups = to_groups("rewards", rows, counts_of(group_sizes))
    elif all(is_sequence(row) for row in rows):
        groups = [to_list(f"rewards[{i}]", row) for i, row in enumerate(rows)]
    else:
        raise refused("group_sizes", None, "must be given with flat rewards")
    advantages = [one_group(i, group) for i, group in enumerate(groups)]
    if rows and not is_sequence(rows[0]):
        return _like(rewards, [a for group in advantages for a in group])
    if _is_array(rewards):
        return _like(rewards, advantages)
    return [_like(row, group) for row, group in zip(rows, advantages, strict=True)]


def repeat_by_allocation(items: Any, counts: Counts) -> Any:
    """Return each item repeated as many times as its prompt has rollouts, in order.

    Args:
        items: one per prompt: a sequence, or an array or tensor by its first dimension.
        counts: an allocation, or the rollouts of each prompt.

    Raises:
        InvalidRequest: not as many items as counts, or a negative count.
    """
    repeats = counts_of(counts)
    if len(items) != len(repeats):
        raise refused("items", f"{len(items)} items", f"must be one per prompt ({len(repeats)})")
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(items, torch.Tensor):
        times = torch.tensor(repeats, dtype=torch.long, device=items.device)
        return torch.repeat_interleave(items, times, dim=0)
    if numpy is not None and isinstance(items, numpy.ndarray):
        return numpy.repeat(items, repeats, axis=0)
    return [item for item, times in zip(items, repeats, strict=True) for _ in range(times)]


def loss_weights(counts: Counts, mode: Mode = "prompt") -> Any:
    """Return one loss weight per rollout, in order, with mean 1 over all rollouts.

    A loss that averages over rollouts gives a prompt the weight N_i of its group. With T
    rollouts in all and M groups that have any:

    - ``"sample"``: 1; a prompt counts N_i
    - ``"prompt"``: T / (M N_i); every prompt counts the same, T / M
    - ``"sqrt"``: T / (sqrt(N_i) sum_j sqrt(N_j)); a prompt counts as sqrt(N_i)

    Args:
        counts: an allocation, or the rollouts of each prompt. Give the rollouts that take
            part in the loss, where some are missing.
        mode: as above.

    Returns:
        A list; for counts in an array float64, for counts in a tensor float32.

    Raises:
        InvalidRequest: an unknown mode or a negative count.
    """
    sizes = counts_of(counts)
    total = sum(sizes)
    if mode == "sample":
        weights = [1.0 for _ in sizes]
    elif mode == "prompt":
        groups = sum(1 for n in sizes if n)
        weights = [total / (groups * n) if n else 0.0 for n in sizes]
    elif mode == "sqrt":
        roots = math.fsum(math.sqrt(n) for n in sizes)
        weights = [total / (math.sqrt(n) * roots) if n else 0.0 for n in sizes]
    else:
        raise refused("mode", mode, 'must be "sample", "prompt" or "sqrt"')
    flat = [w for w, n in zip(weights, sizes, strict=True) for _ in range(n)]
    return flat if isinstance(counts, HasNumRollouts) else _like(counts, flat)


def counts_of(counts: Counts) -> list[int]:
    """Return the rollouts of each prompt as a list of int, each 0 or more."""
    raw = counts.num_rollouts if isinstance(counts, HasNumRollouts) else counts
    return [check_int(f"counts[{i}]", n) for i, n in enumerate(to_list("counts", raw))]


def _centred(
    rewards: Sequence[float | None],
    method: Method,
    divisor: Scale,
    epsilon: float,
    min_std: float,
) -> list[float]:
    known = [r for r in rewards if r is not None]
    count = len(known)
    # Equality, not a spread of zero: sums of equal numbers leave a residue, which a
    # division by the spread would blow up.
    if count < 2 or min(known) == max(known):
        return [0.0] * len(rewards)
    mean = math.fsum(known) / count
    factor = count / (count - 1) if method == "rloo" else 1.0
    if divisor != "none":
        # In units of the spread, so that squares of tiny differences do not vanish.
        spread = max(known) - min(known)
        squares = math.fsum(((r - mean) / spread) ** 2 for r in known)
        freedom = count - 1 if divisor == "std" else count
        factor /= max(spread * math.sqrt(squares / freedom), min_std) + epsilon
    return [0.0 if r is None else (r - mean) * factor for r in rewards]


def _is_array(values: object) -> bool:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    return (torch is not None and isinstance(values, torch.Tensor)) or (
        numpy is not None and isinstance(values, numpy.ndarray) and values.dtype != object
    )


def _like(sample: Any, values: list[Any]) -> Any:
    """Return ``values`` in a container of the kind of ``sample``."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(sample, torch.Tensor):
        dtype = sample.dtype if sample.dtype.is_floating_point else torch.float32
        return torch.tensor(values, dtype=dtype, device=sample.device)
    if numpy is not None and isinstance(sample, numpy.ndarray):
        floating = numpy.issubdtype(sample.dtype, numpy.floating)
        return numpy.array(values, dtype=sample.dtype if floating else numpy.float64)
    return values

"""The allocation without a scheduler: the budget divided evenly.

Pure and deterministic: the same batch gets the same answer in every process and in any
order of prompts. What does not divide goes to the prompts with the lowest BLAKE2b hash
of their id, the scheduler's own tie rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from knapsack_trainer_client.arguments import LARGEST_GROUP, AllocationAsk
from knapsack_trainer_client.nouns import Allocation, AllocationSummary


def uniform_allocation(
    ask: AllocationAsk, run_id: str, tokens_per_rollout: float = 0.0
) -> Allocation:
    """Return the budget of ``ask`` divided evenly within the caller's bounds.

    Gives exactly ``total_rollouts``; with ``allow_partial``, the closest total that the
    bounds hold. A budget in tokens is divided by ``tokens_per_rollout``; where that is
    0, nothing is known of lengths and every prompt gets its minimum, or 2. The first of
    two planned waves is half.
    """
    count = len(ask.prompt_ids)
    low = _each(ask.min_rollouts, count, 0)
    high = _each(ask.max_rollouts, count, LARGEST_GROUP)
    total = ask.total_rollouts
    if ask.total_tokens:
        if tokens_per_rollout > 0:
            affordable = int(ask.total_tokens / tokens_per_rollout)
        else:
            affordable = sum(map(min, _each(ask.min_rollouts, count, 2), high))
        total = min(total, affordable) if total else affordable
    forced = sum(low)
    held = min(max(total, forced), sum(high))
    fraction = 0.5 if ask.waves == 2 else ask.wave_fraction
    wave = max(_share(held, fraction), forced) if fraction else held
    order = _tie_order(ask.prompt_ids)
    given = _fill(low, high, wave - forced, order, bool(ask.min_rollouts))
    allocated = sum(given)
    return Allocation(
        num_rollouts=given,
        prompt_ids=ask.prompt_ids,
        step=ask.step,
        wave=1,
        allocated_rollouts=allocated,
        remaining_rollouts=held - allocated,
        unallocated_rollouts=0 if ask.total_tokens else ask.total_rollouts - held,
        is_fallback=True,
        summary=_summary(given),
        allocation_id="",
        run_id=run_id,
        total_rollouts=held,
        rollouts_so_far=tuple(given),
        min_rollouts=ask.min_rollouts,
        max_rollouts=ask.max_rollouts,
    )


def uniform_extension(allocation: Allocation, wave_fraction: float) -> Allocation:
    """Return what ``allocation`` has left, given to its smallest groups first.

    After a fallback this completes the even division; after a wave that the scheduler
    gave it evens the groups out. ``wave_fraction`` is a share of the whole budget; 0 is
    all that is left.
    """
    count = len(allocation.prompt_ids)
    sizes = list(allocation.rollouts_so_far)
    left = allocation.remaining_rollouts
    wave = min(_share(allocation.total_rollouts, wave_fraction), left) if wave_fraction else left
    high = list(map(max, _each(allocation.max_rollouts, count, LARGEST_GROUP), sizes))
    order = _tie_order(allocation.prompt_ids)
    filled = _fill(sizes, high, wave, order, bool(allocation.min_rollouts))
    given = [new - old for new, old in zip(filled, sizes, strict=True)]
    allocated = sum(given)
    return replace(
        allocation,
        num_rollouts=given,
        wave=allocation.wave + 1,
        allocated_rollouts=allocated,
        remaining_rollouts=left - allocated,
        is_fallback=True,
        summary=_summary(filled),
        # The scheduler knows nothing of these rollouts, so they belong to no allocation.
        allocation_id="",
        rollouts_so_far=tuple(filled),
    )


def _share(total: int, fraction: float) -> int:
    return int(total * fraction + 0.5)


def _each(bounds: Sequence[int], count: int, absent: int) -> list[int]:
    if not bounds:
        return [absent] * count
    return list(bounds) * count if len(bounds) == 1 else list(bounds)


def _tie_order(prompt_ids: Sequence[str]) -> list[int]:
    keys = [
        hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for p in prompt_ids
    ]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _fill(
    sizes: Sequence[int], high: Sequence[int], rollouts: int, order: Sequence[int], skipping: bool
) -> list[int]:
    """Return the sizes after giving up to ``rollouts`` more, lowest group first.

    With ``skipping``, a prompt that has nothing gets two or nothing while that can be:
    a group of one teaches nothing.
    """
    filled = list(sizes)
    if skipping:
        for i in order:
            if filled[i] == 0 and high[i] >= 2 and rollouts >= 2:
                filled[i] = 2
                rollouts -= 2
        begun = [i for i in order if filled[i] > 0 or high[i] == 1]
        rollouts -= _level(filled, high, rollouts, begun)
    _level(filled, high, rollouts, order)
    return filled


def _level(filled: list[int], high: Sequence[int], rollouts: int, order: Sequence[int]) -> int:
    """Raise the lowest of ``order`` in place by up to ``rollouts``; return how many."""
    rooms = sum(high[i] - filled[i] for i in order)
    rollouts = min(rollouts, rooms)
    if rollouts <= 0:
        return 0
    bottom, top = min(filled[i] for i in order), max(high[i] for i in order)
    while bottom < top:
        level = (bottom + top + 1) // 2
        if sum(max(min(level, high[i]) - filled[i], 0) for i in order) <= rollouts:
            bottom = level
        else:
            top = level - 1
    rest = rollouts
    at_level = [i for i in order if filled[i] <= bottom < high[i]]
    for i in order:
        raised = max(min(bottom, high[i]) - filled[i], 0)
        filled[i] += raised
        rest -= raised
    for i in at_level[:rest]:
        filled[i] += 1
    return rollouts


def _summary(sizes: Sequence[int]) -> AllocationSummary:
    return AllocationSummary(policy="uniform", largest_group=max(sizes, default=0))

"""Which rollouts start now, of which group: pure.

Requests share a batch evenly, so that a large one does not keep a small one waiting.
Within a request the groups with the most left go first, because they are what the end of
the step waits for; a group larger than its share is cut and continued in later batches,
which does not change its rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A group with rollouts not yet started.

    Attributes:
        request: equal for groups of one request.
        rollouts: not yet started, 1 or more.
        tokens: most tokens that one of them may hold, prompt included.
        priority: lower is sooner.
    """

    request: int
    rollouts: int
    tokens: int
    priority: int = 0


def next_batch(
    waiting: Sequence[Waiting], max_rollouts: int, max_tokens: int
) -> list[tuple[int, int]]:
    """Return (position in waiting, rollouts to start) pairs of the next batch.

    At least one rollout starts if any is waiting, however many tokens it may hold.

    Args:
        waiting: groups in the order they came.
        max_rollouts: most rollouts of a batch, 1 or more.
        max_tokens: most tokens that the batch may come to hold.
    """
    if not waiting:
        return []
    soonest = min(group.priority for group in waiting)
    order: dict[int, list[int]] = {}
    for position, group in enumerate(waiting):
        if group.priority == soonest:
            order.setdefault(group.request, []).append(position)
    for positions in order.values():
        positions.sort(key=lambda at: (-waiting[at].rollouts * waiting[at].tokens, at))
    given: dict[int, int] = {}
    rollouts, tokens = max_rollouts, max_tokens
    requests = list(order.values())
    while requests and rollouts > 0:
        share = max(rollouts // len(requests), 1)
        still_waiting = []
        for positions in requests:
            taken, used, full = _take(waiting, positions, min(share, rollouts), tokens, given)
            rollouts -= taken
            tokens -= used
            if taken and not full:
                still_waiting.append(positions)
        requests = still_waiting
    if not given:
        first = min(at for positions in order.values() for at in positions)
        return [(first, 1)]
    return sorted(given.items())


def _take(
    waiting: Sequence[Waiting],
    positions: list[int],
    share: int,
    tokens: int,
    given: dict[int, int],
) -> tuple[int, int, bool]:
    """Give up to ``share`` rollouts to a request; returns how many, tokens, and whether done."""
    taken = used = 0
    for position in positions:
        group = waiting[position]
        want = group.rollouts - given.get(position, 0)
        fitting = (tokens - used) // max(group.tokens, 1)
        count = min(want, share - taken, fitting)
        if count > 0:
            given[position] = given.get(position, 0) + count
            taken += count
            used += count * group.tokens
        if taken == share:
            break
    done = all(given.get(at, 0) == waiting[at].rollouts for at in positions)
    return taken, used, done

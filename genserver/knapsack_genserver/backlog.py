"""What one call has asked for and not been given yet, longest expected work first: pure.

Rollouts that are expected to take longest begin first, because they are what the end of
the step waits for; among equals the largest groups do. Groups are given in chunks, which
does not change their rollouts.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True, order=True)
class _Entry:
    """Rollouts of one prompt that were asked for together; ordered by who goes first."""

    rank: tuple[int, int, int]
    position: int = field(compare=False)
    first: int = field(compare=False)
    left: int = field(compare=False)


class Backlog:
    """Groups that wait; costs memory by the group and not by the rollout."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._of: dict[int, list[_Entry]] = {}
        self._added = 0
        self.rollouts = 0

    def add(self, position: int, first: int, rollouts: int, expected_tokens: int) -> None:
        """Let rollouts wait.

        Args:
            position: of their prompt in the call.
            first: index of the first of them in the prompt's group.
            rollouts: how many, 1 or more.
            expected_tokens: of a completion.
        """
        entry = _Entry((-expected_tokens, -rollouts, self._added), position, first, rollouts)
        heapq.heappush(self._heap, entry)
        self._of.setdefault(position, []).append(entry)
        self._added += 1
        self.rollouts += rollouts

    def take(self, most: int) -> tuple[int, int, int]:
        """Return (position, first index, rollouts) of what begins next.

        Args:
            most: rollouts of the chunk, 1 or more. At least one rollout must wait.
        """
        entry = self._heap[0]
        count = min(entry.left, most)
        taken = (entry.position, entry.first, count)
        entry.first += count
        entry.left -= count
        self.rollouts -= count
        if entry.left == 0:
            heapq.heappop(self._heap)
            entries = self._of[entry.position]
            entries.remove(entry)
            if not entries:
                del self._of[entry.position]
        return taken

    def drop(self, positions: set[int]) -> dict[int, list[range]]:
        """Forget what waits of these prompts; returns the indices of each, in parts."""
        dropped = {}
        for position in positions & self._of.keys():
            entries = self._of.pop(position)
            dropped[position] = [range(e.first, e.first + e.left) for e in entries]
            self.rollouts -= sum(e.left for e in entries)
        if dropped:
            self._heap = [entry for entry in self._heap if entry.position not in dropped]
            heapq.heapify(self._heap)
        return dropped

"""Which steps a journal holds, and how far back some of them are.

Steps are counted, never subtracted: a single number far beyond the others, sent by mistake,
is one step more and not the end of all before it. It can be taken back by a rewind like any
other. But a rewind that takes it back needs the calls from before it came, so it cannot be
waited for without end: when more than a horizon of lower steps have begun since, it is
*settled*. It counts as a step no more, and once it is compacted it stays, as an import does.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knapsack_scheduler.journal.records import Outline, RunRow, SnapshotMark


@dataclass(frozen=True, slots=True)
class RecordedSteps:
    """The steps of a journal that no rewind has forgotten.

    Attributes:
        firsts: number of the entry that each step began with, in this order. What is
            compacted counts as one step, the run's ``floor_step``, at its ``floor_seq``.
        highest: by the number of a snapshot, the highest step in it when it was made;
            -1 if it holds none. Of snapshots from the floor on.
    """

    firsts: Mapping[int, int]
    highest: Mapping[int, int]

    @classmethod
    def of(
        cls, run: RunRow, outline: Sequence[Outline], marks: Sequence[SnapshotMark] = ()
    ) -> RecordedSteps:
        """Return what the outline of a run holds, at its snapshots and in the end."""
        firsts = {run.floor_step: run.floor_seq} if run.floor_step >= 0 else {}
        highest: dict[int, int] = {}
        top = run.floor_step
        waiting = sorted((m.seq for m in marks if m.seq >= run.floor_seq), reverse=True)
        for entry in outline:
            if entry.seq <= run.floor_seq:
                continue
            while waiting and waiting[-1] < entry.seq:
                highest[waiting.pop()] = top
            if entry.kind == "rewind":
                firsts = {step: seq for step, seq in firsts.items() if step <= entry.step}
                top = max(firsts, default=-1)
            # Those that no rewind forgets are of no step.
            elif entry.step >= 0:
                top = max(top, entry.step)
                # A late report of a closed step begins nothing: its allocation did, before the
                # floor. Others of such steps are refused.
                if entry.kind == "allocate" or entry.step > run.closed_step:
                    firsts.setdefault(entry.step, entry.seq)
        highest.update(dict.fromkeys(waiting, top))
        return cls(firsts, highest)

    def settled(self, horizon: int) -> set[int]:
        """Return the steps that more than ``horizon`` lower ones have begun after."""
        found: set[int] = set()
        # The lowest of the steps that began later, negated: the highest of them comes first.
        lowest: list[int] = []
        for step in reversed(self.firsts):
            if len(lowest) <= horizon:
                heapq.heappush(lowest, -step)
            elif step > -lowest[0]:
                found.add(step)
            else:
                heapq.heapreplace(lowest, -step)
        return found


class Horizon:
    """The steps of a run that are not settled, counted from the newest one.

    Args:
        steps: of the run.
        horizon: steps behind the newest one that a rewind may at least name.

    Attributes:
        oldest: the step that is the horizon behind; None if there are not as many.
    """

    def __init__(self, steps: RecordedSteps, horizon: int) -> None:
        settled = steps.settled(horizon)
        self._begun: list[int] = []
        self._top: list[int] = []
        for step, seq in steps.firsts.items():
            if step not in settled:
                self._begun.append(seq)
                self._top.append(max(step, self._top[-1] if self._top else -1))
        counted = sorted(step for step in steps.firsts if step not in settled)
        self.oldest = counted[-1 - horizon] if len(counted) > horizon else None

    def step_of(self, seq: int) -> int:
        """Return the highest step begun up to an entry, -1 if none: what a rewind may name."""
        begun = self.begun(seq)
        return self._top[begun - 1] if begun else -1

    def begun(self, seq: int) -> int:
        """Return how many steps have begun up to an entry."""
        return bisect_right(self._begun, seq)

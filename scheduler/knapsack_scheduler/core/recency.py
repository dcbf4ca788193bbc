"""Which prompts were visited last, without looking at all of them.

Does not depend on the order in which visits became known, nor on when was asked: whether a
prompt was ever visited, or at two steps, and the step of its newest visit only ever go one way.
So what is not among the newest now, with a lower key, is not among them later either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.distinct import ascending
from knapsack_scheduler.core.evidence import Visits
from knapsack_scheduler.core.problem import BoolArray, IntArray, KeyArray
from knapsack_scheduler.core.ties import lowest_keys

_MANY = 2**16
"""Rows that are held before those that cannot be among the newest any more are let go."""


class LastVisited:
    """Prompts that were visited at one step or more, or at two, by the step of their newest visit.

    Args:
        count: how many of them are asked for.
        twice: only those visited at two steps or more, also where the newest step has pushed
            the others out of the window.
    """

    def __init__(self, count: int, *, twice: bool) -> None:
        self._count = count
        self._twice = twice
        self._by_step: dict[int, list[IntArray]] = {}
        self._added = 0

    @classmethod
    def of(cls, visits: Visits, count: int) -> LastVisited:
        """Return that of all prompts with a visit."""
        last = cls(count, twice=False)
        last._take(np.flatnonzero(visits.rollouts[:, 0]), visits)
        return last

    def add(self, rows: IntArray, step: int, visits: Visits, keys: KeyArray) -> None:
        """Take in that rollouts of these rows at a step are in the windows.

        Args:
            rows: int64[n], each named once.
            step: as of ``Visits``.
            visits: of the run.
            keys: tie key of every row, uint64[P], always the same.
        """
        if self._twice:
            # Where another step is the newest there are two, wherever this one went.
            twice = visits.step[rows, 0] != step
            alone = np.flatnonzero(~twice)
            twice[alone] = _again(rows[alone], visits)
            rows = rows[twice]
        self._take(rows, visits)
        if self._added > _MANY:
            self.newest(visits, keys)

    def _take(self, rows: IntArray, visits: Visits) -> None:
        if not rows.size:
            return
        self._added += rows.size
        newest = visits.step[rows, 0]
        if (newest == newest[0]).all():
            self._by_step.setdefault(int(newest[0]), []).append(rows)
            return
        order = np.argsort(newest, kind="stable")
        steps, begins = np.unique(newest[order], return_index=True)
        for at, of_step in zip(steps.tolist(), np.split(rows[order], begins[1:]), strict=True):
            self._by_step.setdefault(at, []).append(of_step)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return what ``from_columns`` makes the same of."""
        parts = {step: np.concatenate(rows) for step, rows in self._by_step.items()}
        return {
            "step": np.array(list(parts), np.int64),
            "size": np.array([rows.size for rows in parts.values()], np.int64),
            "rows": np.concatenate([np.zeros(0, np.int64), *parts.values()]),
        }

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, npt.NDArray[Any]], count: int, *, twice: bool
    ) -> LastVisited:
        """Return that of ``columns()``, with the same ``count`` and ``twice``."""
        last = cls(count, twice=twice)
        rows = np.split(columns["rows"], np.cumsum(columns["size"])[:-1])
        steps = columns["step"].tolist()
        last._by_step = {step: [rows[at]] for at, step in enumerate(steps)}
        return last

    def newest(self, visits: Visits, keys: KeyArray) -> IntArray:
        """Return the rows whose newest visit is newest, in the order of their keys.

        Whole steps are taken until there are ``count`` rows, and of all these the ``count``
        with the lowest keys; fewer if there are not as many.

        Args:
            visits: of the run.
            keys: as of ``add``.
        """
        found: dict[int, IntArray] = {}
        total = 0
        for step in sorted(self._by_step, reverse=True):
            # There will never be fewer in the newer steps.
            if total >= self._count:
                break
            parts = self._by_step[step]
            rows = parts[0] if len(parts) == 1 else ascending(np.concatenate(parts))
            # The others were visited again since.
            rows = rows[visits.step[rows, 0] == step]
            if rows.size:
                found[step] = rows
                total += rows.size
        self._by_step = {step: [rows] for step, rows in found.items()}
        self._added = 0
        if not found:
            return np.zeros(0, np.int64)
        rows = np.concatenate(list(found.values()))
        chosen = lowest_keys(keys[rows], self._count)
        # Of the oldest step only these: as long as it is taken, the others have too many before
        # them. The newer steps stay whole, to be counted.
        oldest = next(reversed(found))
        begins = total - found[oldest].size
        self._by_step[oldest] = [rows[chosen[chosen >= begins]]]
        rows = rows[chosen]
        return rows[np.argsort(keys[rows], kind="stable")]


def _again(rows: IntArray, visits: Visits) -> BoolArray:
    """Return which rows have visits at two steps or more in their windows, bool[n]."""
    others = visits.step[rows] != visits.step[rows, 0][:, None]
    again: BoolArray = ((visits.rollouts[rows] > 0) & others).any(axis=1)
    return again

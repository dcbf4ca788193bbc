"""Which prompts were visited last, without looking at all of them.

Does not depend on the order in which visits became known: only on which prompt's newest
visit was at which step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.evidence import Visits
from knapsack_scheduler.core.problem import BoolArray, IntArray, KeyArray
from knapsack_scheduler.core.ties import lowest_keys


class LastVisited:
    """Prompts with visits at one step or more, or at two, by the step of their newest one.

    Args:
        twice: only those with visits at two steps or more.
    """

    def __init__(self, twice: bool) -> None:
        self._twice = twice
        self._by_step: dict[int, list[IntArray]] = {}

    def add(self, rows: IntArray, visits: Visits) -> None:
        """Take in that something was learned of these rows, int64[n], each named once."""
        newest = visits.step[rows, 0]
        if self._twice:
            twice = _again(rows, visits)
            rows, newest = rows[twice], newest[twice]
        if not rows.size:
            return
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
    def from_columns(cls, columns: Mapping[str, npt.NDArray[Any]], twice: bool) -> LastVisited:
        """Return that of ``columns()``, with the same ``twice``."""
        last = cls(twice)
        rows = np.split(columns["rows"], np.cumsum(columns["size"])[:-1])
        steps = columns["step"].tolist()
        last._by_step = {step: [rows[at]] for at, step in enumerate(steps)}
        return last

    def newest(self, count: int, visits: Visits, keys: KeyArray) -> IntArray:
        """Return the rows whose newest visit is newest, in the order of their keys.

        Whole steps are taken until there are ``count`` rows, and of all these the ``count``
        with the lowest keys. Older steps are forgotten: a prompt's newest visit only ever
        becomes newer.

        Args:
            count: rows wanted; fewer if there are not as many.
            visits: of the run.
            keys: tie key of every row, uint64[P].
        """
        found: list[IntArray] = []
        total = 0
        for step in sorted(self._by_step, reverse=True):
            if total >= count:
                del self._by_step[step]
                continue
            rows = self._by_step[step][0]
            if len(self._by_step[step]) > 1:
                rows = np.unique(np.concatenate(self._by_step[step]))
            rows = rows[visits.step[rows, 0] == step]
            if self._twice:
                # Visits of the newest step may have pushed the others out of the window.
                rows = rows[_again(rows, visits)]
            if rows.size == 0:
                # All of them were visited again since.
                del self._by_step[step]
                continue
            self._by_step[step] = [rows]
            found.append(rows)
            total += rows.size
        if not found:
            return np.zeros(0, np.int64)
        rows = np.concatenate(found)
        rows = rows[lowest_keys(keys[rows], count)]
        return rows[np.argsort(keys[rows], kind="stable")]


def _again(rows: IntArray, visits: Visits) -> BoolArray:
    """Return which rows have visits at two steps or more, bool[n]."""
    others = visits.step[rows] != visits.step[rows, 0][:, None]
    again: BoolArray = ((visits.rollouts[rows] > 0) & others).any(axis=1)
    return again

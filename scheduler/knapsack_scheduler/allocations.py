"""Allocations that reports may still arrive for, and what a report changes.

In memory for as long as the journal keeps their entries; a snapshot stores all of them as
a few columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.calibration import Calibration
from knapsack_scheduler.core.evidence import GroupOutcomes
from knapsack_scheduler.core.problem import (
    BoolArray,
    Bounds,
    Budget,
    FloatArray,
    IntArray,
    WaveOutcomes,
)
from knapsack_scheduler.core.rewardlevels import RewardLevels
from knapsack_scheduler.journal.columns import decode_text, encode_text, text_column


@dataclass(frozen=True, slots=True)
class Counted:
    """What folding a report changed.

    Attributes:
        accepted: rollouts counted.
        ignored: rollouts of a forgotten allocation.
        groups: positions that had their first rollout.
        effective_groups: positions whose rewards became unequal.
        effective_rollouts: rollouts that came to lie in groups with unequal rewards.
        judged: groups whose rollouts have all come, of which a chance was predicted; None
            for none.
        completes: all rollouts of an allocation have now come.
    """

    accepted: int = 0
    ignored: int = 0
    groups: int = 0
    effective_groups: int = 0
    effective_rollouts: int = 0
    judged: Calibration | None = None
    completes: bool = False


@dataclass(slots=True)
class OpenAllocation:
    """An allocation that reports may still arrive for.

    Attributes:
        step: the trainer's.
        rows: of the prompt at each position, int32[M].
        bounds: of whole groups.
        budget: of all waves.
        wave: the newest.
        allocated, delivered, successes: int32[M], all waves so far.
        low, high: lowest and highest reward at each position, float32[M].
        chance: that the group is effective when ``awaited`` rollouts of it came, as
            predicted by the newest wave, float32[M]; NaN where nothing is predicted, or
            has been judged.
        awaited: int32[M].
    """

    step: int
    rows: npt.NDArray[np.int32]
    bounds: Bounds
    budget: Budget
    wave: int
    allocated: npt.NDArray[np.int32]
    delivered: npt.NDArray[np.int32]
    successes: npt.NDArray[np.int32]
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    chance: npt.NDArray[np.float32]
    awaited: npt.NDArray[np.int32]

    @classmethod
    def made(
        cls, step: int, rows: IntArray, bounds: Bounds, budget: Budget, num_rollouts: IntArray
    ) -> OpenAllocation:
        """Return the allocation of a first wave of which nothing was reported yet."""
        count = rows.size
        return cls(
            step,
            rows.astype(np.int32),
            Bounds(_slim(bounds.minimum), _slim(bounds.maximum)),
            budget,
            1,
            num_rollouts.astype(np.int32),
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            np.full(count, np.inf, np.float32),
            np.full(count, -np.inf, np.float32),
            np.full(count, np.nan, np.float32),
            np.zeros(count, np.int32),
        )

    @property
    def mixed(self) -> BoolArray:
        """Positions whose rewards are not all equal, bool[M]."""
        return self.low < self.high

    def outcomes(self, levels: RewardLevels) -> WaveOutcomes:
        """Return what became of the waves so far; ``levels`` are those of the run."""
        mixed = self.mixed
        level = None
        if levels.plural:
            alike = (self.delivered > 0) & ~mixed
            level = np.where(alike, levels.index(np.where(alike, self.low, 0.0)), -1)
        return WaveOutcomes(
            self.allocated.astype(np.int64),
            self.delivered.astype(np.int64),
            self.successes.astype(np.int64),
            mixed,
            level,
        )

    def predict(self, new: IntArray, chances: FloatArray, keep_outstanding: bool = False) -> None:
        """Await the rollouts of a wave, and what they are said to lead to.

        Args:
            new: given to each position, not yet in ``allocated``, int64[M].
            chances: that each whole group is effective then, float64[M].
            keep_outstanding: those that were given before and have not come are awaited too.
        """
        coming = new.astype(np.int32)
        if keep_outstanding:
            coming = coming + np.maximum(self.allocated - self.delivered, 0)
        predicted = (coming > 0) & ~self.mixed
        self.chance = np.where(predicted, chances, np.nan).astype(np.float32)
        self.awaited = self.delivered + coming

    def deliver(self, outcomes: GroupOutcomes) -> Counted:
        """Count delivered rollouts at their positions; returns what they changed."""
        begun, mixed = self.delivered > 0, self.mixed
        in_effective = int(self.delivered[mixed].sum())
        self.delivered += outcomes.rollouts.astype(np.int32)
        self.successes += outcomes.successes.astype(np.int32)
        np.minimum(self.low, outcomes.reward_min, out=self.low)
        np.maximum(self.high, outcomes.reward_max, out=self.high)
        now_mixed = self.mixed
        return Counted(
            accepted=int(outcomes.rollouts.sum()),
            groups=int(np.count_nonzero((self.delivered > 0) & ~begun)),
            effective_groups=int(np.count_nonzero(now_mixed & ~mixed)),
            effective_rollouts=int(self.delivered[now_mixed].sum()) - in_effective,
            completes=bool((self.delivered >= self.allocated).all()),
        )


_POSITION_COLUMNS = {
    "rows": np.int32,
    "allocated": np.int32,
    "delivered": np.int32,
    "successes": np.int32,
    "low": np.float32,
    "high": np.float32,
    "chance": np.float32,
    "awaited": np.int32,
}


def _slim(bound: IntArray) -> IntArray:
    """Return the same numbers, in no memory if they are all equal."""
    if bound.size and (bound == bound[0]).all():
        return np.broadcast_to(bound[:1].copy(), bound.shape)
    return bound


def allocation_columns(allocations: Mapping[str, OpenAllocation]) -> dict[str, npt.NDArray[Any]]:
    """Return named columns that hold all allocations, as a snapshot stores them."""
    each = list(allocations.values())
    names, lengths = encode_text(list(allocations))
    columns: dict[str, npt.NDArray[Any]] = {
        "allocations": names,
        "allocation_lengths": lengths,
        "allocation.size": np.array([a.rows.size for a in each], np.int64),
        "allocation.step": np.array([a.step for a in each], np.int64),
        "allocation.wave": np.array([a.wave for a in each], np.int64),
        "allocation.budgets": text_column(json.dumps([asdict(a.budget) for a in each])),
        "allocation.minimum": _joined([a.bounds.minimum for a in each], np.int64),
        "allocation.maximum": _joined([a.bounds.maximum for a in each], np.int64),
    }
    for name, dtype in _POSITION_COLUMNS.items():
        columns[f"allocation.{name}"] = _joined([getattr(a, name) for a in each], dtype)
    return columns


def allocations_of(columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, OpenAllocation]:
    """Return the allocations of ``allocation_columns``; other columns are left alone."""
    names = decode_text(columns["allocations"], columns["allocation_lengths"])
    ends = np.cumsum(columns["allocation.size"])
    cut = {
        name: np.split(columns[f"allocation.{name}"], ends[:-1])
        for name in ("minimum", "maximum", *_POSITION_COLUMNS)
    }
    budgets = json.loads(columns["allocation.budgets"].tobytes())
    return {
        name: OpenAllocation(
            step=int(columns["allocation.step"][at]),
            wave=int(columns["allocation.wave"][at]),
            bounds=Bounds(_slim(cut["minimum"][at]), _slim(cut["maximum"][at])),
            budget=Budget(**budgets[at]),
            # Copies: a view would keep the columns of all of them in memory.
            **{column: cut[column][at].copy() for column in _POSITION_COLUMNS},
        )
        for at, name in enumerate(names)
    }


def _joined(arrays: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)

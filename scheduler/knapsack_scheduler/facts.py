"""What the journal says happened to a run: the events that its state is folded from.

Frozen, plain, without protobuf. ``wire.fact_of`` makes them from stored calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import Bounds, Budget, FloatArray, IntArray

ALWAYS = -(2**62)
"""Step of entries that no rewind forgets."""


@dataclass(frozen=True, slots=True)
class AllocationMade:
    """A batch got its first wave.

    Attributes:
        chances: that each group comes out effective, as it was decided; None where that
            has to be computed from the state before, which gives the same.
    """

    allocation_id: str
    step: int
    prompt_ids: tuple[str, ...]
    bounds: Bounds
    budget: Budget
    num_rollouts: IntArray
    chances: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class AllocationExtended:
    """A batch got a further wave.

    Attributes:
        keep_outstanding: rollouts not delivered yet were taken as under way.
        chances: as of ``AllocationMade``.
    """

    allocation_id: str
    step: int
    num_rollouts: IntArray
    keep_outstanding: bool = False
    chances: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Rewards:
    """Rewards of some positions, flat: first those of ``positions[0]``, and so on.

    Attributes:
        positions: that rewards are of, int64[k]; one may be there more than once.
        counts: rewards of each, int64[k], 0 or more, n in all.
        highest: of the positions; 0 if there are none.
        rewards: float32[n].
        tokens: completion length of each rollout, int64[n]; None if unknown.
    """

    positions: IntArray
    counts: IntArray
    highest: int
    rewards: npt.NDArray[np.float32]
    tokens: IntArray | None

    @classmethod
    def of_each(
        cls, owner: IntArray, rewards: npt.NDArray[np.float32], tokens: IntArray | None = None
    ) -> Rewards:
        """Return rewards whose positions are given one by one, int64[n]."""
        return cls(owner, np.ones(owner.size, np.int64), int(owner.max(initial=0)), rewards, tokens)

    def owner(self) -> IntArray:
        """Return the position of each reward, int64[n]."""
        return np.repeat(self.positions, self.counts)


@dataclass(frozen=True, slots=True)
class OutcomesReported:
    """Rollouts came back.

    Attributes:
        allocation_id: the allocation they belong to; empty for none.
        step: of the allocation, or their own.
        prompt_ids: without an allocation, what the positions are of.
        policy_version: that generated them.
        rewards: by position.
        ignored: they are of a step that a rewind had forgotten when they came.
    """

    allocation_id: str
    step: int
    prompt_ids: tuple[str, ...]
    policy_version: int
    rewards: Rewards
    ignored: bool


@dataclass(frozen=True, slots=True)
class ImportedPart:
    """One message of an import."""

    step: int
    prompt_ids: tuple[str, ...]
    rewards: Rewards


@dataclass(frozen=True, slots=True)
class OutcomesImported:
    """Outcomes of an earlier run were added."""

    parts: tuple[ImportedPart, ...]


@dataclass(frozen=True, slots=True)
class Rewound:
    """Everything after a step was forgotten."""

    step: int


Fact = AllocationMade | AllocationExtended | OutcomesReported | OutcomesImported | Rewound

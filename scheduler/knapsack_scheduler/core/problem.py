"""The nouns of an allocation: prompts as columns, bounds, budget, decision, reasons.

Columns are parallel: position i of every array speaks of the i-th prompt of the batch.
The same prompt may stand at several positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
KeyArray: TypeAlias = npt.NDArray[np.uint64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


class InfeasibleBudget(ValueError):
    """The bounds cannot hold the budget.

    Attributes:
        field: the argument at fault, such as ``total_rollouts``.
        value: what it was.
        allowed: what would have been accepted, with the sums that say so.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field} = {value}: {allowed}")


def tie_key(prompt_id: str) -> int:
    """Return the 64-bit key that breaks ties of this prompt: the same on every machine.

    BLAKE2b of the UTF-8 bytes (RFC 7693), 8 bytes, big-endian. Lone surrogates, which
    UTF-8 cannot hold, are kept apart by ``surrogatepass``.
    """
    data = prompt_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def tie_keys(prompt_ids: Sequence[str]) -> KeyArray:
    """Return ``tie_key`` of every prompt id, uint64[M]."""
    digests = b"".join(
        hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for p in prompt_ids
    )
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fewest and most rollouts of each position, int64[M], ``0 <= minimum <= maximum``.

    ``minimum = 0`` allows the position to be skipped: it then gets 0 or at least 2
    rollouts, because a group of one teaches nothing.
    """

    minimum: IntArray
    maximum: IntArray

    @property
    def most(self) -> IntArray:
        """Most rollouts that a position can be given: no group of one where none is asked."""
        alone = (self.minimum == 0) & (self.maximum == 1)
        return np.where(alone, 0, self.maximum)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a step may spend.

    Attributes:
        total_rollouts: rollouts of all waves; 0 is no cap (then total_tokens is one).
        total_tokens: expected completion tokens of all waves; 0 is no cap.
        wave_fraction: share of the total to spend in this wave, in (0, 1]; 0 is all
            that is left, or what ``waves`` says.
        allow_partial: when the bounds cannot hold the total, give the closest total
            they can hold instead of refusing.
        waves: 2 if the first wave is to be sized for a second one that spends the rest;
            0 or 1 if ``wave_fraction`` says what is spent.
    """

    total_rollouts: int
    total_tokens: int = 0
    wave_fraction: float = 0.0
    allow_partial: bool = False
    waves: int = 0


@dataclass(frozen=True, slots=True)
class Levels:
    """Which rewards a rollout may get, where there are more than two.

    Attributes:
        concentration: of the Dirichlet posterior of the levels' shares, float64[M, K],
            >= 0; over the levels that are successes they sum to alpha, over the others to
            beta, added in the order of the levels.
        success: bool[K], True for levels that are successes.
    """

    concentration: FloatArray
    success: BoolArray


@dataclass(frozen=True, slots=True)
class Posterior:
    """What is believed of the outcomes of a rollout on each prompt.

    Attributes:
        alpha, beta: Beta posterior of the success rate, float64[M], finite, > 0.
        levels: shares of the reward levels; None where a reward is one of two.
        kinds: numbers from 0 of which equal ones have the same alpha and beta, int64[M]; None
            where that is not known.
    """

    alpha: FloatArray
    beta: FloatArray
    levels: Levels | None = None
    kinds: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What each group has before new rollouts are given to it.

    Attributes:
        delivered: rollouts whose rewards are known, int64[M].
        successes: those that succeeded, int64[M].
        mixed: bool[M], True where the known rewards are not all equal.
        outstanding: rollouts under way, int64[M].
        level: index of the one level that was seen, int64[M]; -1 where there is none.
            None where rewards have no levels.
    """

    delivered: IntArray
    successes: IntArray
    mixed: BoolArray
    outstanding: IntArray
    level: IntArray | None = None

    @classmethod
    def nothing(cls, count: int) -> Begun:
        """Return that of ``count`` new groups."""
        zero = np.zeros(count, np.int64)
        return cls(zero, zero, np.zeros(count, np.bool_), zero)

    @property
    def size(self) -> IntArray:
        """Rollouts of each group that need not be given again, int64[M]."""
        return self.delivered + self.outstanding


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What is believed of each position's prompt.

    Attributes:
        posterior: of the outcomes of a rollout.
        tie_keys: uint64[M], see ``tie_key``.
        unseen: bool[M], True where the prompt has no outcome yet.
        expected_tokens: expected completion tokens of a rollout, float64[M], >= 0;
            0 everywhere when the run has seen no tokens.
        recent: newest rewards, for the policy "paper" only.
    """

    posterior: Posterior
    tie_keys: KeyArray
    unseen: BoolArray
    expected_tokens: FloatArray
    recent: Recent | None = None


@dataclass(frozen=True, slots=True)
class Recent:
    """Newest rewards of each position's prompt.

    Attributes:
        rollouts: how many a rate is taken from, float64[M].
        successes: those of them that were successes, float64[M]; a part of a visit counts
            in proportion, as the order within a visit is not kept.
    """

    rollouts: FloatArray
    successes: FloatArray


@dataclass(frozen=True, slots=True)
class WaveOutcomes:
    """What became of an allocation's earlier waves, per position.

    Attributes:
        allocated: rollouts given in all waves so far, int64[M].
        delivered: rollouts reported so far, int64[M], ``<= allocated``.
        successes: those of them that were successes, int64[M].
        mixed: bool[M], True where the delivered rewards are not all equal.
        level: index of the one level delivered, int64[M]; see ``Begun``.
    """

    allocated: IntArray
    delivered: IntArray
    successes: IntArray
    mixed: BoolArray
    level: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why a decision is what it is, and what to expect of it.

    Rates and values are expectations for the whole groups, all waves so far, under the
    beliefs at the time of the decision.

    Attributes:
        policy: name of the rule that decided.
        objective: name of what was maximised.
        effective_group_rate: share of non-empty groups expected to be effective, 0..1.
        effective_rollout_rate: share of rollouts expected to lie in them, 0..1.
        value: expected objective of the decision.
        uniform_value: expected objective of the same total divided uniformly.
        value_upper_bound: no decision within bounds and budget has a higher value.
        price: objective per unit of budget at the margin (lambda).
        unseen_prompts: positions without any outcome.
        largest_group: rollouts of the largest group.
        expected_tokens: expected completion tokens of the new rollouts.
    """

    policy: str
    objective: str
    effective_group_rate: float
    effective_rollout_rate: float
    value: float
    uniform_value: float
    value_upper_bound: float
    price: float
    unseen_prompts: int
    largest_group: int
    expected_tokens: float


@dataclass(frozen=True, slots=True)
class Decision:
    """How many rollouts to generate now.

    Attributes:
        num_rollouts: int64[M], the new rollouts of this wave.
        allocated: their sum.
        remaining: budget left for later waves, in rollouts.
        unallocated: budget the bounds could not hold; negative where the minimums
            needed more than the budget.
        chances: that each whole group is effective when this wave has come, float64[M].
        reasons: see ``Reasons``.
    """

    num_rollouts: IntArray
    allocated: int
    remaining: int
    unallocated: int
    chances: FloatArray
    reasons: Reasons

"""How much of what was seen of a prompt still counts.

The counts of a visit weigh ``visit_discount`` less for each later step that visited the
prompt, and ``version_discount`` less for each policy version since. The first is settled
when the visits are; of the second, what lies between the visits of a prompt is too, and the
rest is one factor for all of them. So the evidence of a prompt is summed when it is visited,
as of the newest version among its visits, and aged by one multiplication when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.distinct import ascending
from knapsack_scheduler.core.evidence import WINDOW, Visits, Windows, resized
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray

_MAX_EXPONENT = 2**20
"""Version distances beyond this weigh the same: 0.99999 ** 2**20 is 3e-5."""

_TABLE = 2**14
"""Powers below this one are looked up."""

FEW_VISITS = 2**16
"""Visits that may wait until they are asked for: it takes some tens of milliseconds to sum so
many."""

_CHUNK = 2**14
"""Prompts at once: their windows stay in the cache."""


@dataclass(frozen=True, slots=True)
class Discounts:
    """How fast evidence ages.

    Attributes:
        visit: factor per later visiting step, in (0, 1].
        version: factor per policy version since, in (0, 1].
        cap: most rollouts that a prompt's evidence may weigh, > 0.
    """

    visit: float
    version: float
    cap: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """Weighed outcomes of some prompts, each as of the newest policy version of its visits.

    Attributes:
        successes, failures: float64[n], >= 0.
        policy_version: int64[n]; 0 where there is no visit.
    """

    successes: FloatArray
    failures: FloatArray
    policy_version: IntArray

    def factor(self, policy_version: int | IntArray, discounts: Discounts) -> FloatArray:
        """Return what the evidence weighs by a later version, of 1 and held to the cap, [n]."""
        total = self.successes + self.failures
        if discounts.version == 1.0:
            return discounts.cap / np.maximum(total, discounts.cap)
        aged = _power(discounts.version, np.maximum(policy_version - self.policy_version, 0))
        total *= aged
        aged *= discounts.cap / np.maximum(total, discounts.cap)
        return aged

    def at(
        self, policy_version: int | IntArray, discounts: Discounts
    ) -> tuple[FloatArray, FloatArray]:
        """Return successes and failures as they weigh by a later version, float64[n] each."""
        factor = self.factor(policy_version, discounts)
        return self.successes * factor, self.failures * factor


@dataclass(frozen=True, slots=True)
class Weighed:
    """Windows and what each visit in them weighs as of the newest version among them.

    Attributes:
        weight: [WINDOW, n]; 0 for empty slots and for visits at the step apart.
        policy_version: newest of the visits that weigh, int64[n].
        now: visits at the step apart, bool[WINDOW, n]; None where there are none.
    """

    windows: Windows
    weight: FloatArray
    policy_version: IntArray
    now: BoolArray | None

    @classmethod
    def of(
        cls,
        windows: Windows,
        discounts: Discounts,
        apart: npt.NDArray[np.int64] | np.int64 | None = None,
    ) -> Weighed:
        """Weigh the visits.

        Args:
            windows: of the prompts.
            discounts: how fast evidence ages.
            apart: a step, of all or int64[n], whose visits weigh nothing and make the others
                no older; None for no such step.
        """
        step = windows.step
        others = windows.rollouts > 0
        now = None
        if apart is not None:
            now = others & (step == apart)
            if now.any():
                others &= ~now
            else:
                now = None
        # The age of a visit is the number of different steps among the newer ones.
        begins = others.copy()
        begins[1:] &= ~(others[:-1] & (step[1:] == step[:-1]))
        age = np.cumsum(begins, axis=0, dtype=np.int8)
        # Counted from 1; of 0 are those that weigh nothing.
        weight: FloatArray = _by_age(discounts.visit).take(age)
        weight *= others
        newest = np.where(others, windows.policy_version, 0).max(axis=0)
        if discounts.version != 1.0:
            weight *= _power(discounts.version, np.maximum(newest - windows.policy_version, 0))
        return cls(windows, weight, newest, now)

    @property
    def evidence(self) -> Evidence:
        """The outcomes so weighed."""
        windows = self.windows
        return Evidence(
            summed(self.weight * windows.successes),
            summed(self.weight * (windows.rollouts - windows.successes)),
            self.policy_version,
        )


class EvidenceOfAll:
    """Evidence of every prompt of a run, summed when it is first asked for after a visit."""

    def __init__(self) -> None:
        # Behind the rows is one without evidence, which -1 names. NaN is to be summed.
        self._successes = np.zeros(1)
        self._failures = np.zeros(1)
        self._versions = np.zeros(1, np.int64)
        self._stale: list[IntArray] = []
        self._stale_rows = 0

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` prompts; new ones have no evidence. Never shrinks."""
        before = self._versions.size
        if rows >= before:
            capacity = max(rows, before * 5 // 4, 64) + 1
            self._successes = resized(self._successes, capacity, 0)
            self._failures = resized(self._failures, capacity, 0)
            self._versions = resized(self._versions, capacity, 0)

    def visited(self, rows: IntArray) -> None:
        """Take note that something more is known of these rows, int64[n], each named once."""
        if rows.size == 0:
            return
        self._successes[rows] = np.nan
        self._stale.append(rows)
        self._stale_rows += rows.size

    def prepare(self, visits: Visits, discounts: Discounts, few: int = 0) -> None:
        """Sum what was visited since the last time, unless it is only a few visits.

        Args:
            visits, discounts: as for ``of``.
            few: so many visits may wait for the batches that ask for them.
        """
        if self._stale_rows <= few:
            return
        rows = self._stale[0]
        if len(self._stale) > 1:
            rows = ascending(np.concatenate(self._stale))
        for start in range(0, rows.size, _CHUNK):
            self.of(rows[start : start + _CHUNK], visits, discounts)
        self._stale, self._stale_rows = [], 0

    def of(self, rows: IntArray, visits: Visits, discounts: Discounts) -> Evidence:
        """Return the evidence of rows.

        Args:
            rows: int64[n]; -1 for a prompt that was never seen.
            visits: of the run.
            discounts: of the run, always the same.
        """
        successes = self._successes.take(rows)
        missing = np.flatnonzero(np.isnan(successes))
        if missing.size:
            some = rows[missing]
            found = Weighed.of(Windows.of(visits, some), discounts).evidence
            self._successes[some] = found.successes
            self._failures[some] = found.failures
            self._versions[some] = found.policy_version
            successes[missing] = found.successes
        return Evidence(successes, self._failures.take(rows), self._versions.take(rows))


def summed(slots: FloatArray) -> FloatArray:
    """Return the sum of each prompt's visits, [WINDOW, n], from newest to oldest.

    np.sum may choose another order.
    """
    total: FloatArray = slots[0].copy()
    for slot in slots[1:]:
        total += slot
    return total


def _power(base: float, exponents: IntArray) -> FloatArray:
    """Return base ** exponents, float64 of their shape."""
    most = int(exponents.max(initial=0))
    if most < _TABLE:
        powers: FloatArray = _powers(base, 1 << most.bit_length()).take(exponents)
        return powers
    return _squared(base, np.minimum(exponents, _MAX_EXPONENT))


@lru_cache(maxsize=64)
def _powers(base: float, count: int) -> FloatArray:
    """Return base ** k for k = 0 .. count - 1, not to be written to."""
    return _squared(base, np.arange(count))


@lru_cache(maxsize=64)
def _by_age(discount: float) -> FloatArray:
    """Return what a visit weighs by its age, 0 to WINDOW, counted from 1."""
    return np.concatenate([[1.0], _powers(discount, WINDOW)])


def _squared(base: float, exponents: IntArray) -> FloatArray:
    """Raise by squaring: only multiplications, so reproducible."""
    result = np.ones(exponents.shape)
    left = exponents
    factor = base
    while left.any():
        odd = (left & 1).astype(bool)
        result[odd] *= factor
        factor *= factor
        left = left >> 1
    return result

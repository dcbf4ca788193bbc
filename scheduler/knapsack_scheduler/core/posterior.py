"""Evidence becomes a Beta posterior of every prompt's success rate.

The counts of a visit weigh ``visit_discount`` less for each later step that visited the
prompt and ``version_discount`` less for each policy version since, because the policy
moves on; the prior is fitted to the run's own prompts, and so is the drift of success rates
since they were seen (``core/drift.py``). A prompt that nobody has visited has the prior, one
that is rarely visited drifts back to it, and a prompt that always failed keeps some chance of
success: no case needs a rule of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.drift import FEWEST_PROMPTS, Drift, fit_drift
from knapsack_scheduler.core.evidence import WINDOW, Visits
from knapsack_scheduler.core.levels import class_weights
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray, Levels, Posterior
from knapsack_scheduler.core.rewardlevels import RewardLevels

_FIXED_POINT = 2**40
"""Scale of the exact integer sums of success rates."""

_MAX_EXPONENT = 2**20
"""Version distances beyond this weigh the same: 0.99999 ** 2**20 is 3e-5."""

PRIOR_PROMPTS = 16
"""Pseudo-prompts of Beta(1/2, 1/2) in the fit: what is assumed before there is data."""

PRIOR_STRENGTH = (0.3, 4.0)
"""Least and most rollouts that the prior weighs."""

PRIOR_MEAN = (0.02, 0.98)
"""Least and greatest mean of the prior: a run that never fails may yet."""


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
class Prior:
    """A Beta distribution of success rates, alpha > 0 and beta > 0."""

    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class PriorStatistics:
    """Sums over every prompt's newest visit, as exact integers.

    Integers make the sums independent of the order of reports, and ``moved`` keeps
    them up to date without a pass over the prompts.

    Attributes:
        prompts: prompts with a visit.
        rate_sum: sum of successes/rollouts, in units of 2**-40.
        pairs: prompts whose newest visit has two rollouts or more.
        pair_sum: sum over those of the unbiased estimate of the squared success rate,
            k(k-1) / n(n-1), in units of 2**-40.
    """

    prompts: int = 0
    rate_sum: int = 0
    pairs: int = 0
    pair_sum: int = 0

    def moved(
        self,
        old_rollouts: IntArray,
        old_successes: IntArray,
        new_rollouts: IntArray,
        new_successes: IntArray,
    ) -> PriorStatistics:
        """Return the sums after prompts' newest visits went from old to new counts.

        Args:
            old_rollouts, old_successes: [n], counts before; 0 rollouts for no visit.
            new_rollouts, new_successes: [n], counts after.
        """
        old = _sums(old_rollouts, old_successes)
        new = _sums(new_rollouts, new_successes)
        return PriorStatistics(
            self.prompts + new[0] - old[0],
            self.rate_sum + new[1] - old[1],
            self.pairs + new[2] - old[2],
            self.pair_sum + new[3] - old[3],
        )


def _sums(rollouts: IntArray, successes: IntArray) -> tuple[int, int, int, int]:
    n = np.asarray(rollouts, np.int64)
    k = np.asarray(successes, np.int64)
    k, n = k[n > 0], n[n > 0]
    rate = np.floor_divide(k * _FIXED_POINT, n) if n.size else n
    k2, n2 = k[n > 1], n[n > 1]
    # Dividing twice keeps the product inside 63 bits for groups of up to 2**20.
    once = np.floor_divide(k2 * _FIXED_POINT, n2) if n2.size else n2
    rest = np.maximum(k2 - 1, 0)
    whole, part = np.divmod(once, np.maximum(n2 - 1, 1))
    pair = whole * rest + np.floor_divide(part * rest, np.maximum(n2 - 1, 1))
    return int(n.size), int(rate.sum()), int(n2.size), int(pair.sum())


def fit_prior(statistics: PriorStatistics) -> Prior:
    """Return the Beta distribution whose first two moments are those of the run.

    Method of moments on unbiased per-prompt estimates, with ``PRIOR_PROMPTS``
    pseudo-prompts of Beta(1/2, 1/2) and the strength and mean held within
    ``PRIOR_STRENGTH`` and ``PRIOR_MEAN``.
    """
    mean = (statistics.rate_sum / _FIXED_POINT + PRIOR_PROMPTS * 0.5) / (
        statistics.prompts + PRIOR_PROMPTS
    )
    square = (statistics.pair_sum / _FIXED_POINT + PRIOR_PROMPTS * 0.375) / (
        statistics.pairs + PRIOR_PROMPTS
    )
    mean = min(max(mean, PRIOR_MEAN[0]), PRIOR_MEAN[1])
    variance = square - mean * mean
    least, most = PRIOR_STRENGTH
    strength = most
    if variance > 0.0:
        strength = min(max(mean * (1.0 - mean) / variance - 1.0, least), most)
    return Prior(mean * strength, (1.0 - mean) * strength)


def posterior(
    visits: Visits,
    rows: IntArray,
    step: int | None,
    newest_policy_version: int,
    discounts: Discounts,
    prior: Prior,
    reward_levels: RewardLevels,
    drift: Drift,
) -> Posterior:
    """Return what is believed of the outcomes of each row, with levels if there are more than two.

    Evidence of other steps is discounted, added to the prior, and moved by the drift. What
    was seen at the step itself is newer than any drift: it counts in full, beside the rest.
    The prior of a class is divided among its levels as the rollouts of the run are; a class
    of which no level was seen counts as one level.

    Args:
        visits: the run's windows.
        rows: int64[M]; -1 for a prompt never seen, which gets the prior.
        step: what is decided for; None for no step in particular.
        newest_policy_version: newest version reported to the run.
        discounts: how fast evidence ages.
        prior: of the run.
        reward_levels: of the run.
        drift: of the run.
    """
    levels, success = _prior_levels(prior, reward_levels, visits)
    columns = np.tile(levels, (rows.size, 1))
    seen = np.flatnonzero(rows >= 0)
    if seen.size:
        picked = rows[seen]
        apart = None if step is None else np.int64(step)
        weight, now = _weights(visits, picked, apart, newest_policy_version, discounts)
        counts = _counts(visits, picked)
        older = columns[seen]
        for level, count in enumerate(counts):
            older[:, level] += _row_sum(weight * count)
        older = _moved(older, success, _row_sum(weight) > 0.0, drift)
        if now.any():
            for level, count in enumerate(counts):
                older[:, level] += (now * count).sum(axis=1)
        columns[seen] = older
    alpha, beta = class_weights(columns, success)
    if success.size == 2:
        return Posterior(alpha, beta)
    return Posterior(alpha, beta, Levels(columns, success))


def newest_drift(
    visits: Visits,
    rows: IntArray,
    discounts: Discounts,
    prior: Prior,
) -> Drift:
    """Return how success rates moved up to the newest visits of some prompts.

    Args:
        visits: the run's windows.
        rows: int64[n], with visits at two steps or more.
        discounts, prior: of the run.
    """
    if rows.size < FEWEST_PROMPTS:
        return Drift()
    version = visits.policy_version[rows, :1]
    newest = visits.step[rows, :1]
    weight, now = _weights(visits, rows, newest, version, discounts)
    successes, rollouts = visits.successes[rows], visits.rollouts[rows]
    alpha = prior.alpha + _row_sum(weight * successes)
    beta = prior.beta + _row_sum(weight * (rollouts - successes))
    return fit_drift(alpha, beta, (now * rollouts).sum(axis=1), (now * successes).sum(axis=1))


def _prior_levels(
    prior: Prior, reward_levels: RewardLevels, visits: Visits
) -> tuple[FloatArray, BoolArray]:
    """Return the prior's weight of each level, and which levels are successes."""
    if not reward_levels.plural or visits.by_level is None:
        return np.array([prior.beta, prior.alpha]), np.array([False, True])
    success = reward_levels.success
    weights = np.empty(success.size)
    for good in (False, True):
        of_class = np.flatnonzero(success == good)
        rollouts = reward_levels.rollouts[of_class] + 1.0
        weights[of_class] = (prior.alpha if good else prior.beta) * (rollouts / rollouts.sum())
    for mass, good in ((prior.beta, False), (prior.alpha, True)):
        if not (success == good).any():
            weights, success = np.append(weights, mass), np.append(success, good)
    return weights, success


def _counts(visits: Visits, picked: IntArray) -> list[npt.NDArray[np.int32]]:
    """Return the rollouts of each level in each visit, [n, WINDOW] each."""
    if visits.by_level is not None:
        by_level = visits.by_level[picked]
        return [by_level[:, :, level] for level in range(by_level.shape[2])]
    successes = visits.successes[picked]
    return [visits.rollouts[picked] - successes, successes]


def _moved(
    columns: FloatArray, success: BoolArray, has_evidence: BoolArray, drift: Drift
) -> FloatArray:
    """Return the columns with the means of the rows that have evidence moved."""
    if drift == Drift():
        return columns
    alpha, beta = class_weights(columns, success)
    new_alpha, new_beta = drift.moved(alpha, beta)
    for level, good in enumerate(success.tolist()):
        factor = new_alpha / alpha if good else new_beta / beta
        columns[:, level] *= np.where(has_evidence, factor, 1.0)
    return columns


def _weights(
    visits: Visits,
    picked: IntArray,
    apart: npt.NDArray[np.int64] | np.int64 | None,
    newest_policy_version: int | IntArray,
    discounts: Discounts,
) -> tuple[FloatArray, BoolArray]:
    """Return what each visit weighs, [n, WINDOW], and which are at the step apart.

    Visits at the step ``apart`` ([n, 1], one for all, or None) weigh nothing and make the
    others no older.
    """
    step = visits.step[picked]
    rollouts = visits.rollouts[picked]
    filled = rollouts > 0
    now = np.zeros_like(filled) if apart is None else filled & (step == apart)
    others = filled & ~now
    # The age of a visit is the number of different steps among the newer ones.
    begins = others.copy()
    begins[:, 1:] &= ~(others[:, :-1] & (step[:, 1:] == step[:, :-1]))
    age = np.cumsum(begins, axis=1, dtype=np.int8)
    # Nothing is younger than the first of the others, whose age is 0.
    weight = _power(discounts.visit, np.maximum(np.arange(WINDOW + 1) - 1, 0))[age]
    weight[~others] = 0.0
    distance = np.maximum(newest_policy_version - visits.policy_version[picked], 0)
    weight *= _power(discounts.version, distance)
    total = _row_sum(weight * rollouts)
    over = total > discounts.cap
    weight[over] *= (discounts.cap / total[over])[:, None]
    return weight, now


def _row_sum(columns: FloatArray) -> FloatArray:
    """Sum each row from newest to oldest: np.sum may choose another order."""
    total = columns[:, 0].copy()
    for slot in range(1, columns.shape[1]):
        total += columns[:, slot]
    return total


def _power(base: float, exponents: IntArray) -> FloatArray:
    """Return base ** exponents by squaring: only multiplications, so reproducible."""
    if base == 1.0 or exponents.size == 0:
        return np.ones(exponents.shape)
    left = np.minimum(exponents, _MAX_EXPONENT)
    most = int(left.max())
    if most < left.size:
        # Fewer powers than exponents: the same bits, looked up.
        powers: FloatArray = _squared(base, np.arange(most + 1))[left]
        return powers
    return _squared(base, left)


def _squared(base: float, exponents: IntArray) -> FloatArray:
    result = np.ones(exponents.shape)
    left = exponents
    factor = base
    while left.any():
        odd = (left & 1).astype(bool)
        result[odd] *= factor
        factor *= factor
        left = left >> 1
    return result

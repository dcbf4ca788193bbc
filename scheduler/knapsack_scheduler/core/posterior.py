"""Evidence becomes a Beta posterior of every prompt's success rate.

The counts of a visit weigh ``visit_discount`` less for each later step that visited the
prompt and ``version_discount`` less for each policy version since, because the policy
moves on; the prior is fitted to the run's own prompts (``core/rates.py``), and so is the
drift of success rates since they were seen (``core/drift.py``). A prompt that nobody has
visited has the prior, one that is rarely visited drifts back to it, and a prompt that always
failed keeps some chance of success: no case needs a rule of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.drift import FEWEST_PROMPTS, Drift, fit_drift
from knapsack_scheduler.core.evidence import WINDOW, Visits
from knapsack_scheduler.core.levels import class_weights
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray, Levels, Posterior
from knapsack_scheduler.core.rates import believed, fit_rates
from knapsack_scheduler.core.rewardlevels import RewardLevels

_MAX_EXPONENT = 2**20
"""Version distances beyond this weigh the same: 0.99999 ** 2**20 is 3e-5."""


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
    """What is believed of a prompt before it is seen.

    Attributes:
        alpha, beta: Beta distribution of its success rate, > 0.
        weights: how success rates are spread, see ``core/rates.py``; () while no prompt has
            been seen, and evidence is just added to alpha and beta.
    """

    alpha: float = 0.5
    beta: float = 0.5
    weights: tuple[float, ...] = ()


def newest_prior(
    visits: Visits, rows: IntArray, newest_policy_version: int, discounts: Discounts
) -> Prior:
    """Return the prior that some prompts tell of; Beta(1/2, 1/2) if there are none.

    Args:
        visits: the run's windows.
        rows: int64[n], prompts with a visit.
        newest_policy_version: newest version reported to the run.
        discounts: how fast evidence ages.
    """
    if rows.size == 0:
        return Prior()
    weight, _ = _weights(visits, rows, None, newest_policy_version, discounts)
    weights = fit_rates(*_evidence(visits, rows, weight))
    alpha, beta = believed(weights, np.zeros(1), np.zeros(1))
    return Prior(float(alpha[0]), float(beta[0]), weights)


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
        alpha, beta = _believed(prior, *_evidence(visits, picked, weight))
        moved = drift.moved(alpha, beta)
        has_evidence = _row_sum(weight) > 0.0
        alpha = np.where(has_evidence, moved[0], alpha)
        beta = np.where(has_evidence, moved[1], beta)
        older = _scaled(older, success, alpha, beta)
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
    alpha, beta = _believed(prior, *_evidence(visits, rows, weight))
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


def _evidence(
    visits: Visits, picked: IntArray, weight: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the weighed successes and failures of each row, float64[n]."""
    successes = visits.successes[picked]
    failures = visits.rollouts[picked] - successes
    return _row_sum(weight * successes), _row_sum(weight * failures)


def _believed(
    prior: Prior, successes: FloatArray, failures: FloatArray
) -> tuple[FloatArray, FloatArray]:
    if prior.weights:
        return believed(prior.weights, successes, failures)
    return prior.alpha + successes, prior.beta + failures


def _scaled(
    columns: FloatArray, success: BoolArray, alpha: FloatArray, beta: FloatArray
) -> FloatArray:
    """Return the columns with successes that weigh alpha and failures that weigh beta."""
    if success.size == 2:
        return np.stack([alpha if good else beta for good in success.tolist()], axis=1)
    now = class_weights(columns, success)
    for level, good in enumerate(success.tolist()):
        columns[:, level] *= alpha / now[0] if good else beta / now[1]
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

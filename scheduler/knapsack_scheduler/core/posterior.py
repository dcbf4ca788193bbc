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
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.drift import FEWEST_PROMPTS, Drift, fit_drift
from knapsack_scheduler.core.evidence import WINDOW, Visits, Windows
from knapsack_scheduler.core.levels import class_weights
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray, Levels, Posterior
from knapsack_scheduler.core.rates import believed, fit_rates
from knapsack_scheduler.core.rewardlevels import RewardLevels

_MAX_EXPONENT = 2**20
"""Version distances beyond this weigh the same: 0.99999 ** 2**20 is 3e-5."""

_TABLE = 2**14
"""Powers below this one are looked up."""


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
    windows = Windows.of(visits, rows)
    weight, _ = _weights(windows, None, newest_policy_version, discounts)
    weights = fit_rates(*_evidence(windows, weight))
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
    seen = np.flatnonzero(rows >= 0)
    picked = rows if seen.size == rows.size else rows[seen]
    windows = Windows.of(visits, picked)
    apart = None if step is None else np.int64(step)
    weight, now = _weights(windows, apart, newest_policy_version, discounts)
    passed, failed = _evidence(windows, weight)
    alpha, beta = _believed(prior, passed, failed)
    moved = drift.moved(alpha, beta)
    has_evidence = passed + failed > 0.0
    alpha = np.where(has_evidence, moved[0], alpha)
    beta = np.where(has_evidence, moved[1], beta)
    if reward_levels.plural and visits.by_level is not None:
        levels, success = _prior_levels(prior, reward_levels)
        columns = np.tile(levels, (rows.size, 1))
        by_level = visits.by_level[picked].transpose(1, 0, 2)
        older = columns[seen]
        older[:, : by_level.shape[2]] += _summed(weight[:, :, None] * by_level)
        now_weighs = class_weights(older, success)
        for level, good in enumerate(success.tolist()):
            older[:, level] *= alpha / now_weighs[0] if good else beta / now_weighs[1]
        if now is not None:
            older[:, : by_level.shape[2]] += (now[:, :, None] * by_level).sum(axis=0)
        columns[seen] = older
        return Posterior(*class_weights(columns, success), Levels(columns, success))
    if now is not None:
        alpha = alpha + (now * windows.successes).sum(axis=0)
        beta = beta + (now * (windows.rollouts - windows.successes)).sum(axis=0)
    if seen.size == rows.size:
        return Posterior(alpha, beta)
    both = np.full(rows.size, prior.alpha), np.full(rows.size, prior.beta)
    both[0][seen], both[1][seen] = alpha, beta
    return Posterior(*both)


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
    windows = Windows.of(visits, rows)
    weight, now = _weights(windows, windows.step[0], windows.policy_version[0], discounts)
    assert now is not None
    alpha, beta = _believed(prior, *_evidence(windows, weight))
    rollouts, successes = windows.rollouts, windows.successes
    return fit_drift(alpha, beta, (now * rollouts).sum(axis=0), (now * successes).sum(axis=0))


def _prior_levels(prior: Prior, reward_levels: RewardLevels) -> tuple[FloatArray, BoolArray]:
    """Return the prior's weight of each level, and which levels are successes."""
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


def _evidence(windows: Windows, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the weighed successes and failures of each row, float64[n]."""
    failures = windows.rollouts - windows.successes
    return _summed(weight * windows.successes), _summed(weight * failures)


def _believed(
    prior: Prior, successes: FloatArray, failures: FloatArray
) -> tuple[FloatArray, FloatArray]:
    if prior.weights:
        return believed(prior.weights, successes, failures)
    return prior.alpha + successes, prior.beta + failures


def _weights(
    windows: Windows,
    apart: npt.NDArray[np.int64] | np.int64 | None,
    newest_policy_version: int | IntArray,
    discounts: Discounts,
) -> tuple[FloatArray, BoolArray | None]:
    """Return what each visit weighs, [WINDOW, n], and which are at the step apart.

    Visits at the step ``apart`` ([n], one for all, or None) weigh nothing and make the
    others no older. None where there are no such visits.
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
    if discounts.version != 1.0:
        distance = np.maximum(newest_policy_version - windows.policy_version, 0)
        weight *= _power(discounts.version, distance)
    total = _summed(weight * windows.rollouts)
    weight *= discounts.cap / np.maximum(total, discounts.cap)
    return weight, now


def _summed(slots: FloatArray) -> FloatArray:
    """Sum each row's visits from newest to oldest: np.sum may choose another order."""
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

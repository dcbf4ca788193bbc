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

from knapsack_scheduler.core.aging import Discounts, Evidence, Weighed, summed
from knapsack_scheduler.core.drift import FEWEST_PROMPTS, Drift, fit_drift
from knapsack_scheduler.core.evidence import Visits, Windows
from knapsack_scheduler.core.levels import class_weights
from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray, Levels, Posterior
from knapsack_scheduler.core.rates import believed, believed_units, fit_rates, kinds_of
from knapsack_scheduler.core.rewardlevels import RewardLevels


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
    evidence = Weighed.of(Windows.of(visits, rows), discounts).evidence
    weights = fit_rates(*evidence.at(newest_policy_version, discounts))
    alpha, beta = believed(weights, np.zeros(1), np.zeros(1))
    return Prior(float(alpha[0]), float(beta[0]), weights)


def posterior(
    evidence: Evidence,
    newest_policy_version: int,
    discounts: Discounts,
    prior: Prior,
    drift: Drift,
) -> Posterior:
    """Return what is believed of prompts of which nothing was seen at the step itself.

    Their evidence is discounted, added to the prior, and moved by the drift.

    Args:
        evidence: of each position's prompt, [M]; none for one that was never seen.
        newest_policy_version: newest version reported to the run.
        discounts: how fast evidence ages.
        prior: of the run.
        drift: of the run.
    """
    passed, failed = evidence.at(newest_policy_version, discounts)
    kinds = kinds_of(passed, failed) if prior.weights else None
    if kinds is None:
        return Posterior(*_moved(prior, passed, failed, drift))
    alpha, beta = believed_units(prior.weights, kinds.passed, kinds.failed)
    # The last kind has no evidence that could be out of date.
    moved = drift.moved(alpha[:-1], beta[:-1])
    alpha, beta = (np.append(new, old[-1]) for new, old in zip(moved, (alpha, beta), strict=True))
    return Posterior(alpha.take(kinds.of), beta.take(kinds.of), kinds=kinds.of)


def posterior_apart(
    visits: Visits,
    rows: IntArray,
    step: int | None,
    newest_policy_version: int,
    discounts: Discounts,
    prior: Prior,
    reward_levels: RewardLevels,
    drift: Drift,
) -> Posterior:
    """Return what is believed of each row, with levels if there are more than two of them.

    As ``posterior`` where nothing was seen at the step itself. What was is newer than any
    drift: it counts in full, beside the rest. The prior of a class is divided among its levels
    as the rollouts of the run are; a class of which no level was seen counts as one level.

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
    apart = None if step is None else np.int64(step)
    weighed = Weighed.of(Windows.of(visits, picked), discounts, apart)
    windows, now, evidence = weighed.windows, weighed.now, weighed.evidence
    alpha, beta = _moved(prior, *evidence.at(newest_policy_version, discounts), drift)
    if reward_levels.plural and visits.by_level is not None:
        levels, success = _prior_levels(prior, reward_levels)
        columns = np.tile(levels, (rows.size, 1))
        by_level = visits.by_level[picked].transpose(1, 0, 2)
        older = columns[seen]
        factor = evidence.factor(newest_policy_version, discounts)
        older[:, : by_level.shape[2]] += factor[:, None] * summed(
            weighed.weight[:, :, None] * by_level
        )
        now_weighs = class_weights(older, success)
        # Without evidence they have the prior as it is: a rounding would set those prompts apart
        # from others that were never seen.
        has_evidence = evidence.successes + evidence.failures > 0.0
        scales = [
            np.where(has_evidence, wanted / there, 1.0)
            for wanted, there in zip((alpha, beta), now_weighs, strict=True)
        ]
        for level, good in enumerate(success.tolist()):
            older[:, level] *= scales[0] if good else scales[1]
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
        rows: int64[n], visited at two steps or more. Those of which only the newest step is
            left in the window tell nothing, and no others stand in for them: which rows are
            asked for must not depend on when such a step was reported.
        discounts, prior: of the run.
    """
    windows = Windows.of(visits, rows)
    older = ((windows.step != windows.step[0]) & (windows.rollouts > 0)).any(axis=0)
    if np.count_nonzero(older) < FEWEST_PROMPTS:
        return Drift()
    if not older.all():
        windows = Windows.of(visits, rows[older])
    weighed = Weighed.of(windows, discounts, windows.step[0])
    now = weighed.now
    assert now is not None
    alpha, beta = _believed(prior, *weighed.evidence.at(windows.policy_version[0], discounts))
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


def _moved(
    prior: Prior, successes: FloatArray, failures: FloatArray, drift: Drift
) -> tuple[FloatArray, FloatArray]:
    alpha, beta = _believed(prior, successes, failures)
    moved = drift.moved(alpha, beta)
    has_evidence = successes + failures > 0.0
    return np.where(has_evidence, moved[0], alpha), np.where(has_evidence, moved[1], beta)


def _believed(
    prior: Prior, successes: FloatArray, failures: FloatArray
) -> tuple[FloatArray, FloatArray]:
    if prior.weights:
        return believed(prior.weights, successes, failures)
    return prior.alpha + successes, prior.beta + failures

"""What each policy would have done with the budget of every step of a log, and got for it.

Every arm walks the steps in order and decides from its own statistics, as the service
does. Of a group that was logged with N rewards, an arm that gave it n <= N learns the first
n of a random order of them, the same order for all arms: what would have come out. An arm
that gave n > N learns all N and no more. If those N differ the group is effective, which
is measured; if they are all equal, the chance that the further n - N change that is
extrapolated from what the whole log says of the prompt; see ``hindsight.py``. Both parts
are kept apart to the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.objective import PAPER, Objective
from knapsack_scheduler.core.problem import Bounds, IntArray
from knapsack_scheduler.lab.arms import Arm
from knapsack_scheduler.lab.hindsight import Hindsight, look_back
from knapsack_scheduler.lab.logged_step import LoggedStep
from knapsack_scheduler.lab.outcome_log import OutcomeLog
from knapsack_scheduler.lab.population import BANDS, bands_of
from knapsack_scheduler.lab.replay_outcome import (
    ArmOutcome,
    Calibration,
    Column,
    ExtrapolationCheck,
    Replay,
)
from knapsack_scheduler.lab.tracker import Tracker
from knapsack_scheduler.runconfig import RunConfig

Progress = Callable[[int, int], None]
"""Told how many steps of how many are done."""

_BLOCK = 50_000
"""Groups whose rates are held at once."""


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How a log is replayed.

    Attributes:
        arms: what is compared; their objective is what they maximise.
        min_rollouts, max_rollouts: bounds of a group, as the service has them.
        success_threshold: a rollout is a success if its reward is above this.
        budget_share: of each step's logged rollouts that every arm may spend, in (0, 1];
            one for each prompt at least.
        replicates: random orders of every group, 1 or more; outcomes are their means.
        seed: of the orders.
    """

    arms: tuple[Arm, ...]
    min_rollouts: int = 2
    max_rollouts: int = 128
    success_threshold: float = 0.5
    budget_share: float = 1.0
    replicates: int = 1
    seed: int = 0

    def config_of(self, arm: Arm) -> RunConfig:
        """Return what a run that decides as the arm does is configured with."""
        return RunConfig(
            policy=arm.policy,
            objective=arm.objective,
            success_threshold=self.success_threshold,
            min_rollouts=self.min_rollouts,
            max_rollouts=self.max_rollouts,
        )


def value_of(objective: str) -> Objective:
    """Return what realised value is counted in: the objective if it is an information gain.

    Rules of other papers say how to divide, and not what a group turned out to be worth;
    theirs is counted in ``paper``.
    """
    rule = find_objective(objective)
    return rule if isinstance(rule, Objective) else PAPER


def replay(
    log: OutcomeLog,
    settings: ReplaySettings,
    progress: Progress = lambda done, steps: None,
    hindsight: Hindsight | None = None,
) -> Replay:
    """Return what every arm would have done and got, step by step.

    Args:
        log: of the run.
        settings: what to compare, and how.
        progress: told of every step.
        hindsight: of an earlier replay of the log; looked back for if None.
    """
    sizes, successes = log.group_sizes, log.successes(settings.success_threshold)
    seen = hindsight or look_back(log.group_prompt, sizes, successes)
    valued = value_of(settings.arms[0].objective)
    worth = _Worth(log, seen, valued)
    bands = bands_of(worth.mean_rate)
    logged_value = np.add.reduceat(np.where(log.effective, worth.gain, 0.0), log.step_groups[:-1])
    outcomes = {arm.name: ArmOutcome(arm, log.steps.size) for arm in settings.arms}
    check = ExtrapolationCheck()
    widened = 0
    total = settings.replicates * log.steps.size
    for replicate in range(settings.replicates):
        trackers = {arm.name: Tracker(settings.config_of(arm)) for arm in settings.arms}
        for at in range(log.steps.size):
            rng = np.random.default_rng((settings.seed, replicate, at))
            step = LoggedStep.draw(log, at, settings.success_threshold, rng)
            groups = slice(int(log.step_groups[at]), int(log.step_groups[at + 1]))
            budget = max(int(step.rollouts * settings.budget_share + 0.5), step.sizes.size)
            bounds, wide = _bounds(settings, step.sizes.size, budget)
            widened += wide and replicate == 0
            worth.check_extrapolation(step, groups, check)
            for arm in settings.arms:
                outcome = outcomes[arm.name]
                played = _play(trackers[arm.name], arm, step, bounds, budget, outcome.calibration)
                worth.score(step, groups, played, bands[groups], at, outcome)
            progress(replicate * log.steps.size + at + 1, total)
    for outcome in outcomes.values():
        outcome.average(settings.replicates)
    return Replay(
        log, seen, bands, valued.name, tuple(outcomes.values()), check, logged_value, widened
    )


def _bounds(settings: ReplaySettings, count: int, budget: int) -> tuple[Bounds, bool]:
    """Return bounds that hold a step's budget, and whether they had to be widened."""
    low = min(settings.min_rollouts, budget // count)
    high = max(settings.max_rollouts, -(-budget // count))
    wide = low < settings.min_rollouts or high > settings.max_rollouts
    return Bounds(np.full(count, low, np.int64), np.full(count, high, np.int64)), wide


@dataclass(frozen=True, slots=True)
class _Played:
    """What an arm gave, and what its last decision expected of the whole groups."""

    sizes: IntArray
    effective_group_rate: float
    effective_rollout_rate: float
    value: float


def _play(
    tracker: Tracker,
    arm: Arm,
    step: LoggedStep,
    bounds: Bounds,
    rollouts: int,
    calibration: Calibration,
) -> _Played:
    sizes = np.zeros(step.sizes.size, np.int64)
    for wave, fraction in enumerate(arm.wave_fractions):
        before = sizes
        if wave == 0:
            budget = arm.budget(rollouts)
            decision = tracker.allocate(step.step, step.prompt_ids, bounds, budget)
        else:
            # Rollouts that the log does not have were spent all the same.
            decision = tracker.extend(fraction, keep_outstanding=True)
        sizes = before + decision.num_rollouts
        tracker.report(*step.part(before, sizes), step.step)
    judged = ~step.effective(before) & (sizes > before) & (sizes <= step.sizes)
    calibration.add(decision.chances[judged], step.effective(sizes)[judged])
    reasons = decision.reasons
    return _Played(
        sizes, reasons.effective_group_rate, reasons.effective_rollout_rate, reasons.value
    )


class _Worth:
    """What every group of the log is worth if it is effective: the same for all arms.

    Attributes:
        gain: float64[G].
        mean_rate: expected success rate, float64[G].
    """

    def __init__(self, log: OutcomeLog, seen: Hindsight, valued: Objective) -> None:
        self._seen, self._valued = seen, valued
        self.gain = np.empty(log.group_prompt.size)
        self.mean_rate = np.empty(log.group_prompt.size)
        for first in range(0, self.gain.size, _BLOCK):
            groups = slice(first, first + _BLOCK)
            rates = seen.rates(groups)
            self.gain[groups], self.mean_rate[groups] = rates.gain(valued), rates.mean
        tokens = log.group_tokens()
        self._length = None if tokens is None else tokens / log.group_sizes

    def score(
        self,
        step: LoggedStep,
        groups: slice,
        played: _Played,
        bands: IntArray,
        at: int,
        outcome: ArmOutcome,
    ) -> None:
        """Add to an arm's outcome what its division of a step brought."""
        n, have = played.sizes, step.seen(played.sizes)
        effective = step.effective(n)
        beyond = n - have
        chance = np.zeros(n.size)
        extra_value = 0.0
        open_ = np.flatnonzero(~effective & (beyond > 0))
        if open_.size:
            rates = self._seen.rates(groups.start + open_)
            chance[open_], gained = rates.change(
                step.successes(n)[open_], beyond[open_], self._valued
            )
            extra_value = float(gained.sum())
        given = max(int(np.count_nonzero(n)), 1)
        total = int(n.sum())
        column = outcome.columns[:, at]
        column[Column.GROUPS] += given
        column[Column.ROLLOUTS] += total
        column[Column.BEYOND] += beyond.sum()
        column[Column.EFFECTIVE_GROUPS] += np.count_nonzero(effective)
        column[Column.EXTRA_GROUPS] += chance.sum()
        column[Column.EFFECTIVE_ROLLOUTS] += n[effective].sum()
        column[Column.EXTRA_ROLLOUTS] += (chance * n).sum()
        column[Column.VALUE] += self.gain[groups][effective].sum()
        column[Column.EXTRA_VALUE] += extra_value
        column[Column.PREDICTED_GROUPS] += played.effective_group_rate * given
        column[Column.PREDICTED_ROLLOUTS] += played.effective_rollout_rate * total
        column[Column.PREDICTED_VALUE] += played.value
        if self._length is not None:
            column[Column.TOKENS] += (n * self._length[groups]).sum()
        outcome.count_sizes(n)
        outcome.add_bands(
            np.bincount(bands, n, len(BANDS)).astype(np.float64),
            np.bincount(bands, effective + chance, len(BANDS)).astype(np.float64),
        )

    def check_extrapolation(
        self, step: LoggedStep, groups: slice, check: ExtrapolationCheck
    ) -> None:
        """Extrapolate from half of each group, and compare with the other half."""
        half = step.sizes // 2
        open_ = np.flatnonzero(~step.effective(half) & (half > 0))
        seen = step.successes(half)[open_]
        rates = self._seen.rates_given(groups.start + open_, half[open_], seen)
        chance, _ = rates.change(seen, (step.sizes - half)[open_], self._valued)
        check.add(chance, step.effective(step.sizes)[open_])

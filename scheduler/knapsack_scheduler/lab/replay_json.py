"""A replay as one JSON object, for scripts: every figure with its parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from knapsack_scheduler.lab.arms import BASELINE
from knapsack_scheduler.lab.log_checks import Remark
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.replay import ReplaySettings
from knapsack_scheduler.lab.replay_outcome import (
    ArmOutcome,
    Column,
    Figure,
    Replay,
    relative_gain,
)
from knapsack_scheduler.lab.replay_words import unsupported_share
from knapsack_scheduler.lab.waste import Waste


def as_json(
    replay: Replay,
    waste: Waste,
    settings: ReplaySettings,
    remarks: list[Remark],
    half: Replay | None,
) -> dict[str, Any]:
    """Return a replay as plain objects.

    Shares are from 0 to 1; ``gain`` is of value against uniform, relative, and null where
    uniform was not asked for; ``error`` is half of its 95 % interval.
    """
    log, check = replay.log, replay.check
    return {
        "log": {
            "rollouts": log.rewards.size,
            "missing_rollouts": log.missing,
            "groups": log.group_prompt.size,
            "prompts": len(log.prompt_ids),
            "steps": log.steps.size,
            "first_step": int(log.steps[0]),
            "last_step": int(log.steps[-1]),
            "revisited_groups": log.group_prompt.size - len(np.unique(log.group_prompt)),
            "remarks": [{"text": one.text, "serious": one.serious} for one in remarks],
        },
        "settings": {
            "objective": settings.arms[0].objective,
            "min_rollouts": settings.min_rollouts,
            "max_rollouts": settings.max_rollouts,
            "success_threshold": settings.success_threshold,
            "budget_share": settings.budget_share,
            "replicates": settings.replicates,
            "seed": settings.seed,
            "widened_steps": replay.widened_steps,
        },
        "wasted": {
            "rollouts": waste.wasted_rollouts,
            "share": waste.share,
            "failed_groups": waste.failed_groups,
            "failed_rollouts": waste.failed_rollouts,
            "passed_groups": waste.passed_groups,
            "passed_rollouts": waste.passed_rollouts,
            "tokens": waste.wasted_tokens if waste.tokens else None,
            "token_share": waste.wasted_tokens / waste.tokens if waste.tokens else None,
            "by_step": [
                [int(step), float(failed), float(passed)]
                for step, failed, passed in zip(
                    log.steps, waste.failed_share, waste.passed_share, strict=True
                )
            ],
        },
        "logged": {
            "effective_group_rate": float(log.effective.mean()),
            "effective_rollout_rate": 1.0 - waste.share,
            "value": float(replay.logged_value.sum()),
        },
        "valued": replay.valued,
        "arms": {one.arm.name: _arm(replay, one) for one in replay.outcomes},
        "arms_with_half_the_budget": {}
        if half is None
        else {one.arm.name: _arm(half, one) for one in half.outcomes},
        "extrapolation_check": {
            "groups": check.groups,
            "predicted": check.predicted,
            "standard_error": check.variance**0.5,
            "effective": check.effective,
        },
        "drift": {
            "mean": replay.hindsight.drift.mean,
            "spread": replay.hindsight.drift.spread,
        },
    }


def _arm(replay: Replay, outcome: ArmOutcome) -> dict[str, Any]:
    baseline = replay.outcome(BASELINE)
    gain, error = (None, None) if baseline is None else relative_gain(outcome, baseline)
    bins = outcome.calibration
    tokens = None if replay.log.tokens is None else outcome.sum_of(Column.TOKENS)
    return {
        "waves": list(outcome.arm.waves),
        "rollouts": outcome.sum_of(Column.ROLLOUTS),
        "rollouts_not_logged": outcome.sum_of(Column.BEYOND),
        "effective_group_rate": _figure(outcome.effective_group_rate),
        "effective_rollout_rate": _figure(outcome.effective_rollout_rate),
        "value": _figure(outcome.value),
        "gain": gain,
        "error": error,
        "extrapolated_share": unsupported_share(outcome),
        "largest_group": outcome.largest_group,
        "expected_tokens": tokens,
        "groups_by_size": {
            str(size): float(count) for size, count in enumerate(outcome.size_counts) if count
        },
        "rollouts_by_band": dict(zip(BANDS, outcome.band_rollouts.tolist(), strict=True)),
        "calibration": [
            {"groups": int(n), "predicted": float(p / n), "effective": float(e / n)}
            for n, p, e in zip(bins.groups, bins.predicted, bins.effective, strict=True)
            if n
        ],
    }


def _figure(figure: Figure) -> dict[str, float]:
    return {
        "measured": figure.measured,
        "extrapolated": figure.extrapolated,
        "predicted": figure.predicted,
    }

"""Requests, checked whole before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation
from knapsack_scheduler.core.problem import Bounds, Budget, FloatArray, IntArray
from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.facts import Rewards
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.runconfig import RunConfig


def check_allocate(request: pb.AllocateRequest, limits: Limits) -> tuple[str, ...]:
    """Return the prompt ids of a request whose fields are all right, bounds apart."""
    validation.name("run_id", request.run_id)
    validation.name("request_id", request.request_id)
    validation.within("step", request.step, 0, limits.step)
    ids = validation.prompts("prompt_ids", request.prompt_ids, limits)
    validation.within("total_rollouts", request.total_rollouts, 0, limits.total_rollouts)
    validation.within("total_tokens", request.total_tokens, 0, limits.step)
    if not request.total_rollouts and not request.total_tokens:
        raise InvalidArgument("total_rollouts", 0, "must be above 0, or total_tokens must be")
    validation.fraction("wave_fraction", request.wave_fraction)
    validation.within("waves", request.waves, 0, 2)
    if request.waves == 2 and request.wave_fraction:
        raise InvalidArgument("wave_fraction", request.wave_fraction, "must be 0 with waves = 2")
    return ids


def bounds_of(request: pb.AllocateRequest, config: RunConfig) -> Bounds:
    """Return the bounds of each position, the run's where the request has none."""
    count = len(request.prompt_ids)
    minimum = validation.per_position(
        "min_rollouts", request.min_rollouts, count, config.min_rollouts
    )
    maximum = validation.per_position(
        "max_rollouts", request.max_rollouts, count, config.max_rollouts
    )
    if (maximum < 1).any():
        at = int(np.argmax(maximum < 1))
        raise InvalidArgument(f"max_rollouts[{at}]", int(maximum[at]), "must be 1 or more")
    crossed = minimum > maximum
    if crossed.any():
        at = int(np.argmax(crossed))
        raise InvalidArgument(
            f"min_rollouts[{at}]",
            int(minimum[at]),
            f"must be at most max_rollouts, which is {int(maximum[at])} there",
        )
    return Bounds(minimum, maximum)


def check_policy(request: pb.AllocateRequest, bounds: Bounds, policy: str) -> None:
    """Refuse what the paper's rule does not know: waves, tokens and skipped prompts."""
    if policy != "paper":
        return
    for field in ("wave_fraction", "total_tokens"):
        if getattr(request, field):
            raise InvalidArgument(field, getattr(request, field), 'must be 0 with policy "paper"')
    if request.waves == 2:
        raise InvalidArgument("waves", 2, 'must be 0 or 1 with policy "paper"')
    if not bounds.minimum.all():
        at = int(np.argmin(bounds.minimum))
        raise InvalidArgument(f"min_rollouts[{at}]", 0, 'must be 1 or more with policy "paper"')


def check_bounds(bounds: Bounds, limits: Limits) -> None:
    """Refuse bounds that ask for more than is served at once."""
    large = bounds.minimum > limits.group_rollouts
    if large.any():
        at = int(np.argmax(large))
        raise InvalidArgument(
            f"min_rollouts[{at}]",
            int(bounds.minimum[at]),
            f"must be at most {limits.group_rollouts}",
        )
    total = int(bounds.minimum.sum())
    if total > limits.total_rollouts:
        raise InvalidArgument(
            "min_rollouts", f"a sum of {total}", f"must be at most {limits.total_rollouts}"
        )


def check_tokens(
    budget: Budget, bounds: Bounds, expected_tokens: FloatArray, limits: Limits
) -> None:
    """Refuse a budget in tokens that buys more rollouts than are served at once."""
    if not budget.total_tokens or budget.total_rollouts or not expected_tokens.size:
        return
    most = min(
        budget.total_tokens / max(float(expected_tokens.min()), 1.0), float(bounds.most.sum())
    )
    if most > limits.total_rollouts:
        raise InvalidArgument(
            "total_tokens",
            budget.total_tokens,
            f"could buy {most:.0f} rollouts; must be less than {limits.total_rollouts} need, "
            "or total_rollouts must be set too",
        )


def budget_of(request: pb.AllocateRequest) -> Budget:
    """Return the budget of a request."""
    return Budget(
        request.total_rollouts,
        request.total_tokens,
        request.wave_fraction,
        request.allow_partial,
        request.waves,
    )


def check_extend(request: pb.ExtendRequest) -> None:
    """Check the fields of a request."""
    validation.name("run_id", request.run_id)
    validation.name("allocation_id", request.allocation_id)
    validation.name("request_id", request.request_id)
    validation.fraction("wave_fraction", request.wave_fraction)


def check_report(request: pb.ReportRequest, limits: Limits) -> Rewards:
    """Return the rewards of a report whose fields are all right, its allocation apart."""
    validation.name("run_id", request.run_id)
    validation.name("report_id", request.report_id)
    validation.within("policy_version", request.policy_version, 0, limits.step)
    validation.within("step", request.step, 0, limits.step)
    if len(request.rewards) > limits.total_rollouts:
        raise InvalidArgument(
            "rewards", f"{len(request.rewards)} rewards", f"must be at most {limits.total_rollouts}"
        )
    if not request.allocation_id:
        ids = validation.prompts("prompt_ids", request.prompt_ids, limits)
        return rewards_of(request, len(ids))
    validation.name("allocation_id", request.allocation_id)
    if request.prompt_ids:
        raise InvalidArgument(
            "prompt_ids",
            f"{len(request.prompt_ids)} prompts",
            "must be empty when allocation_id is set",
        )
    return rewards_of(request, validation.LARGEST_INT32)


def rewards_of(request: pb.ReportRequest, positions: int) -> Rewards:
    """Return the rewards of a report by position."""
    places, counts, highest = validation.reward_positions(
        request.prompt_indices, request.num_rewards, positions, len(request.rewards)
    )
    return rewards_at(places, counts, highest, request.rewards, request.completion_tokens)


def rewards_at(
    positions: IntArray,
    counts: IntArray,
    highest: int,
    rewards: Sequence[float],
    tokens: Sequence[int],
) -> Rewards:
    """Return rewards and completion tokens, checked, of the positions that they are of."""
    values = np.asarray(rewards, np.float32)
    if not np.isfinite(values).all():
        at = int(np.argmin(np.isfinite(values)))
        raise InvalidArgument(f"rewards[{at}]", float(values[at]), "must be a finite number")
    if len(tokens) not in (0, values.size):
        raise InvalidArgument(
            "completion_tokens",
            f"{len(tokens)} numbers",
            f"must be empty, or as many as rewards ({values.size})",
        )
    if not len(tokens):
        return Rewards(positions, counts, highest, values, None)
    lengths = np.asarray(tokens, np.int64)
    if lengths.min() < 0:
        at = int(np.argmax(lengths < 0))
        raise InvalidArgument(f"completion_tokens[{at}]", int(lengths[at]), "must be 0 or more")
    return Rewards(positions, counts, highest, values, lengths)

"""What the scheduler knows and decides, as messages."""

from __future__ import annotations

import hashlib

from google.protobuf.timestamp_pb2 import Timestamp

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.core.calibration import Calibration
from knapsack_scheduler.core.posterior import Prior
from knapsack_scheduler.core.problem import Decision
from knapsack_scheduler.journal.records import RunRow
from knapsack_scheduler.state import PromptColumns, RunState
from knapsack_scheduler.wire.config import config_message


def run_message(row: RunRow, state: RunState) -> pb.Run:
    """Return a run and its progress."""
    seconds, nanos = divmod(row.create_time, 10**9)
    return pb.Run(
        run_id=row.run_id,
        config=config_message(state.config),
        create_time=Timestamp(seconds=seconds, nanos=nanos),
        last_step=state.last_step,
        last_policy_version=state.last_policy_version,
        known_prompts=state.known_prompts,
        total_rollouts=state.total_rollouts,
        total_successes=state.total_successes,
        rewinds=row.branch,
        ignored_rollouts=state.ignored_rollouts,
        reported_groups=state.reported_groups,
        effective_groups=state.effective_groups,
        reward_levels=state.reward_levels.values.tolist(),
        calibration=_calibration_message(state.calibration),
    )


def _calibration_message(calibration: Calibration) -> pb.Calibration:
    return pb.Calibration(
        groups=calibration.groups.tolist(),
        effective_groups=calibration.effective.tolist(),
        predicted_effective_groups=calibration.predicted.tolist(),
        rollouts=calibration.rollouts.tolist(),
        effective_rollouts=calibration.effective_rollouts.tolist(),
        predicted_effective_rollouts=calibration.predicted_rollouts.tolist(),
    )


def allocation_id(identity: int, branch: int, request_id: str) -> str:
    """Return the name of an allocation: the same for the same call of the same run."""
    text = f"{identity}/{branch}/{request_id}".encode()
    return "a-" + hashlib.blake2b(text, digest_size=12).hexdigest()


def allocation_message(
    name: str, run_id: str, step: int, wave: int, decision: Decision, prior: Prior
) -> pb.Allocation:
    """Return a decision as a message."""
    reasons = decision.reasons
    return pb.Allocation(
        allocation_id=name,
        run_id=run_id,
        step=step,
        wave=wave,
        num_rollouts=decision.num_rollouts.tolist(),
        allocated_rollouts=decision.allocated,
        remaining_rollouts=decision.remaining,
        unallocated_rollouts=decision.unallocated,
        summary=pb.AllocationSummary(
            policy=reasons.policy,
            objective=reasons.objective,
            effective_group_rate=reasons.effective_group_rate,
            effective_rollout_rate=reasons.effective_rollout_rate,
            value=reasons.value,
            uniform_value=reasons.uniform_value,
            value_upper_bound=reasons.value_upper_bound,
            price=reasons.price,
            unseen_prompts=reasons.unseen_prompts,
            largest_group=reasons.largest_group,
            prior_alpha=prior.alpha,
            prior_beta=prior.beta,
            expected_tokens=reasons.expected_tokens,
        ),
    )


def stats_message(ids: list[str], columns: PromptColumns) -> pb.ListPromptStatsResponse:
    """Return prompt statistics as parallel arrays."""
    return pb.ListPromptStatsResponse(
        prompt_ids=ids,
        total_rollouts=columns.total_rollouts.tolist(),
        total_successes=columns.total_successes.tolist(),
        last_step=columns.last_step.tolist(),
        last_policy_version=columns.last_policy_version.tolist(),
        posterior_alpha=columns.alpha.tolist(),
        posterior_beta=columns.beta.tolist(),
        mean_completion_tokens=columns.mean_completion_tokens.tolist(),
    )

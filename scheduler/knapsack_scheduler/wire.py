"""Protobuf to core and back: the only file that knows both.

A request is checked whole before anything is made of it. What is stored in the journal
are the calls themselves, request and answer; ``fact_of`` reads them back.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation
from knapsack_scheduler.core.calibration import Calibration
from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.core.policy import POLICIES
from knapsack_scheduler.core.posterior import Prior
from knapsack_scheduler.core.problem import Bounds, Budget, Decision, FloatArray
from knapsack_scheduler.errors import InvalidArgument, ResourceExhausted
from knapsack_scheduler.facts import (
    ALWAYS,
    AllocationExtended,
    AllocationMade,
    Fact,
    ImportedPart,
    OutcomesImported,
    OutcomesReported,
    Rewards,
    Rewound,
)
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.state import PromptColumns, RunState


def payload_of(request: Message) -> bytes:
    """Return the bytes of a request as the journal stores them: equal for equal requests."""
    return request.SerializeToString(deterministic=True)


def digest_of(data: bytes) -> bytes:
    """Return the 16-byte hash that tells a repeated call from another."""
    return hashlib.blake2b(data, digest_size=16).digest()


def parse_config(message: pb.RunConfig) -> RunConfig:
    """Return the config with its defaults filled in; InvalidArgument names the field."""
    default = RunConfig()
    policy = message.policy or default.policy
    if policy not in POLICIES:
        raise InvalidArgument("config.policy", policy, f"must be one of {', '.join(POLICIES)}")
    objective = message.objective or default.objective
    if objective not in OBJECTIVES:
        allowed = ", ".join(OBJECTIVES)
        raise InvalidArgument("config.objective", objective, f"must be one of {allowed}")

    if policy == "paper" and objective != "paper":
        raise InvalidArgument("config.objective", objective, 'must be "paper" with policy "paper"')

    def given(field: str) -> float | int:
        has = message.HasField(field)
        return getattr(message if has else default, field)  # type: ignore[no-any-return]

    config = RunConfig(
        policy=policy,
        objective=objective,
        success_threshold=validation.finite("config.success_threshold", given("success_threshold")),
        min_rollouts=validation.within(
            "config.min_rollouts", int(given("min_rollouts")), 0, validation.LARGEST_INT32
        ),
        max_rollouts=validation.within(
            "config.max_rollouts", int(given("max_rollouts")), 1, validation.LARGEST_INT32
        ),
        visit_discount=validation.discount("config.visit_discount", given("visit_discount")),
        version_discount=validation.discount("config.version_discount", given("version_discount")),
        evidence_cap=validation.finite("config.evidence_cap", given("evidence_cap")),
        reward_levels=bool(given("reward_levels")),
    )
    if config.evidence_cap <= 0:
        raise InvalidArgument("config.evidence_cap", config.evidence_cap, "must be above 0")
    if config.min_rollouts > config.max_rollouts:
        raise InvalidArgument(
            "config.min_rollouts",
            config.min_rollouts,
            f"must be at most config.max_rollouts = {config.max_rollouts}",
        )
    return config


def config_message(config: RunConfig) -> pb.RunConfig:
    """Return the config as a message, every field set."""
    return pb.RunConfig(
        policy=config.policy,
        objective=config.objective,
        success_threshold=config.success_threshold,
        min_rollouts=config.min_rollouts,
        max_rollouts=config.max_rollouts,
        visit_discount=config.visit_discount,
        version_discount=config.version_discount,
        evidence_cap=config.evidence_cap,
        reward_levels=config.reward_levels,
    )


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
    owner = validation.owners(
        request.prompt_indices, request.num_rewards, positions, len(request.rewards)
    )
    return _rewards(owner, request.rewards, request.completion_tokens)


def _rewards(owner: np.ndarray, rewards: Sequence[float], tokens: Sequence[int]) -> Rewards:
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
        return Rewards(owner, values, None)
    lengths = np.asarray(tokens, np.int64)
    if lengths.min() < 0:
        at = int(np.argmax(lengths < 0))
        raise InvalidArgument(f"completion_tokens[{at}]", int(lengths[at]), "must be 0 or more")
    return Rewards(owner, values, lengths)


@dataclass(slots=True)
class ImportStream:
    """Collects the messages of an import, checked one by one as they arrive."""

    limits: Limits
    run_id: str = ""
    request_id: str = ""
    rollouts: int = 0
    size: int = 0
    messages: list[pb.ImportOutcomesRequest] | None = None

    def add(self, message: pb.ImportOutcomesRequest) -> None:
        """Take one message; InvalidArgument or ResourceExhausted refuses the stream."""
        if self.messages is None:
            self.messages = []
            self.run_id = validation.name("run_id", message.run_id)
            self.request_id = validation.name("request_id", message.request_id)
        for field in ("run_id", "request_id"):
            value, first = getattr(message, field), getattr(self, field)
            if value not in ("", first):
                raise InvalidArgument(field, value, f"must be {first!r} as before, or empty")
        _imported_part(message, self.limits)
        self.rollouts += len(message.rewards)
        self.size += message.ByteSize()
        if self.rollouts > self.limits.import_rollouts or self.size > self.limits.import_bytes:
            raise ResourceExhausted(
                f"an import may hold {self.limits.import_rollouts} rollouts and "
                f"{self.limits.import_bytes} bytes; split it into several"
            )
        self.messages.append(message)

    def prompts(self) -> int:
        """Count the prompts that have an outcome."""
        return len(
            {
                prompt_id
                for message in self.messages or ()
                for prompt_id, n in zip(message.prompt_ids, message.num_rewards, strict=True)
                if n
            }
        )

    def payload(self) -> bytes:
        """Return the messages as the journal stores them."""
        if self.messages is None:
            raise InvalidArgument("run_id", "", "is required; the stream held no message")
        parts = [m.SerializeToString(deterministic=True) for m in self.messages]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def _imported_part(message: pb.ImportOutcomesRequest, limits: Limits) -> ImportedPart:
    validation.within("step", message.step, 0, limits.step)
    ids = validation.prompts("prompt_ids", message.prompt_ids, limits)
    each = np.asarray(message.num_rewards, np.int64)
    if each.size != len(ids):
        raise InvalidArgument(
            "num_rewards", f"{each.size} numbers", f"must be one per prompt ({len(ids)})"
        )
    owner = np.repeat(np.arange(len(ids)), validation.reward_counts(each, len(message.rewards)))
    return ImportedPart(
        message.step, ids, _rewards(owner, message.rewards, message.completion_tokens)
    )


_STORED = Limits(prompts=validation.LARGEST_INT32)
"""What was taken once is read whatever the limits are now."""


def imported_of(payload: bytes, limits: Limits) -> OutcomesImported:
    """Return what an import's stored messages hold."""
    parts, at = [], 0
    while at < len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        message = pb.ImportOutcomesRequest.FromString(payload[at + 4 : at + 4 + size])
        parts.append(_imported_part(message, limits))
        at += 4 + size
    return OutcomesImported(tuple(parts))


def fact_of(entry: Entry, state: RunState) -> Fact:
    """Return what a journal entry says happened.

    Args:
        entry: of the run.
        state: of the run before the entry.
    """
    match entry.kind:
        case "allocate":
            request = pb.AllocateRequest.FromString(entry.payload)
            answer = pb.Allocation.FromString(entry.answer)
            return AllocationMade(
                answer.allocation_id,
                request.step,
                tuple(request.prompt_ids),
                bounds_of(request, state.config),
                budget_of(request),
                np.asarray(answer.num_rollouts, np.int64),
            )
        case "extend":
            answer = pb.Allocation.FromString(entry.answer)
            return AllocationExtended(
                answer.allocation_id,
                answer.step,
                np.asarray(answer.num_rollouts, np.int64),
                pb.ExtendRequest.FromString(entry.payload).keep_outstanding,
            )
        case "report":
            report = pb.ReportRequest.FromString(entry.payload)
            allocation = state.allocations.get(report.allocation_id)
            positions = len(report.prompt_ids)
            if report.allocation_id:
                positions = allocation.rows.size if allocation else validation.LARGEST_INT32
            return OutcomesReported(
                report.allocation_id,
                entry.step,
                tuple(report.prompt_ids),
                report.policy_version,
                rewards_of(report, positions),
                # Not told by the answer: a late report may hold no rollout.
                ignored=entry.step == ALWAYS,
            )
        case "import":
            return imported_of(entry.payload, _STORED)
        case "rewind":
            return Rewound(entry.step)
    raise ValueError(f"journal entry {entry.seq} is of an unknown kind: {entry.kind!r}")


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

"""A run's config and its message."""

from __future__ import annotations

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation
from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.core.policy import POLICIES
from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.runconfig import RunConfig


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

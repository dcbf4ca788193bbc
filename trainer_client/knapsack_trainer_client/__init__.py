"""Clients of the budget scheduler and of the generation server.

    client = BudgetClient("localhost:50051", run_id="exp1")
    allocation = client.allocate(prompt_ids, total_rollouts=2048, step=step)
    groups = generate(prompts, allocation.num_rollouts)
    client.report(allocation, rewards, policy_version=step)
    advantages = group_advantages(rewards)

Loads the standard library, grpc and protobuf, and nothing else.
"""

from knapsack_trainer_client.batches import BudgetedBatch, budgeted_batches
from knapsack_trainer_client.client import AsyncBudgetClient
from knapsack_trainer_client.errors import (
    AccessDenied,
    ClientMisuse,
    ExtraMissing,
    GeneratorBusy,
    GeneratorUnavailable,
    InvalidRequest,
    KnapsackError,
    RunConfigConflict,
    SchedulerUnavailable,
    WeightUpdateFailed,
    WrongGroups,
)
from knapsack_trainer_client.groups import group_advantages, loss_weights, repeat_by_allocation
from knapsack_trainer_client.nouns import (
    TLS,
    Allocation,
    AllocationSummary,
    Calibration,
    PromptStats,
    ReportReceipt,
    Run,
    RunConfig,
)
from knapsack_trainer_client.outbox import Limits
from knapsack_trainer_client.rollouts import (
    AsyncRolloutClient,
    AsyncRolloutSession,
    Rollout,
    RolloutClient,
    RolloutGroups,
    RolloutSession,
)
from knapsack_trainer_client.stream import PlannedPrompt, PromptStream, StreamState
from knapsack_trainer_client.sync import BudgetClient
from knapsack_trainer_client.telemetry import ClientStats
from knapsack_trainer_client.verify import verify_groups

__all__ = [
    "TLS",
    "AccessDenied",
    "Allocation",
    "AllocationSummary",
    "AsyncBudgetClient",
    "AsyncRolloutClient",
    "AsyncRolloutSession",
    "BudgetClient",
    "BudgetedBatch",
    "Calibration",
    "ClientMisuse",
    "ClientStats",
    "ExtraMissing",
    "GeneratorBusy",
    "GeneratorUnavailable",
    "InvalidRequest",
    "KnapsackError",
    "Limits",
    "PlannedPrompt",
    "PromptStats",
    "PromptStream",
    "ReportReceipt",
    "Rollout",
    "RolloutClient",
    "RolloutGroups",
    "RolloutSession",
    "Run",
    "RunConfig",
    "RunConfigConflict",
    "SchedulerUnavailable",
    "StreamState",
    "WeightUpdateFailed",
    "WrongGroups",
    "budgeted_batches",
    "group_advantages",
    "loss_weights",
    "repeat_by_allocation",
    "verify_groups",
]

"""Protobuf <-> the client's nouns. No other file reads or fills a message."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, fields

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_trainer_client.arguments import AllocationAsk
from knapsack_trainer_client.nouns import (
    Allocation,
    AllocationSummary,
    Calibration,
    PromptStats,
    ReportReceipt,
    Run,
    RunConfig,
)
from knapsack_trainer_client.rewards import Outcomes
from knapsack_trainer_client.transport import Method

CREATE_RUN = Method("CreateRun", pb.CreateRunRequest, pb.Run)
GET_RUN = Method("GetRun", pb.GetRunRequest, pb.Run)
LIST_RUNS = Method("ListRuns", pb.ListRunsRequest, pb.ListRunsResponse)
ALLOCATE = Method("Allocate", pb.AllocateRequest, pb.Allocation)
EXTEND = Method("Extend", pb.ExtendRequest, pb.Allocation)
REPORT = Method("Report", pb.ReportRequest, pb.ReportResponse)
REWIND_RUN = Method("RewindRun", pb.RewindRunRequest, pb.Run)
DELETE_RUN = Method("DeleteRun", pb.DeleteRunRequest, pb.DeleteRunResponse)
LIST_PROMPT_STATS = Method("ListPromptStats", pb.ListPromptStatsRequest, pb.ListPromptStatsResponse)

STATS_PAGE = 20_000
RUNS_PAGE = 1_000


class MalformedAnswer(Exception):
    """An answer that does not fit its request."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A report ready to be sent, in the two forms it may have to be sent in.

    Attributes:
        report_id: its name in both forms.
        run_id: the run.
        step: the trainer's step.
        rollouts: how many rewards it has.
        body: the serialised ReportRequest.
        orphan_body: the same report for a scheduler that does not know the allocation:
            it carries step and prompt ids itself. Empty if ``body`` does already.
    """

    report_id: str
    run_id: str
    step: int
    rollouts: int
    body: bytes
    orphan_body: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of both forms."""
        return len(self.body) + len(self.orphan_body)

    def requests(self) -> Iterator[pb.ReportRequest]:
        """Yield the forms in the order to try them."""
        yield pb.ReportRequest.FromString(self.body)
        if self.orphan_body:
            yield pb.ReportRequest.FromString(self.orphan_body)


def parcel(
    allocation: Allocation, run_id: str, report_id: str, policy_version: int, outcomes: Outcomes
) -> Parcel:
    """Return the outcomes of an allocation as a report."""
    common = pb.ReportRequest(
        run_id=run_id,
        report_id=report_id,
        policy_version=policy_version,
        num_rewards=outcomes.num_rewards,
        rewards=outcomes.rewards,
        completion_tokens=outcomes.completion_tokens,
    )
    orphan = pb.ReportRequest(
        step=allocation.step,
        prompt_ids=[allocation.prompt_ids[i] for i in outcomes.positions],
        prompt_indices=range(len(outcomes.positions)),
    )
    orphan.MergeFrom(common)
    orphan_body = orphan.SerializeToString()
    body = b""
    if allocation.allocation_id:
        common.allocation_id = allocation.allocation_id
        common.prompt_indices.extend(outcomes.positions)
        body = common.SerializeToString()
    rollouts = len(outcomes.rewards)
    if not body:
        return Parcel(report_id, run_id, allocation.step, rollouts, orphan_body)
    return Parcel(report_id, run_id, allocation.step, rollouts, body, orphan_body)


def to_receipt(report_id: str, response: pb.ReportResponse) -> ReportReceipt:
    """Return what the scheduler did with a report."""
    return ReportReceipt(report_id, True, response.accepted_rollouts, response.ignored_rollouts)


def create_run_request(run_id: str, config: RunConfig | None) -> pb.CreateRunRequest:
    """Return the request for a run; no config asks for the scheduler's default."""
    if config is None:
        return pb.CreateRunRequest(run_id=run_id)
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    message = pb.RunConfig(**{name: value for name, value in values.items() if value is not None})
    return pb.CreateRunRequest(run_id=run_id, config=message)


def get_run_request(run_id: str) -> pb.GetRunRequest:
    """Return the request for one run."""
    return pb.GetRunRequest(run_id=run_id)


def list_runs_request(page_token: str) -> pb.ListRunsRequest:
    """Return the request for a page of runs."""
    return pb.ListRunsRequest(page_size=RUNS_PAGE, page_token=page_token)


def list_prompt_stats_request(run_id: str, page_token: str) -> pb.ListPromptStatsRequest:
    """Return the request for a page of prompt statistics."""
    return pb.ListPromptStatsRequest(run_id=run_id, page_size=STATS_PAGE, page_token=page_token)


def allocate_request(run_id: str, request_id: str, ask: AllocationAsk) -> pb.AllocateRequest:
    """Return the request for an allocation."""
    return pb.AllocateRequest(
        run_id=run_id,
        step=ask.step,
        request_id=request_id,
        prompt_ids=ask.prompt_ids,
        total_rollouts=ask.total_rollouts,
        min_rollouts=ask.min_rollouts,
        max_rollouts=ask.max_rollouts,
        wave_fraction=ask.wave_fraction,
        allow_partial=ask.allow_partial,
        total_tokens=ask.total_tokens,
        waves=ask.waves,
    )


def extend_request(
    run_id: str,
    request_id: str,
    allocation_id: str,
    wave_fraction: float,
    keep_outstanding: bool,
) -> pb.ExtendRequest:
    """Return the request for the next wave of an allocation."""
    return pb.ExtendRequest(
        run_id=run_id,
        allocation_id=allocation_id,
        request_id=request_id,
        wave_fraction=wave_fraction,
        keep_outstanding=keep_outstanding,
    )


def rewind_request(run_id: str, request_id: str, step: int) -> pb.RewindRunRequest:
    """Return the request to forget what came after a step."""
    return pb.RewindRunRequest(run_id=run_id, step=step, request_id=request_id)


def delete_run_request(run_id: str) -> pb.DeleteRunRequest:
    """Return the request to delete a run."""
    return pb.DeleteRunRequest(run_id=run_id)


def to_allocation(response: pb.Allocation, ask: AllocationAsk) -> Allocation:
    """Return the answer to ``ask``.

    Raises:
        MalformedAnswer: the answer does not have one number per prompt.
    """
    sizes = _counts(response, len(ask.prompt_ids))
    return Allocation(
        num_rollouts=sizes,
        prompt_ids=ask.prompt_ids,
        step=ask.step,
        wave=response.wave,
        allocated_rollouts=response.allocated_rollouts,
        remaining_rollouts=response.remaining_rollouts,
        unallocated_rollouts=response.unallocated_rollouts,
        is_fallback=False,
        summary=_summary(response.summary),
        allocation_id=response.allocation_id,
        run_id=response.run_id,
        total_rollouts=response.allocated_rollouts + response.remaining_rollouts,
        rollouts_so_far=tuple(sizes),
        min_rollouts=ask.min_rollouts,
        max_rollouts=ask.max_rollouts,
    )


def to_extension(response: pb.Allocation, before: Allocation) -> Allocation:
    """Return the next wave of ``before``.

    Raises:
        MalformedAnswer: the answer does not have one number per prompt.
    """
    sizes = _counts(response, len(before.prompt_ids))
    so_far = tuple(map(sum, zip(before.rollouts_so_far, sizes, strict=True)))
    return Allocation(
        num_rollouts=sizes,
        prompt_ids=before.prompt_ids,
        step=before.step,
        wave=response.wave,
        allocated_rollouts=response.allocated_rollouts,
        remaining_rollouts=response.remaining_rollouts,
        unallocated_rollouts=response.unallocated_rollouts,
        is_fallback=False,
        summary=_summary(response.summary),
        allocation_id=response.allocation_id,
        run_id=response.run_id,
        total_rollouts=before.total_rollouts,
        rollouts_so_far=so_far,
        min_rollouts=before.min_rollouts,
        max_rollouts=before.max_rollouts,
    )


def to_run(message: pb.Run) -> Run:
    """Return a run."""
    created = None
    if message.HasField("create_time"):
        created = message.create_time.ToDatetime(tzinfo=datetime.UTC)
    return Run(
        run_id=message.run_id,
        config=to_config(message.config),
        create_time=created,
        last_step=message.last_step,
        last_policy_version=message.last_policy_version,
        known_prompts=message.known_prompts,
        total_rollouts=message.total_rollouts,
        total_successes=message.total_successes,
        rewinds=message.rewinds,
        ignored_rollouts=message.ignored_rollouts,
        reported_groups=message.reported_groups,
        effective_groups=message.effective_groups,
        reward_levels=tuple(message.reward_levels),
        calibration=Calibration(
            **{f.name: tuple(getattr(message.calibration, f.name)) for f in fields(Calibration)}
        ),
    )


def to_config(message: pb.RunConfig) -> RunConfig:
    """Return a config; what the message leaves out is None."""
    present = {field.name for field, _ in message.ListFields()}
    return RunConfig(
        **{f.name: getattr(message, f.name) for f in fields(RunConfig) if f.name in present}
    )


def to_prompt_stats(page: pb.ListPromptStatsResponse) -> list[PromptStats]:
    """Return a page of prompt statistics."""
    return list(
        map(
            PromptStats,
            page.prompt_ids,
            page.total_rollouts,
            page.total_successes,
            page.last_step,
            page.last_policy_version,
            page.posterior_alpha,
            page.posterior_beta,
            page.mean_completion_tokens,
        )
    )


def _counts(response: pb.Allocation, prompts: int) -> list[int]:
    sizes = list(response.num_rollouts)
    if len(sizes) != prompts:
        raise MalformedAnswer(f"an answer of {len(sizes)} numbers for {prompts} prompts")
    return sizes


def _summary(message: pb.AllocationSummary) -> AllocationSummary:
    return AllocationSummary(
        **{f.name: getattr(message, f.name) for f in fields(AllocationSummary)}
    )

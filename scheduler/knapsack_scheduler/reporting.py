"""Report and ImportOutcomes: rewards are held against the run before they are recorded."""

from __future__ import annotations

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation, wire
from knapsack_scheduler.allocations import Counted, OpenAllocation
from knapsack_scheduler.calls import Call, Repeated
from knapsack_scheduler.deciding import Decided
from knapsack_scheduler.errors import FailedPrecondition, InvalidArgument
from knapsack_scheduler.events import OutcomesCounted, Prompts
from knapsack_scheduler.facts import ALWAYS, OutcomesReported, Rewards
from knapsack_scheduler.jumps import step_jump, version_jump
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loaded import LoadedRun


def decide_report(
    call: Call, request: pb.ReportRequest, rewards: Rewards, limits: Limits, run: LoadedRun
) -> Decided[pb.ReportResponse] | Repeated[pb.ReportResponse]:
    """Return what becomes of a report: it is recorded, or ignored after a rewind.

    Args:
        call: the request's.
        request: checked but for what depends on the run.
        rewards: of the request, by position.
        limits: of a request.
        run: level with the journal; not changed.

    Raises:
        AlreadyExists: the report's id was used with other content.
        NotFound: no such allocation.
        InvalidArgument: it is not of the allocation's step or positions, or holds more
            rollouts than were allocated, or its step or policy version is far beyond the run's.
        FailedPrecondition: its step is closed.
    """
    ignored = run.is_abandoned(request.allocation_id) or run.has_forgotten(
        request.report_id, call.digest
    )
    if ignored and not run.holds(call.kind, call.key, call.digest):
        # Its id may be that of a report of the step done anew, before or after.
        call = call.apart()
    before = call.repeated(run, pb.ReportResponse.FromString)
    if before is not None:
        return before
    count = len(request.rewards)
    by_steps = by_versions = 0
    if not ignored:
        by_versions = version_jump(request.policy_version, run.state, limits)
        if not request.allocation_id:
            by_steps = step_jump(request.step, run.state, limits)
    if ignored:
        answer = pb.ReportResponse(ignored_rollouts=count)
        step = ALWAYS
    elif request.allocation_id:
        allocation = run.allocation(request.allocation_id)
        _check_report(request, rewards, allocation)
        answer = pb.ReportResponse(accepted_rollouts=count)
        step = allocation.step
    else:
        if request.step <= run.row.closed_step:
            raise FailedPrecondition(
                f"step = {request.step}: run {run.row.run_id!r} takes reports of step "
                f"{run.row.closed_step + 1} and later ones; of older steps it could not "
                "tell a repeated report from a new one"
            )
        answer = pb.ReportResponse(accepted_rollouts=count)
        step = request.step
    reported = OutcomesReported(
        request.allocation_id,
        step,
        tuple(request.prompt_ids),
        request.policy_version,
        rewards,
        ignored,
    )
    return Decided(
        answer,
        call.entry(step, answer),
        reported,
        lambda counted: _reported(run, step, request, counted, by_steps, by_versions),
    )


def decide_import(
    call: Call, stream: wire.ImportStream, run: LoadedRun
) -> Decided[pb.ImportOutcomesResponse] | Repeated[pb.ImportOutcomesResponse]:
    """Return what becomes of the outcomes of an earlier run: they are recorded.

    Args:
        call: the stream's.
        stream: received whole.
        run: level with the journal; not changed.

    Raises:
        AlreadyExists: the import's id was used with other content.
    """
    before = call.repeated(run, pb.ImportOutcomesResponse.FromString)
    if before is not None:
        return before

    # With the run locked: the ids of several imports at once would take much memory.
    answer = pb.ImportOutcomesResponse(
        imported_rollouts=stream.rollouts, imported_prompts=stream.prompts()
    )

    def imported(counted: Counted) -> OutcomesCounted | None:
        if not counted.accepted:
            return None
        return OutcomesCounted(stream.run_id, -1, 0, counted, prompts_of(run), imported=True)

    return Decided(answer, call.entry(ALWAYS, answer), event=imported)


def prompts_of(run: LoadedRun) -> Prompts:
    """Return what is known of a run's prompts."""
    return Prompts(run.state.known_prompts, tuple(run.state.population.tolist()))


def _check_report(request: pb.ReportRequest, rewards: Rewards, allocation: OpenAllocation) -> None:
    """Refuse rewards for positions that do not exist and more than were allocated."""
    if request.step not in (0, allocation.step):
        raise InvalidArgument(
            "step", request.step, f"must be the allocation's, {allocation.step}, or not set"
        )
    positions = allocation.rows.size
    validation.within_positions(rewards.positions, rewards.highest, positions)
    # Weights are summed as float64, which is exact for as many rollouts as there can be.
    coming = np.bincount(rewards.positions, rewards.counts, positions)
    over = coming > allocation.allocated - allocation.delivered
    if over.any():
        at = int(np.argmax(over))
        delivered = allocation.delivered + coming
        place = list(request.prompt_indices).index(at)
        raise InvalidArgument(
            f"num_rewards[{place}]",
            request.num_rewards[place],
            f"brings position {at} to {int(delivered[at])} rollouts; "
            f"{int(allocation.allocated[at])} were allocated (a report repeated under its "
            "report_id is no second one)",
        )


def _reported(
    run: LoadedRun,
    step: int,
    request: pb.ReportRequest,
    counted: Counted,
    by_steps: int,
    by_versions: int,
) -> OutcomesCounted | None:
    """Return the event of a report that was folded; None if no rollout was in it."""
    if not (counted.accepted or counted.ignored):
        return None
    state = run.state
    return OutcomesCounted(
        request.run_id,
        step,
        request.policy_version,
        counted,
        prompts_of(run),
        allocated=bool(request.allocation_id),
        step_lag=max(state.last_step - step, 0),
        version_lag=max(state.last_policy_version - request.policy_version, 0),
        step_jump=by_steps,
        version_jump=by_versions,
    )

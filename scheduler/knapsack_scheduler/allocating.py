"""Allocate and Extend: what is believed of the batch is divided, and said in a message."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.calls import Call, Repeated
from knapsack_scheduler.core.outlook import outlook
from knapsack_scheduler.core.policy import begun_groups, plan_allocation, plan_extension
from knapsack_scheduler.core.problem import (
    Beliefs,
    Bounds,
    Budget,
    Decision,
    InfeasibleBudget,
    IntArray,
)
from knapsack_scheduler.deciding import Decided
from knapsack_scheduler.errors import FailedPrecondition, InvalidArgument
from knapsack_scheduler.events import BudgetDivided
from knapsack_scheduler.facts import AllocationExtended, AllocationMade
from knapsack_scheduler.jumps import step_jump
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loaded import LoadedRun


def decide_allocation(
    call: Call,
    request: pb.AllocateRequest,
    ids: tuple[str, ...],
    limits: Limits,
    run: LoadedRun,
) -> Decided[pb.Allocation] | Repeated[pb.Allocation]:
    """Return the first wave of a budget.

    Args:
        call: the request's.
        request: checked but for what depends on the run.
        ids: its prompts.
        limits: of a request.
        run: level with the journal; not changed.

    Raises:
        AlreadyExists: the request's id was used with other content.
        InvalidArgument: the run's bounds, policy or lengths do not allow it, or its step is far
            beyond the run's.
    """
    before = call.repeated(run, pb.Allocation.FromString)
    if before is not None:
        return before
    state = run.state
    jump = step_jump(request.step, state, limits)
    bounds = wire.bounds_of(request, state.config)
    wire.check_bounds(bounds, limits)
    wire.check_policy(request, bounds, state.config.policy)
    budget = wire.budget_of(request)
    beliefs, prior = state.beliefs(ids, request.step)
    if budget.total_tokens and not budget.total_rollouts and not beliefs.expected_tokens.any():
        raise InvalidArgument(
            "total_tokens",
            budget.total_tokens,
            "needs completion_tokens in earlier reports of the run; set total_rollouts "
            "until there are some",
        )
    wire.check_tokens(budget, bounds, beliefs.expected_tokens, limits)
    if not beliefs.expected_tokens.any():
        budget = replace(budget, total_tokens=0)
    start = time.perf_counter()
    try:
        decision = plan_allocation(
            state.config.policy, state.config.objective, beliefs, bounds, budget
        )
    except InfeasibleBudget as error:
        raise InvalidArgument(error.field, error.value, error.allowed) from None
    seconds = time.perf_counter() - start
    name = wire.allocation_id(run.row.identity, run.row.branch, request.request_id)
    answer = wire.allocation_message(name, run.row.run_id, request.step, 1, decision, prior)
    made = AllocationMade(
        name,
        request.step,
        ids,
        bounds,
        wire.budget_of(request),
        decision.num_rollouts,
        decision.chances,
    )
    end_time = time.time_ns()

    def divided(_counted: Counted) -> BudgetDivided:
        rows = state.rows_of(ids)
        begun = np.zeros_like(rows)
        event = _divided(
            run, request.step, 1, rows, begun, beliefs, bounds, decision, seconds, end_time
        )
        return replace(event, step_jump=jump)

    return Decided(answer, call.entry(request.step, answer), made, divided)


def decide_extension(
    call: Call, request: pb.ExtendRequest, run: LoadedRun
) -> Decided[pb.Allocation] | Repeated[pb.Allocation]:
    """Return the next wave of an allocation.

    Args:
        call: the request's.
        request: checked but for what depends on the run.
        run: level with the journal; not changed.

    Raises:
        AlreadyExists: the request's id was used with other content.
        NotFound: no such allocation.
        FailedPrecondition: nothing was reported of it yet.
    """
    before = call.repeated(run, pb.Allocation.FromString)
    if before is not None:
        return before
    state = run.state
    allocation = run.allocation(request.allocation_id)
    nothing_came = allocation.allocated.any() and not allocation.delivered.any()
    if nothing_came and not request.keep_outstanding:
        raise FailedPrecondition(
            f"allocation_id = {request.allocation_id!r}: nothing was reported of it yet; "
            "Report its rollouts first, or set keep_outstanding to count them as running"
        )
    ids = tuple(state.prompt_ids[row] for row in allocation.rows.tolist())
    beliefs, prior = state.beliefs(ids, allocation.step)
    budget = allocation.budget
    tokens = budget.total_tokens if beliefs.expected_tokens.any() else 0
    start = time.perf_counter()
    outcomes = allocation.outcomes(state.reward_levels)
    decision = plan_extension(
        state.config.policy,
        state.config.objective,
        beliefs,
        allocation.bounds,
        Budget(budget.total_rollouts, tokens, request.wave_fraction, True),
        outcomes,
        request.keep_outstanding,
    )
    seconds = time.perf_counter() - start
    wave = allocation.wave + 1
    begun = begun_groups(outcomes, request.keep_outstanding).size
    # What is given anew for rollouts that were lost is of a budget counted before.
    is_new = decision.allocated > 0 and not 0 < budget.total_rollouts <= int(
        allocation.allocated.sum()
    )
    answer = wire.allocation_message(
        request.allocation_id, run.row.run_id, allocation.step, wave, decision, prior
    )
    extended = AllocationExtended(
        request.allocation_id,
        allocation.step,
        decision.num_rollouts,
        request.keep_outstanding,
        decision.chances,
    )
    end_time = time.time_ns()

    def divided(_counted: Counted) -> BudgetDivided:
        return _divided(
            run,
            allocation.step,
            wave,
            allocation.rows.astype(np.int64),
            begun,
            beliefs,
            allocation.bounds,
            decision,
            seconds,
            end_time,
            is_new,
        )

    return Decided(answer, call.entry(allocation.step, answer), extended, divided)


def _divided(
    run: LoadedRun,
    step: int,
    wave: int,
    rows: IntArray,
    begun: IntArray,
    beliefs: Beliefs,
    bounds: Bounds,
    decision: Decision,
    seconds: float,
    end_time: int,
    is_new: bool = True,
) -> BudgetDivided:
    """Return the event of a decision; ``is_new``: its budget was not yet given out in full."""
    state = run.state
    return BudgetDivided(
        run.row.run_id,
        step,
        wave,
        decision.num_rollouts.size,
        decision.allocated,
        decision.unallocated,
        decision.reasons,
        decision.num_rollouts,
        state.bands(rows),
        state.evidence_ages(rows, step),
        outlook(state.config.objective, beliefs, bounds, begun, decision) if is_new else None,
        seconds,
        end_time,
    )

"""The calls of the contract: validate, read, decide, write, answer.

Knows neither gRPC nor Prometheus: takes and returns messages, raises ``errors``, emits
``events``. The gRPC server and the in-process client call the same methods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import pages, validation, wire
from knapsack_scheduler.allocations import Counted, OpenAllocation
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
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StoreUnavailable,
)
from knapsack_scheduler.events import (
    BudgetDivided,
    Events,
    OutcomesCounted,
    Prompts,
    RunLoaded,
    RunRemoved,
    RunRewound,
)
from knapsack_scheduler.facts import (
    ALWAYS,
    AllocationExtended,
    AllocationMade,
    OutcomesReported,
    Rewards,
)
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.transaction import Reading, Writing
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LOADED_BYTES
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.runs import Done, Runs
from knapsack_scheduler.state import RunState

_LOG = logging.getLogger(__name__)

LARGEST_PAGE_BYTES = 32 * 2**20
"""A page of statistics ends before it outgrows a message."""

_MOST_SUMMARIES = 10_000
"""Runs of which it is remembered how they were listed last, about 1 KB each."""

_FEW_UNSORTED = 4096
"""Prompts whose ids are sorted in some milliseconds, for which a run may be held."""

_FEW = 16_384
"""Prompts or rewards that are checked in about a millisecond."""

_MANY = 32_768
"""Prompts or rewards beyond which a call holds so much memory that it is folded first."""

Checked = TypeVar("Checked")


class SchedulerService:
    """The budget scheduler on one journal."""

    def __init__(
        self,
        journal: Journal,
        *,
        auto_create_runs: bool = False,
        default_config: RunConfig | None = None,
        limits: Limits | None = None,
        events: Events | None = None,
        retention: Retention | None = None,
        loaded_bytes: int = LOADED_BYTES,
    ) -> None:
        self._journal = journal
        self._default_config = default_config or RunConfig()
        self._limits = limits or Limits()
        self.events = events or Events()
        self._summaries: dict[str, tuple[int, int, pb.Run]] = {}
        self._runs = Runs(
            journal,
            self.events,
            auto_create_runs=auto_create_runs,
            default_config=self._default_config,
            retention=retention or Retention(),
            loaded_bytes=loaded_bytes,
        )

    async def preload(self, count: int) -> None:
        """Load the runs that were written to last, before the first call comes."""
        for run in await self._runs.preload(count):
            state = run.state
            self.events.emit(
                RunLoaded(run.row.run_id, _prompts(run), state.last_step, state.last_policy_version)
            )

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the runs that are kept in memory, about."""
        return self._runs.loaded_bytes

    async def settled(self) -> None:
        """Wait until all that was answered is in the statistics and told of in events."""
        await self._runs.settled()

    def close(self) -> None:
        """Wait for calls under way; the journal is closed by whoever opened it."""
        self._runs.close()

    async def create_run(self, request: pb.CreateRunRequest) -> pb.Run:
        """Create a run, or answer the one there is if its config is the same."""
        run_id = validation.name("run_id", request.run_id)
        config = self._default_config
        if request.HasField("config"):
            config = wire.parse_config(request.config)
        try:
            await self._runs.create(run_id, config)
        except AlreadyExists:
            run = await self.get_run(pb.GetRunRequest(run_id=run_id))
            if run.config != wire.config_message(config):
                raise AlreadyExists(
                    f"run_id = {run_id!r}: exists with another config: "
                    f"{_differences(run.config, wire.config_message(config))}"
                ) from None
            return run
        return await self.get_run(pb.GetRunRequest(run_id=run_id))

    async def get_run(self, request: pb.GetRunRequest) -> pb.Run:
        """Return one run."""
        run_id = validation.name("run_id", request.run_id)
        return await self._runs.look(
            run_id, lambda run, _reading: wire.run_message(run.row, run.state)
        )

    async def list_runs(
        self, request: pb.ListRunsRequest, may_see: Callable[[str], bool] = lambda _run_id: True
    ) -> pb.ListRunsResponse:
        """Return a page of the runs that the caller may see."""
        size = pages.page_size(request.page_size, 100, 1000)
        after = pages.key_before(request.page_token)
        seen: list[RunRow] = []
        while True:
            rows = await self._runs.in_thread(partial(self._journal.list_runs, after, size + 1))
            seen += [row for row in rows if may_see(row.run_id)]
            if len(rows) <= size or len(seen) > size:
                break
            after = rows[-1].run_id
        answer = pb.ListRunsResponse()
        for row in seen[:size]:
            try:
                answer.runs.append(await self._summary(row))
            except NotFound:
                continue  # Deleted since.
            except StoreUnavailable as error:
                _LOG.warning("run %r is listed by its name alone: %s", row.run_id, error)
                answer.runs.append(pb.Run(run_id=row.run_id))
        if len(seen) > size:
            answer.next_page_token = pages.token_after(seen[size - 1].run_id)
        return answer

    async def _summary(self, row: RunRow) -> pb.Run:
        """Return a run for a list, without loading one to which nothing was added since.

        Else whoever looks at the list every few seconds would have old runs loaded again and
        again, at the cost of those that are being trained.
        """
        known = self._summaries.pop(row.run_id, None)
        if known is None or known[:2] != (row.identity, row.last_seq):
            run = await self.get_run(pb.GetRunRequest(run_id=row.run_id))
            # What was added meanwhile is not in the row, so it is looked at again next time.
            known = (row.identity, row.last_seq, run)
        self._summaries[row.run_id] = known
        if len(self._summaries) > _MOST_SUMMARIES:
            del self._summaries[next(iter(self._summaries))]
        return known[2]

    async def delete_run(self, request: pb.DeleteRunRequest) -> pb.DeleteRunResponse:
        """Delete a run."""
        run_id = validation.name("run_id", request.run_id)
        await self._runs.delete(run_id)
        self.events.emit(RunRemoved(run_id))
        return pb.DeleteRunResponse()

    async def allocate(self, request: pb.AllocateRequest) -> pb.Allocation:
        """Divide a budget among the prompts of a batch."""
        ids = await self._checked(
            len(request.prompt_ids), lambda: wire.check_allocate(request, self._limits)
        )
        return await self._runs.alone(
            request.run_id,
            lambda run, writing: self._allocate(request, ids, run, writing),
            create=True,
            large=len(ids) > _MANY,
        )

    def _allocate(
        self, request: pb.AllocateRequest, ids: tuple[str, ...], run: LoadedRun, writing: Writing
    ) -> Done[pb.Allocation]:
        payload = wire.payload_of(request)
        digest = wire.digest_of(payload)
        before = run.answered(writing, "allocate", request.request_id, digest)
        if before is not None:
            return Done(pb.Allocation.FromString(before))
        state = run.state
        bounds = wire.bounds_of(request, state.config)
        wire.check_bounds(bounds, self._limits)
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
        wire.check_tokens(budget, bounds, beliefs.expected_tokens, self._limits)
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
        writing.append(
            _entry("allocate", request.request_id, request.step, digest, payload, answer)
        )
        run.decided = AllocationMade(
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
            return _divided(
                run, request.step, 1, rows, begun, beliefs, bounds, decision, seconds, end_time
            )

        return Done(answer, divided)

    async def _checked(self, numbers: int, check: Callable[[], Checked]) -> Checked:
        """Check a request of so many prompts or rewards: a small one here and now.

        A thread would take longer to begin than to check it.
        """
        return check() if numbers <= _FEW else await self._runs.in_thread(check)

    async def extend(self, request: pb.ExtendRequest) -> pb.Allocation:
        """Spend what an allocation has left."""
        wire.check_extend(request)
        return await self._runs.alone(
            request.run_id, lambda run, writing: self._extend(request, run, writing)
        )

    def _extend(
        self, request: pb.ExtendRequest, run: LoadedRun, writing: Writing
    ) -> Done[pb.Allocation]:
        payload = wire.payload_of(request)
        digest = wire.digest_of(payload)
        before = run.answered(writing, "extend", request.request_id, digest)
        if before is not None:
            return Done(pb.Allocation.FromString(before))
        state = run.state
        allocation = _allocation(run, request.allocation_id)
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
        writing.append(
            _entry("extend", request.request_id, allocation.step, digest, payload, answer)
        )
        run.decided = AllocationExtended(
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

        return Done(answer, divided)

    async def report(self, request: pb.ReportRequest) -> pb.ReportResponse:
        """Record rewards."""
        rewards = await self._checked(
            len(request.rewards), lambda: wire.check_report(request, self._limits)
        )
        return await self._runs.alone(
            request.run_id,
            lambda run, writing: self._report(request, rewards, run, writing),
            create=not request.allocation_id,
            large=len(request.rewards) > _MANY,
        )

    def _report(
        self, request: pb.ReportRequest, rewards: Rewards, run: LoadedRun, writing: Writing
    ) -> Done[pb.ReportResponse]:
        payload = wire.payload_of(request)
        digest = wire.digest_of(payload)
        before = run.answered(writing, "report", request.report_id, digest)
        if before is not None:
            return Done(pb.ReportResponse.FromString(before))
        count = len(request.rewards)
        if not request.allocation_id and run.has_forgotten(request.report_id, digest):
            # Nothing is recorded: its id is free for a report of the step done anew.
            return Done(pb.ReportResponse(ignored_rollouts=count))
        ignored = run.is_abandoned(request.allocation_id)
        if ignored:
            answer = pb.ReportResponse(ignored_rollouts=count)
            step = ALWAYS
        elif request.allocation_id:
            allocation = _allocation(run, request.allocation_id)
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
        writing.append(_entry("report", request.report_id, step, digest, payload, answer))
        run.decided = OutcomesReported(
            request.allocation_id,
            step,
            tuple(request.prompt_ids),
            request.policy_version,
            rewards,
            ignored,
        )
        return Done(answer, lambda counted: _reported(run, step, request, counted))

    async def rewind_run(self, request: pb.RewindRunRequest) -> pb.Run:
        """Forget what came after a step."""
        validation.name("run_id", request.run_id)
        validation.within("step", request.step, -1, self._limits.step)
        if request.request_id:
            validation.name("request_id", request.request_id)
        digest = wire.digest_of(wire.payload_of(request))

        def before(run: LoadedRun, reading: Reading) -> tuple[pb.Run, LoadedRun | None] | None:
            if not request.request_id:
                return None
            answer = run.answered(reading, "rewind", request.request_id, digest)
            return (pb.Run.FromString(answer), None) if answer is not None else None

        def rewind(left: LoadedRun, writing: Writing) -> tuple[pb.Run, LoadedRun | None]:
            return before(left, writing) or self._rewind(request, left, writing)

        answer, left = await self._runs.rewound(request.run_id, request.step, before, rewind)
        if left:
            self.events.emit(RunRewound(request.run_id, request.step, _prompts(left)))
        return answer

    def _rewind(
        self, request: pb.RewindRunRequest, left: LoadedRun, writing: Writing
    ) -> tuple[pb.Run, LoadedRun]:
        payload = wire.payload_of(request)
        answer = wire.run_message(left.row, left.state)
        answer.rewinds += 1
        # Without an id of its own a rewind is named for its place in the journal.
        key = request.request_id or f"\x01{writing.run.last_seq + 1}"
        digest = wire.digest_of(payload)
        writing.append(_entry("rewind", key, request.step, digest, payload, answer))
        return answer, left

    async def list_prompt_stats(
        self, request: pb.ListPromptStatsRequest
    ) -> pb.ListPromptStatsResponse:
        """Return a page of prompt statistics."""
        validation.name("run_id", request.run_id)
        size = pages.page_size(request.page_size, 1000, 100_000)
        after = pages.key_before(request.page_token)

        def page(run: LoadedRun, _reading: Reading) -> pb.ListPromptStatsResponse:
            return _stats_page(run, after, size)

        def page_if_sorted(
            run: LoadedRun, reading: Reading
        ) -> pb.ListPromptStatsResponse | RunState:
            return page(run, reading) if run.state.unsorted <= _FEW_UNSORTED else run.state

        answer = await self._runs.look(request.run_id, page_if_sorted)
        if isinstance(answer, RunState):
            # Takes long, so the run is not held meanwhile.
            await self._runs.in_thread(answer.sort_ids)
            answer = await self._runs.look(request.run_id, page)
        return answer

    async def import_outcomes(
        self, requests: AsyncIterator[pb.ImportOutcomesRequest]
    ) -> pb.ImportOutcomesResponse:
        """Add the outcomes of an earlier run."""
        return await self.import_received(await self.receive_outcomes(requests))

    async def receive_outcomes(
        self, requests: AsyncIterator[pb.ImportOutcomesRequest]
    ) -> wire.ImportStream:
        """Return the messages of an import, checked as they arrive; adds nothing yet."""
        stream = wire.ImportStream(self._limits)
        async for message in requests:
            stream.add(message)
        return stream

    async def import_received(self, stream: wire.ImportStream) -> pb.ImportOutcomesResponse:
        """Add the outcomes of a whole stream."""
        payload = await self._runs.in_thread(stream.payload)
        return await self._runs.alone(
            stream.run_id,
            lambda run, writing: self._import(stream, payload, run, writing),
            create=True,
            large=True,
        )

    def _import(
        self, stream: wire.ImportStream, payload: bytes, run: LoadedRun, writing: Writing
    ) -> Done[pb.ImportOutcomesResponse]:
        digest = wire.digest_of(payload)
        before = run.answered(writing, "import", stream.request_id, digest)
        if before is not None:
            return Done(pb.ImportOutcomesResponse.FromString(before))
        prompts = {
            p
            for message in stream.messages or ()
            for p, n in zip(message.prompt_ids, message.num_rewards, strict=True)
            if n
        }
        answer = pb.ImportOutcomesResponse(
            imported_rollouts=stream.rollouts, imported_prompts=len(prompts)
        )
        writing.append(
            Entry(
                0,
                "import",
                stream.request_id,
                0,
                ALWAYS,
                digest,
                payload,
                answer.SerializeToString(),
            )
        )

        def imported(counted: Counted) -> OutcomesCounted | None:
            if not counted.accepted:
                return None
            return OutcomesCounted(stream.run_id, -1, 0, counted, _prompts(run), imported=True)

        return Done(answer, imported)


def _entry(kind: str, key: str, step: int, digest: bytes, payload: bytes, answer: Message) -> Entry:
    return Entry(0, kind, key, 0, step, digest, payload, answer.SerializeToString())


def _allocation(run: LoadedRun, name: str) -> OpenAllocation:
    allocation = run.state.allocations.get(name)
    if allocation is not None:
        return allocation
    reason = "does not exist"
    if run.is_abandoned(name):
        reason = "was forgotten by a rewind"
    elif run.row.floor_seq:
        reason = f"does not exist or is of step {run.row.floor_step} or before, long since closed,"
    raise NotFound(f"allocation_id = {name!r}: {reason} in run {run.row.run_id!r}")


def _check_report(request: pb.ReportRequest, rewards: Rewards, allocation: OpenAllocation) -> None:
    """Refuse rewards for positions that do not exist and more than were allocated."""
    if request.step not in (0, allocation.step):
        raise InvalidArgument(
            "step", request.step, f"must be the allocation's, {allocation.step}, or not set"
        )
    positions = allocation.rows.size
    if np.asarray(request.prompt_indices, np.int64).max(initial=0) >= positions:
        wire.rewards_of(request, positions)
    delivered = allocation.delivered + np.bincount(rewards.owner, minlength=positions)
    over = delivered > allocation.allocated
    if over.any():
        at = int(np.argmax(over))
        place = list(request.prompt_indices).index(at)
        raise InvalidArgument(
            f"num_rewards[{place}]",
            request.num_rewards[place],
            f"brings position {at} to {int(delivered[at])} rollouts; "
            f"{int(allocation.allocated[at])} were allocated (a report repeated under its "
            "report_id is no second one)",
        )


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


def _reported(
    run: LoadedRun, step: int, request: pb.ReportRequest, counted: Counted
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
        _prompts(run),
        allocated=bool(request.allocation_id),
        step_lag=max(state.last_step - step, 0),
        version_lag=max(state.last_policy_version - request.policy_version, 0),
    )


def _prompts(run: LoadedRun) -> Prompts:
    return Prompts(run.state.known_prompts, tuple(run.state.population.tolist()))


def _stats_page(run: LoadedRun, after: str, size: int) -> pb.ListPromptStatsResponse:
    state = run.state
    rows = state.prompts_after(after, size + 1)
    ids = [state.prompt_ids[row] for row in rows[:size].tolist()]
    # UTF-8 takes up to 4 bytes a character, the columns less than 80 a row.
    sizes = np.cumsum([4 * len(p) + 80 for p in ids])
    size = max(int(np.searchsorted(sizes, LARGEST_PAGE_BYTES, side="right")), 1)
    ids = ids[:size]
    answer = wire.stats_message(ids, state.stats_of(rows[: len(ids)]))
    if rows.size > len(ids):
        answer.next_page_token = pages.token_after(ids[-1])
    return answer


def _differences(there: pb.RunConfig, asked: pb.RunConfig) -> str:
    fields = (field.name for field in pb.RunConfig.DESCRIPTOR.fields)
    return ", ".join(
        f"{name} is {getattr(there, name)!r}, asked for {getattr(asked, name)!r}"
        for name in fields
        if getattr(there, name) != getattr(asked, name)
    )

"""The calls of the contract: validate, read, decide, write, answer.

Knows neither gRPC nor Prometheus: takes and returns messages, raises ``errors``, emits
``events``. The gRPC server and the in-process client call the same methods.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from functools import partial

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import pages, validation, wire
from knapsack_scheduler.allocating import decide_allocation, decide_extension
from knapsack_scheduler.calls import Call, Once
from knapsack_scheduler.errors import (
    AlreadyExists,
    NotFound,
    StoreUnavailable,
)
from knapsack_scheduler.events import (
    Events,
    RunLoaded,
    RunRemoved,
    RunRewound,
)
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import RunRow
from knapsack_scheduler.journal.transaction import Reading, Writing
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.loadedruns import LOADED_BYTES
from knapsack_scheduler.reporting import decide_import, decide_report, prompts_of
from knapsack_scheduler.runconfig import RunConfig
from knapsack_scheduler.runs import Runs
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
        self._summaries: dict[str, tuple[tuple[int, ...], pb.Run]] = {}
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
                RunLoaded(
                    run.row.run_id, prompts_of(run), state.last_step, state.last_policy_version
                )
            )

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the runs that are kept in memory, about."""
        return self._runs.loaded_bytes

    async def settled(self) -> None:
        """Wait until all that was answered is in the statistics and told of in events."""
        await self._runs.settled()

    async def ended(self) -> None:
        """Wait until all that was begun is done too, whether somebody waits for it or not."""
        await self._runs.ended()

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
        count = size + 1
        while True:
            rows = await self._runs.in_thread(partial(self._journal.list_runs, after, count))
            seen += [row for row in rows if may_see(row.run_id)]
            if len(rows) < count or len(seen) > size:
                break
            after = rows[-1].run_id
            # Of small pages and many runs of others there would be a query for every few.
            count = 1000
        answer = pb.ListRunsResponse()
        for row in seen[:size]:
            try:
                answer.runs.append(await self._summary(row))
            except NotFound:
                continue  # Deleted since.
            except StoreUnavailable as error:
                _LOG.warning("run %r is listed by its name alone: %s", row.run_id, error)
                answer.runs.append(pb.Run(run_id=row.run_id))
            except Exception:
                # One run that nobody can read must not hide all others.
                _LOG.exception("run %r is listed by its name alone", row.run_id)
                answer.runs.append(pb.Run(run_id=row.run_id))
        if len(seen) > size:
            answer.next_page_token = pages.token_after(seen[size - 1].run_id)
        return answer

    async def _summary(self, row: RunRow) -> pb.Run:
        """Return a run for a list, without loading one to which nothing was added since.

        Else whoever looks at the list every few seconds would have old runs loaded again and
        again, at the cost of those that are being trained.
        """
        # With its time: a run that was put back from an export goes on from there as another.
        at = (row.identity, row.last_seq, row.update_time)
        known = self._summaries.pop(row.run_id, None)
        if known is None or known[0] != at:
            # What was added meanwhile is not in the row, so it is looked at again next time.
            known = (at, await self.get_run(pb.GetRunRequest(run_id=row.run_id)))
        self._summaries[row.run_id] = known
        if len(self._summaries) > _MOST_SUMMARIES:
            del self._summaries[next(iter(self._summaries))]
        return known[1]

    async def delete_run(self, request: pb.DeleteRunRequest) -> pb.DeleteRunResponse:
        """Delete a run."""
        run_id = validation.name("run_id", request.run_id)
        await self._runs.delete(run_id)
        self.events.emit(RunRemoved(run_id))
        return pb.DeleteRunResponse()

    async def allocate(self, request: pb.AllocateRequest) -> pb.Allocation:
        """Divide a budget among the prompts of a batch."""
        check = Once(lambda: wire.check_allocate(request, self._limits))
        if len(request.prompt_ids) > _FEW:
            await self._runs.in_thread(check)
        call = Call.of("allocate", request.request_id, request, check)
        return await self._runs.alone(
            request.run_id,
            call,
            lambda run: decide_allocation(call, request, check(), self._limits, run),
            create=True,
            large=lambda _run: len(request.prompt_ids) > _FEW,
            heavy=len(request.prompt_ids) > _MANY,
        )

    async def extend(self, request: pb.ExtendRequest) -> pb.Allocation:
        """Spend what an allocation has left."""
        wire.check_extend(request)
        call = Call.of("extend", request.request_id, request)

        def large(run: LoadedRun) -> bool:
            # Another replica may have made one that is not in memory yet.
            allocation = run.state.allocations.get(request.allocation_id)
            return allocation is None or allocation.rows.size > _FEW

        return await self._runs.alone(
            request.run_id, call, lambda run: decide_extension(call, request, run), large=large
        )

    async def report(self, request: pb.ReportRequest) -> pb.ReportResponse:
        """Record rewards."""
        # A small one is checked where it is decided, or where it would have to wait for that.
        check = Once(lambda: wire.check_report(request, self._limits))
        numbers = len(request.rewards), len(request.prompt_indices), len(request.prompt_ids)
        if max(numbers) > _FEW:
            await self._runs.in_thread(check)
        call = Call.of("report", request.report_id, request, check)
        return await self._runs.alone(
            request.run_id,
            call,
            lambda run: decide_report(call, request, check(), self._limits, run),
            create=not request.allocation_id,
            heavy=len(request.rewards) > _MANY,
        )

    async def rewind_run(self, request: pb.RewindRunRequest) -> pb.Run:
        """Forget what came after a step."""
        validation.name("run_id", request.run_id)
        validation.within("step", request.step, -1, self._limits.step)
        if request.request_id:
            validation.name("request_id", request.request_id)
        call = Call.of("rewind", request.request_id, request)

        def before(run: LoadedRun, reading: Reading) -> tuple[pb.Run, LoadedRun | None] | None:
            same = call.repeated(run, pb.Run.FromString) if request.request_id else None
            return (same.answer(reading.entry(same.seq).answer), None) if same else None

        def rewind(left: LoadedRun, writing: Writing) -> tuple[pb.Run, LoadedRun | None]:
            return before(left, writing) or self._rewind(request, left, writing)

        answer, left = await self._runs.rewound(request.run_id, request.step, before, rewind)
        if left:
            self.events.emit(RunRewound(request.run_id, request.step, prompts_of(left)))
        return answer

    def _rewind(
        self, request: pb.RewindRunRequest, left: LoadedRun, writing: Writing
    ) -> tuple[pb.Run, LoadedRun]:
        answer = wire.run_message(left.row, left.state)
        answer.rewinds += 1
        # Without an id of its own a rewind is named for its place in the journal.
        key = request.request_id or f"\x01{writing.run.last_seq + 1}"
        writing.append(Call.of("rewind", key, request).entry(request.step, answer))
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
        call = Call("import", stream.request_id, stream.payload)

        await self._runs.in_thread(call.prepare)
        return await self._runs.alone(
            stream.run_id,
            call,
            lambda run: decide_import(call, stream, run),
            create=True,
            large=lambda _run: True,
            heavy=True,
        )


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

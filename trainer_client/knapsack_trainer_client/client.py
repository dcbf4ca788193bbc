"""The client that a trainer asks for rollouts, for asyncio.

The promise of every call in a training step (``allocate``, ``extend``, ``report``,
``rewind``): it ends within ``timeout`` seconds, whatever the scheduler does, and it
raises only what the caller did wrong. Where the scheduler does not answer, the budget is
divided uniformly and reports wait in the outbox.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import grpc

from knapsack_trainer_client import wire
from knapsack_trainer_client.arguments import (
    LARGEST,
    AllocationAsk,
    check_ask,
    check_config,
    check_fraction,
    check_int,
    check_run_id,
    check_timeout,
)
from knapsack_trainer_client.calls import Caller, Deadline, NotFound, Refused, Unanswered
from knapsack_trainer_client.closing import AsyncClosing
from knapsack_trainer_client.courier import Courier
from knapsack_trainer_client.errors import (
    ClientMisuse,
    InvalidRequest,
    RunConfigConflict,
    SchedulerUnavailable,
    refused,
)
from knapsack_trainer_client.events import (
    AllocationMade,
    CallFailed,
    Event,
    NothingReported,
    OutboxFailed,
    ReportsDropped,
    ReportSent,
    RewoundElsewhere,
    RunCreated,
    StepsBehind,
)
from knapsack_trainer_client.fallback import uniform_allocation, uniform_extension
from knapsack_trainer_client.nouns import (
    TLS,
    Allocation,
    PromptStats,
    ReportReceipt,
    Run,
    RunConfig,
)
from knapsack_trainer_client.outbox import Limits, WaitingRewind, default_path
from knapsack_trainer_client.queries import fetch_prompt_stats, no_fallback
from knapsack_trainer_client.rewards import check_outcomes
from knapsack_trainer_client.telemetry import ClientStats, Telemetry
from knapsack_trainer_client.transport import (
    GrpcTransport,
    Method,
    RequestT,
    ResponseT,
    Token,
    Transport,
)

OnUnavailable = Literal["uniform", "raise"]


class AsyncBudgetClient(AsyncClosing):
    """Asks a budget scheduler how many rollouts each prompt should get.

    Belongs to the event loop that first uses it and to the process that made it: after a
    fork, make a new one. The outbox is emptied by a task of the loop, so a loop that is
    blocked by training delivers nothing meanwhile; ``BudgetClient`` has a loop of its own.

    Args:
        address: gRPC target of the scheduler, such as ``"localhost:50051"``. Of several
            schedulers on one database ``"dns:///NAME:PORT"``, a name with an address of
            each, or ``"ipv4:ADDRESS:PORT,ADDRESS:PORT"``; calls go to those that are up.
        run_id: name of the experiment. Unknown: the run is created.
        timeout: longest that a call waits for the scheduler, retries included, seconds.
            Putting a report into the outbox may add up to 2 s where the disk hangs.
        on_unavailable: "uniform" goes on without the scheduler; "raise" raises
            ``SchedulerUnavailable`` and queues nothing.
        outbox: file for undelivered reports, which processes may share; None for one per
            address and run in ``$KNAPSACK_RL_OUTBOX``, else ``$XDG_STATE_HOME/knapsack-rl``,
            else ``~/.local/state/knapsack-rl``; False for memory only.
        token: bearer token, or a function that returns the current one.
        tls: None for plaintext, True for the system's authorities, or a ``TLS``.
        config: how the run decides, a ``RunConfig`` or a mapping of its fields. Given, the
            run is created with it, or compared with it if it exists.
        on_event: called with every ``events.Event``, in the event loop; must not block.
        outbox_limits: most that may wait; beyond it the oldest reports are dropped.

    Raises:
        InvalidRequest: an argument is wrong.
    """

    def __init__(
        self,
        address: str,
        run_id: str,
        *,
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "uniform",
        outbox: str | os.PathLike[str] | Literal[False] | None = None,
        token: Token | None = None,
        tls: TLS | bool | None = None,
        config: RunConfig | Mapping[str, object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        outbox_limits: Limits | None = None,
    ) -> None:
        self._setup(
            GrpcTransport(address, token, tls),
            run_id,
            timeout,
            on_unavailable,
            outbox,
            config,
            on_event,
            outbox_limits,
        )

    @classmethod
    def embedded(
        cls,
        store: str | os.PathLike[str],
        run_id: str,
        *,
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "uniform",
        outbox: str | os.PathLike[str] | Literal[False] | None = None,
        config: RunConfig | Mapping[str, object] | None = None,
        on_event: Callable[[Event], object] | None = None,
        outbox_limits: Limits | None = None,
    ) -> Self:
        """Return a client with a scheduler of its own, in this process and without a socket.

        Args:
            store: a SQLite file, or a store URL such as ``"sqlite:///stats.db"``. One
                process at a time may open it.
            run_id, timeout, on_unavailable, outbox, config, on_event, outbox_limits: as
                for the class.

        Raises:
            InvalidRequest: an argument is wrong. The first call raises it, too, where the
                store cannot be opened, and ``ExtraMissing`` where the scheduler is not
                installed.
        """
        from knapsack_trainer_client.embedded import EmbeddedTransport

        client = cls.__new__(cls)
        client._setup(
            EmbeddedTransport(store),
            run_id,
            timeout,
            on_unavailable,
            outbox,
            config,
            on_event,
            outbox_limits,
        )
        return client

    def _setup(
        self,
        transport: Transport,
        run_id: str,
        timeout: float,
        on_unavailable: OnUnavailable,
        outbox: str | os.PathLike[str] | Literal[False] | None,
        config: RunConfig | Mapping[str, object] | None,
        on_event: Callable[[Event], object] | None,
        outbox_limits: Limits | None,
    ) -> None:
        if on_unavailable not in ("uniform", "raise"):
            raise refused("on_unavailable", on_unavailable, 'must be "uniform" or "raise"')
        self._transport = transport
        self._run_id = check_run_id(run_id)
        self._timeout = check_timeout("timeout", timeout)
        self._raises = on_unavailable == "raise"
        self._config = check_config(config)
        self._emit = Telemetry(transport.target, self._raises, on_event)
        self._caller = Caller(
            transport,
            self._emit,
            pending_reports=lambda: self._courier.pending,
            on_news=lambda: self._courier.wake(),
        )
        self._courier = Courier(
            self._outbox_path(outbox),
            run_id,
            outbox_limits or Limits(),
            deliver=self._deliver_patiently,
            deliver_rewind=self._rewind_now,
            probe=self._probe,
            is_down=lambda: self._caller.is_down,
            emit=self._emit,
            noted=self._emit.pending,
            timeout=self._timeout,
        )
        if isinstance(transport, GrpcTransport):
            transport.pending_reports = lambda: self._courier.pending
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = asyncio.Lock()
        self._started = False
        self._closed = False
        self._run_ensured = False
        self._looked_behind = False
        self._tokens_reported = 0
        self._lengths_reported = 0
        self._reported_nothing: deque[str] = deque(maxlen=64)
        # Those that no rewind of this client forgot.
        self._allocations: deque[str] = deque(maxlen=1024)

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self._run_id

    @property
    def pending_reports(self) -> int:
        """Reports of the run that wait in the outbox, as last seen."""
        return self._courier.pending

    def stats(self) -> ClientStats:
        """Return what was counted since the client was made."""
        return self._emit.stats

    async def allocate(
        self,
        prompt_ids: Iterable[str],
        total_rollouts: int,
        step: int,
        min_rollouts: int | Iterable[int] | None = None,
        max_rollouts: int | Iterable[int] | None = None,
        wave_fraction: float = 0,
        allow_partial: bool = False,
        request_id: str | None = None,
        total_tokens: int = 0,
        waves: int = 0,
    ) -> Allocation:
        """Return how many rollouts to generate for each prompt of a batch.

        Where the scheduler does not answer: the uniform allocation, exactly the budget,
        within the bounds given here or in the client's config. It is the same in every
        process; but whether one process gets it and another the scheduler's is chance, so
        ask in one process and broadcast the answer.

        Args:
            prompt_ids: names of the prompts, stable over epochs; may repeat.
            total_rollouts: the budget; 0 only with ``total_tokens``.
            step: the trainer's step, 0 or more.
            min_rollouts, max_rollouts: of a group; one number or one per prompt. None:
                those of the run.
            wave_fraction: share of the budget to spend now, 0 to 1; ``extend`` spends
                the rest. 0: everything now.
            allow_partial: where the bounds cannot hold the budget, give the closest
                total instead of raising.
            request_id: the same for a retry of the same call, so that it gets the same
                answer. None: a new one.
            total_tokens: the budget in expected completion tokens; 0: not counted.
            waves: 2: two waves are to spend the budget, and the scheduler sizes the first
                so that both are worth most; ``extend`` spends the rest. Without
                ``wave_fraction``. 0 or 1: ``wave_fraction`` says what is spent now.

        Raises:
            InvalidRequest: an argument is wrong, or the bounds cannot hold the budget.
            AccessDenied: the scheduler never accepted the token or certificate.
            SchedulerUnavailable: with ``on_unavailable="raise"``.
        """
        begun = time.monotonic()
        config = self._config or RunConfig()
        ask = check_ask(
            prompt_ids,
            total_rollouts,
            step,
            config.min_rollouts if min_rollouts is None else min_rollouts,
            config.max_rollouts if max_rollouts is None else max_rollouts,
            wave_fraction,
            allow_partial,
            total_tokens,
            waves,
        )
        await self._ready()
        try:
            allocation = await self._allocate(ask, request_id or _new_id())
        except Unanswered as failure:
            self._give_up("Allocate", failure)
            allocation = uniform_allocation(ask, self._run_id, self._tokens_per_rollout)
        return self._made(allocation, begun)

    async def extend(
        self,
        allocation: Allocation,
        wave_fraction: float = 0,
        *,
        keep_outstanding: bool = False,
        request_id: str | None = None,
    ) -> Allocation:
        """Return the next wave of an allocation, decided on what was reported of it.

        Report first. Where the scheduler does not answer, or never knew the allocation:
        what is left of the budget, to the smallest groups first.

        Args:
            allocation: the newest wave.
            wave_fraction: share of the whole budget to spend now, 0 to 1; 0: all of
                what is left.
            keep_outstanding: rollouts not reported yet are still running; False: they
                are lost and their budget is spent again.
            request_id: the same for a retry of the same call.

        Raises:
            InvalidRequest: an argument is wrong, or nothing was reported yet.
            SchedulerUnavailable: with ``on_unavailable="raise"``.
        """
        begun = time.monotonic()
        share = check_fraction(wave_fraction)
        self._check_allocation(allocation)
        await self._ready()
        extension = None
        if allocation.allocation_id:
            try:
                extension = await self._extend(
                    allocation, share, keep_outstanding, request_id or _new_id()
                )
            except Unanswered as failure:
                self._give_up("Extend", failure)
        if extension is None:
            extension = uniform_extension(allocation, share)
        return self._made(extension, begun)

    async def report(
        self,
        allocation: Allocation,
        rewards: Iterable[Any],
        policy_version: int = 0,
        completion_tokens: Iterable[Any] | None = None,
        *,
        report_id: str | None = None,
    ) -> ReportReceipt:
        """Return a receipt for the rewards of finished rollouts.

        May be called several times for one allocation, each time with the rollouts that
        have finished since. Where the scheduler does not answer, the report waits in the
        outbox and the receipt says so.

        Args:
            allocation: any wave of the allocation that the rollouts belong to.
            rewards: one sequence per prompt, empty where there is nothing yet, or one
                flat sequence in the order of ``num_rollouts``. None or NaN is a rollout
                that never finished: missing, not failed.
            policy_version: version of the policy that generated them, 0 or more.
            completion_tokens: lengths of the completions, in the shape of ``rewards``;
                None if unknown.
            report_id: the same for a retry of the same report, so that it counts once.

        Raises:
            InvalidRequest: a shape or a value is wrong, or there are more rewards than
                rollouts were allocated.
            SchedulerUnavailable: with ``on_unavailable="raise"``.
        """
        self._check_allocation(allocation)
        outcomes = check_outcomes(
            rewards, completion_tokens, allocation.num_rollouts, allocation.rollouts_so_far
        )
        version = check_int("policy_version", policy_version)
        report_id = report_id or _new_id()
        await self._ready()
        if not outcomes.rewards:
            if allocation.allocated_rollouts:
                self._emit(NothingReported(allocation.step, allocation.allocated_rollouts))
            self._reported_nothing.append(allocation.allocation_id)
            return ReportReceipt(report_id, delivered=True)
        self._tokens_reported += sum(outcomes.completion_tokens)
        self._lengths_reported += len(outcomes.completion_tokens)
        parcel = wire.parcel(allocation, self._run_id, report_id, version, outcomes)
        try:
            receipt = await self._deliver(parcel, Deadline.after(self._timeout))
        except Refused as error:
            raise InvalidRequest(str(error)) from None
        except Unanswered as failure:
            self._give_up("Report", failure)
            await self._courier.keep(parcel)
            return ReportReceipt(report_id, delivered=False)
        self._emit(ReportSent(report_id, parcel.step, parcel.rollouts))
        if receipt.ignored_rollouts and allocation.allocation_id in self._allocations:
            self._emit(RewoundElsewhere(self._run_id, parcel.step, receipt.ignored_rollouts))
        return receipt

    async def rewind(self, step: int) -> Run | None:
        """Forget every allocation and outcome after ``step``; return the run.

        For a trainer that resumes from the checkpoint of ``step``; -1 forgets all. Call
        it in one process, before any call about later steps. Queued reports of later
        steps are dropped. Where the scheduler does not answer, the rewind is queued ahead
        of everything else and None comes back.

        Raises:
            InvalidRequest: ``step`` is not an integer of at least -1.
            SchedulerUnavailable: with ``on_unavailable="raise"``.
        """
        step = check_int("step", step, -1, LARGEST)
        await self._ready()
        self._allocations.clear()
        await self._courier.drop_after(step)
        rewind = WaitingRewind(step, _new_id())
        deadline = Deadline.after(self._timeout)
        try:
            # A report under way must not arrive after the rewind that forgets it.
            async with self._courier.quiet(deadline):
                await self._settle_waiting_rewind(deadline)
                return await self._rewind_now(rewind, deadline, patient=False)
        except Refused as error:
            raise InvalidRequest(str(error)) from None
        except Unanswered as failure:
            self._give_up("RewindRun", failure)
            await self._courier.keep_rewind(rewind)
            return None

    async def prompt_stats(self) -> list[PromptStats]:
        """Return what is known of every prompt of the run, ordered by prompt id.

        Fetched in pages, each within ``timeout``. Reports in the outbox are not in it.

        Raises:
            SchedulerUnavailable: no answer; there is no fallback for this.
        """
        await self._ready()
        with no_fallback():
            try:
                return await fetch_prompt_stats(self._caller, self._run_id, self._timeout)
            except NotFound:
                # The run will exist from its first allocation on.
                return []

    async def run(self) -> Run:
        """Return the run and its progress, creating it if it is unknown.

        Raises:
            RunConfigConflict: the run exists with another config than the client's.
            SchedulerUnavailable: no answer; there is no fallback for this.
        """
        await self._ready()
        deadline = Deadline.after(self._timeout)

        with no_fallback():
            await self._ensure_run(deadline)
            request = wire.get_run_request(self._run_id)
            return wire.to_run(await self._with_run(wire.GET_RUN, request, deadline))

    async def flush(self, timeout: float) -> bool:
        """Deliver what waits in the outbox; return whether nothing waits any more.

        Also waits for reports of the run that other processes have queued in the file.
        """
        await self._ready()
        return await self._courier.flush(Deadline.after(check_timeout("timeout", timeout)))

    async def close(self) -> None:
        """Deliver what can be delivered within the timeout and let go of everything.

        What remains stays in the outbox for the next client of the run; in memory only,
        it is lost, and the log says how much. A second call does nothing.
        """
        if self._closed or self._pid != os.getpid():
            return
        if self._started:
            await self._ready()
            if self._courier.pending and not self._caller.is_down:
                await self._courier.flush(Deadline.after(self._timeout))
            if self._courier.in_memory:
                reason = "the client was closed and they waited in memory"
                self._emit(ReportsDropped(self._courier.in_memory, reason))
            self._closed = True
            await self._courier.stop()
        self._closed = True
        await self._transport.close()

    async def __aenter__(self) -> Self:
        await self._ready()
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a connection belongs to one process."""
        raise ClientMisuse("a client cannot be pickled; make one in the process that uses it")

    async def _ready(self) -> None:
        """Open everything at the first call; refuse calls that cannot work."""
        if self._pid != os.getpid():
            raise ClientMisuse(
                "this client was made before a fork; make a new one in the child process"
            )
        if self._closed:
            raise ClientMisuse("this client is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ClientMisuse(
                "this client belongs to another event loop; make one for each loop, or use "
                "BudgetClient from code that is not asynchronous"
            )
        async with self._starting:
            if not self._started:
                await self._transport.open()
                await self._courier.start()
                self._started = True

    async def _allocate(self, ask: AllocationAsk, request_id: str) -> Allocation:
        deadline = Deadline.after(self._timeout)
        request = wire.allocate_request(self._run_id, request_id, ask)
        try:
            await self._settle_waiting_rewind(deadline)
            await self._ensure_run(deadline)
            response = await self._with_run(wire.ALLOCATE, request, deadline)
            allocation = wire.to_allocation(response, ask)
        except Refused as error:
            raise InvalidRequest(str(error)) from None
        except NotFound as error:
            raise Unanswered(f"NOT_FOUND: {error}", unreachable=False) from None
        except wire.MalformedAnswer as error:
            raise Unanswered(str(error), unreachable=False) from None
        self._allocations.append(allocation.allocation_id)
        if not self._looked_behind:
            self._looked_behind = True
            await self._look_behind(ask.step, deadline)
        return allocation

    async def _look_behind(self, step: int, deadline: Deadline) -> None:
        """Tell if the run has been further than the first step asked for."""
        request = wire.get_run_request(self._run_id)
        try:
            run = wire.to_run(await self._caller.call(wire.GET_RUN, request, deadline))
        except (Refused, NotFound, Unanswered):
            return
        if run.last_step > step:
            self._emit(StepsBehind(self._run_id, step, run.last_step))

    async def _extend(
        self, allocation: Allocation, share: float, keep_outstanding: bool, request_id: str
    ) -> Allocation:
        deadline = Deadline.after(self._timeout)
        try:
            await self._settle_waiting_rewind(deadline)
            if self._courier.pending and not self._caller.is_down:
                await self._courier.flush(Deadline.after(self._timeout / 2))
            # Rollouts whose report is still queued have run and must not be given again.
            keep = keep_outstanding or self._courier.pending > 0
            request = wire.extend_request(
                self._run_id, request_id, allocation.allocation_id, share, keep
            )
            response = await self._caller.call(wire.EXTEND, request, deadline)
            return wire.to_extension(response, allocation)
        except Refused as error:
            if (
                error.code is grpc.StatusCode.FAILED_PRECONDITION
                and allocation.allocation_id in self._reported_nothing
            ):
                # Everything of the first wave was lost; that is no mistake of the caller.
                raise Unanswered(str(error), unreachable=False) from None
            raise InvalidRequest(str(error)) from None
        except NotFound as error:
            raise Unanswered(f"NOT_FOUND: {error}", unreachable=False) from None
        except wire.MalformedAnswer as error:
            raise Unanswered(str(error), unreachable=False) from None

    async def _deliver(
        self, parcel: wire.Parcel, deadline: Deadline, patient: bool = False
    ) -> ReportReceipt:
        """Deliver a report, as that of an unknown allocation if need be."""
        if not patient:
            await self._settle_waiting_rewind(deadline)
        for attempt, request in enumerate(parcel.requests()):
            try:
                answer = await self._with_run(wire.REPORT, request, deadline, patient)
                return wire.to_receipt(parcel.report_id, answer)
            except NotFound:
                continue
            except Refused as error:
                if attempt and error.code is grpc.StatusCode.ALREADY_EXISTS:
                    # Recorded under this id in the other form.
                    return ReportReceipt(parcel.report_id, delivered=True)
                raise
        raise Unanswered("NOT_FOUND: the run cannot be found or created", unreachable=False)

    async def _deliver_patiently(self, parcel: wire.Parcel, deadline: Deadline) -> ReportReceipt:
        return await self._deliver(parcel, deadline, patient=True)

    async def _settle_waiting_rewind(self, deadline: Deadline) -> None:
        rewind = self._courier.waiting_rewind
        if rewind is not None:
            await self._courier.deliver_rewind(rewind, deadline)

    async def _rewind_now(
        self, rewind: WaitingRewind, deadline: Deadline, patient: bool = True
    ) -> Run:
        request = wire.rewind_request(self._run_id, rewind.request_id, rewind.step)
        try:
            return wire.to_run(await self._with_run(wire.REWIND_RUN, request, deadline, patient))
        except NotFound as error:
            raise Unanswered(f"NOT_FOUND: {error}", unreachable=False) from None

    async def _probe(self, deadline: Deadline) -> None:
        request = wire.get_run_request(self._run_id)
        await self._caller.call(wire.GET_RUN, request, deadline, patient=True)

    async def _with_run(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        deadline: Deadline,
        patient: bool = False,
    ) -> ResponseT:
        """Return the answer, after creating the run if it is unknown."""
        try:
            return await self._caller.call(method, request, deadline, patient=patient)
        except NotFound:
            await self._create_run(deadline, patient)
            self._looked_behind = True
            self._emit(RunCreated(self._run_id))
        return await self._caller.call(method, request, deadline, patient=patient)

    async def _ensure_run(self, deadline: Deadline) -> None:
        """Compare the run with the client's config, once."""
        if self._config is not None and not self._run_ensured:
            await self._create_run(deadline)

    async def _create_run(self, deadline: Deadline, patient: bool = False) -> None:
        request = wire.create_run_request(self._run_id, self._config)
        try:
            await self._caller.call(wire.CREATE_RUN, request, deadline, patient=patient)
        except Refused as error:
            if error.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise
            if self._config is not None:
                self._conflict(error)
        self._run_ensured = True

    def _conflict(self, error: Refused) -> NoReturn:
        if self._run_ensured:
            # It was ours once and is another's now: no reason to stop training.
            raise Unanswered(f"ALREADY_EXISTS: {error}", unreachable=False)
        raise RunConfigConflict(f"{error}; use that config, none, or another run_id")

    def _give_up(self, call: str, failure: Unanswered) -> None:
        self._emit(CallFailed(call, failure.reason, failure.unreachable, failure.denied))
        if self._raises:
            raise SchedulerUnavailable(f"{self._transport.target}: {call}: {failure}") from None

    def _made(self, allocation: Allocation, begun: float) -> Allocation:
        self._emit(
            AllocationMade(
                allocation.step,
                allocation.wave,
                allocation.allocated_rollouts,
                allocation.is_fallback,
                time.monotonic() - begun,
            )
        )
        return allocation

    def _check_allocation(self, allocation: Allocation) -> None:
        if not isinstance(allocation, Allocation):
            raise refused("allocation", allocation, "must be what allocate or extend returned")
        if allocation.run_id != self._run_id:
            raise refused(
                "allocation.run_id", allocation.run_id, f"must be the client's, {self._run_id!r}"
            )

    @property
    def _tokens_per_rollout(self) -> float:
        if not self._lengths_reported:
            return 0.0
        return self._tokens_reported / self._lengths_reported

    def _outbox_path(self, outbox: str | os.PathLike[str] | bool | None) -> Path | None:
        if outbox is False:
            return None
        if outbox is None:
            try:
                return default_path(self._transport.target, self._run_id)
            except RuntimeError as error:
                self._emit(OutboxFailed("default", str(error)))
                return None
        if not isinstance(outbox, str | os.PathLike) or not os.fspath(outbox):
            raise refused("outbox", outbox, "must be a path, None or False")
        return Path(outbox)


def _new_id() -> str:
    return uuid.uuid4().hex

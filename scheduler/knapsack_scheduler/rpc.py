"""The service as gRPC: the calls, and the one place where errors become status.

Every method takes raw bytes as they come: a call is authenticated before its message is
read, the message is read when there is room for it, and what cannot be parsed is the
caller's fault and not an internal error.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.admission import GRACE_SECONDS, PATIENCE_SECONDS, Admission, Ticket
from knapsack_scheduler.errors import InvalidArgument, ResourceExhausted, SchedulerError
from knapsack_scheduler.events import CallBegun, CallHandled
from knapsack_scheduler.hangup import hang_up
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.logs import REQUEST_ID
from knapsack_scheduler.memory import give_back
from knapsack_scheduler.pages import page_size
from knapsack_scheduler.protection import protected, tell_of_unheard
from knapsack_scheduler.security import EVERYBODY, Caller, TokenGuard
from knapsack_scheduler.service import LARGEST_PAGE_BYTES, SchedulerService
from knapsack_scheduler.wire import ImportStream

_LOG = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["BudgetScheduler"]
REQUEST_ID_KEY = "x-request-id"
PENDING_REPORTS_KEY = "x-knapsack-pending-reports"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_PENDING_REPORTS = re.compile(r"[0-9]{1,9}")
_LONGEST_ID = 256
"""Characters of a refused call's ids that are kept for its line in the log."""
_PROMPT_BYTES = 4 * 1024 + 80
_RUN_BYTES = 2048
_EXTENSION_BYTES = 2**20
"""More than the numbers of the prompts of any allocation take."""
_IMPORT_FACTOR = 3
"""An import is in memory as messages, as the parts of its entry and as the entry."""


class SchedulerServicer:
    """Hands calls to the service.

    Args:
        service: what answers.
        limits: of the server.
        guard: refuses those without a right to their calls; None for no tokens.
    """

    def __init__(
        self, service: SchedulerService, limits: Limits, guard: TokenGuard | None = None
    ) -> None:
        self._service = service
        self._limits = limits
        self._guard = guard
        self._calls = Admission(limits.inflight_bytes)
        # Of their own, so that a stream that trickles takes no room from other calls.
        self._import_bytes = _IMPORT_FACTOR * limits.import_bytes + limits.receiving_bytes
        self._imports = Admission(limits.imports * self._import_bytes)
        self._large = asyncio.Semaphore(limits.large_calls)
        self._parsing = asyncio.Lock()
        self._work: set[asyncio.Task[Message]] = set()
        self._under_way = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve the contract's methods on a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in SERVICE.methods:
            # On the wire a unary call is a stream of one message. Only what is received
            # message by message can be kept within bounds.
            handlers[method.name] = grpc.stream_unary_rpc_method_handler(self._handler(method.name))
        generic = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
        server.add_generic_rpc_handlers((generic,))

    @property
    def used_bytes(self) -> int:
        """Bytes of requests and answers in memory, or kept free for them; no imports."""
        return self._calls.used

    async def settled(self) -> None:
        """Wait for work whose callers have gone."""
        while self._work:
            await asyncio.wait(self._work)

    def _handler(self, method: str) -> Callable[[Any, Any], Any]:
        async def handle(_messages: object, context: Any) -> bytes:
            call = _Call(method, context, self._service)
            try:
                self._count()
                caller = call.caller(self._guard)
                if method == "ImportOutcomes":
                    answer = await self._import(call, caller)
                else:
                    answer = await self._unary(call, caller, _REQUESTS[method])
                call.code = "OK"
                return answer
            except SchedulerError as error:
                call.code, call.message = error.code, str(error)
                _without_frames(error)
                await call.abort()
            except asyncio.CancelledError:
                call.code = "CANCELLED"
                raise
            except Exception:
                call.code, call.message = "INTERNAL", "the scheduler failed; its log says why"
                _LOG.exception("%s failed", method)
                await call.abort()
            finally:
                # The answer goes first: whoever listens takes some of its time.
                asyncio.get_running_loop().call_soon(call.handled, time.perf_counter())

        return handle

    def _count(self) -> None:
        """Count the call until its answer is taken; ResourceExhausted if there are too many."""
        task = asyncio.current_task()
        assert task is not None
        self._under_way += 1
        task.add_done_callback(self._ended)
        most = self._limits.concurrent_calls
        if self._under_way > most:
            raise ResourceExhausted(
                f"{most} calls are under way, which is as many as are served at once; try again"
            )

    def _ended(self, _call: object) -> None:
        self._under_way -= 1

    def _deliver(self, ticket: Ticket, call: _Call) -> None:
        """Keep the room of an answer, and its place among the calls, no longer than is fair."""
        loop = asyncio.get_running_loop()
        is_crowded = 2 * self._under_way > self._limits.concurrent_calls
        ticket.deliver(
            GRACE_SECONDS if is_crowded else self._limits.transfer_seconds,
            lambda: loop.run_in_executor(None, _hang_up, call.context.peer()),
        )

    async def _unary(self, call: _Call, caller: Caller, kind: type[Message]) -> bytes:
        ticket = await self._admitted(self._calls, self._limits.receiving_bytes, call)
        task = None
        is_answered = False
        try:
            async with ticket.transfer(
                self._limits.transfer_seconds, "the request did not arrive whole"
            ):
                data = await call.context.read()
            if data is grpc.aio.EOF:
                # A larger one was refused by gRPC, which leaves nothing of it to read.
                most = self._limits.message_bytes
                raise InvalidArgument("request", "", f"must be one message of up to {most} bytes")
            large = len(data) > self._limits.large_bytes
            if large:
                ticket.resize(len(data))
                work = self._answer_large(call, caller, kind, data)
            else:
                request = self._checked(call, caller, kind, data)
                # Room for the answer is kept of what receiving took, and not asked for anew.
                size = len(data) + _answer_bytes(request)
                ticket.resize(min(size, self._limits.receiving_bytes))
                work = self._answer(call.method, request, caller)
            del data
            task = self._begin(work, ticket, large=large)
            answer = (await asyncio.shield(task)).SerializeToString()
            # Never more than was kept for it: what is done is not refused.
            ticket.resize(min(len(answer), ticket.size))
            self._deliver(ticket, call)
            is_answered = True
            return answer
        finally:
            if not is_answered:
                _leave(ticket, task)

    def _checked(self, call: _Call, caller: Caller, kind: type[Message], data: bytes) -> Any:
        request = call.about(_parsed(kind, data, self._limits))
        caller.check(getattr(request, "run_id", ""))
        return request

    async def _answer_large(
        self, call: _Call, caller: Caller, kind: type[Message], data: bytes
    ) -> Message:
        """Return the answer to a large request, which is parsed when it is its turn."""
        async with self._large:
            await self._parsing.acquire()
            loop = asyncio.get_running_loop()
            begun = loop.time()
            try:
                request = self._checked(call, caller, kind, data)
            finally:
                # Nothing else runs while a message is parsed. As long again is for the others,
                # or health checks would wait for large calls however many there are.
                loop.call_later(loop.time() - begun, self._parsing.release)
            del data
            return await self._ask(call.method, request, caller)

    async def _answer(self, method: str, request: Any, caller: Caller) -> Message:
        async with self._large if _answer_bytes(request) >= LARGEST_PAGE_BYTES else nullcontext():
            return await self._ask(method, request, caller)

    async def _import(self, call: _Call, caller: Caller) -> bytes:
        limits = self._limits
        ticket = await self._admitted(self._imports, self._import_bytes, call)
        task = None
        is_answered = False

        async def messages() -> AsyncIterator[pb.ImportOutcomesRequest]:
            is_first = True
            while True:
                async with ticket.transfer(
                    limits.transfer_seconds, "the next message of the stream did not arrive"
                ):
                    data = await call.context.read()
                if data is grpc.aio.EOF:
                    return
                if len(data) > limits.import_message_bytes:
                    raise ResourceExhausted(
                        f"a message of an import may hold {limits.import_message_bytes} bytes, "
                        f"this one has {len(data)}; send more messages in the stream"
                    )
                message = _parsed(pb.ImportOutcomesRequest, data, limits)
                if is_first:
                    is_first = False
                    call.about(message)
                    caller.check(message.run_id)
                yield message

        try:
            received = await self._service.receive_outcomes(messages())
            ticket.resize(_IMPORT_FACTOR * received.size)
            large = received.size > limits.large_bytes
            task = self._begin(self._apply(received, large), ticket, large=large)
            answer = (await asyncio.shield(task)).SerializeToString()
            ticket.resize(len(answer))
            self._deliver(ticket, call)
            is_answered = True
            return answer
        finally:
            if not is_answered:
                _leave(ticket, task)

    async def _apply(self, received: ImportStream, large: bool) -> Message:
        async with self._large if large else nullcontext():
            return await self._service.import_received(received)

    async def _admitted(self, admission: Admission, size: int, call: _Call) -> Ticket:
        left = call.context.time_remaining()
        patience = PATIENCE_SECONDS if left is None else min(left, PATIENCE_SECONDS)
        return await admission.admit(size, call.context.peer(), patience)

    def _begin(self, work: Any, ticket: Ticket, *, large: bool = False) -> asyncio.Task[Message]:
        """Start work that goes on when its caller goes away, and holds its room until then."""
        task: asyncio.Task[Message] = protected(work)
        self._work.add(task)

        def done(_task: object) -> None:
            self._work.discard(task)
            if ticket.abandoned:
                ticket.close()
                if not task.cancelled() and (error := task.exception()):
                    tell_of_unheard(error)
            if large:
                asyncio.get_running_loop().run_in_executor(None, give_back)

        task.add_done_callback(done)
        return task

    async def _ask(self, method: str, request: Any, caller: Caller) -> Message:
        service = self._service
        match method:
            case "CreateRun":
                return await service.create_run(request)
            case "GetRun":
                return await service.get_run(request)
            case "ListRuns":
                return await service.list_runs(request, caller.covers)
            case "DeleteRun":
                return await service.delete_run(request)
            case "Allocate":
                return await service.allocate(request)
            case "Extend":
                return await service.extend(request)
            case "Report":
                return await service.report(request)
            case "RewindRun":
                return await service.rewind_run(request)
            case "ListPromptStats":
                return await service.list_prompt_stats(request)
        raise AssertionError(f"{method} has no handler")


def _leave(ticket: Ticket, task: asyncio.Task[Message] | None) -> None:
    """Give a call's room back, now or when its work is done."""
    if task is None or task.done():
        ticket.close()
    else:
        ticket.abandoned = True


def _hang_up(peer: str) -> None:
    """End a connection, and with it what its answers take."""
    if hang_up(peer):
        give_back()


_REQUESTS: dict[str, type[Message]] = {
    "CreateRun": pb.CreateRunRequest,
    "GetRun": pb.GetRunRequest,
    "ListRuns": pb.ListRunsRequest,
    "DeleteRun": pb.DeleteRunRequest,
    "Allocate": pb.AllocateRequest,
    "Extend": pb.ExtendRequest,
    "Report": pb.ReportRequest,
    "RewindRun": pb.RewindRunRequest,
    "ListPromptStats": pb.ListPromptStatsRequest,
}


class _Call:
    """One call: what is known of it, for its refusal and for its event."""

    def __init__(self, method: str, context: Any, service: SchedulerService) -> None:
        self.method = method
        self.context = context
        self._about = ("", "")
        self.code, self.message = "UNKNOWN", ""
        self._events = service.events
        self._start = time.perf_counter()
        self._metadata = dict(context.invocation_metadata() or ())
        given = str(self._metadata.get(REQUEST_ID_KEY, ""))
        self._is_theirs = _REQUEST_ID.fullmatch(given) is not None
        self._id = given if self._is_theirs else uuid.uuid4().hex[:16]
        REQUEST_ID.set(self._id)
        self._events.emit(CallBegun(method, self._id, self._metadata))

    def caller(self, guard: TokenGuard | None) -> Caller:
        """Return who calls; Unauthenticated for nobody."""
        return guard.caller(self._metadata) if guard else EVERYBODY

    def about(self, request: Any) -> Any:
        """Note what the call is about; returns its request."""
        call_id = getattr(request, "request_id", "") or getattr(request, "report_id", "")
        self._about = (getattr(request, "run_id", "")[:_LONGEST_ID], call_id[:_LONGEST_ID])
        return request

    async def abort(self) -> NoReturn:
        """End the call with its status; raises, so that no handler goes on."""
        message = self.message
        if self._is_theirs or self.code in ("INTERNAL", "UNAVAILABLE"):
            message += f" ({REQUEST_ID_KEY} {self._id})"
        trailer = ((REQUEST_ID_KEY, self._id),)
        await self.context.abort(grpc.StatusCode[self.code], message, trailer)
        raise AssertionError("unreachable: abort raises")

    def _pending_reports(self) -> int | None:
        """Return what the caller says of its outbox; what is no number is nothing."""
        said = str(self._metadata.get(PENDING_REPORTS_KEY, ""))
        return int(said) if _PENDING_REPORTS.fullmatch(said) else None

    def handled(self, end: float) -> None:
        """Tell how it ended, at a time of ``time.perf_counter``."""
        self._events.emit(
            CallHandled(
                self.method,
                self.code,
                end - self._start,
                *self._about,
                self.message,
                self._id,
                self._pending_reports(),
            )
        )


def _without_frames(error: BaseException) -> None:
    """Let go of the frames that an error passed.

    They hold the request, and tasks among them hold the error: until the garbage collector
    finds the circle, hundreds of megabytes could hang on a refusal.
    """
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__context__


def _parsed(kind: type[Message], data: bytes, limits: Limits) -> Any:
    """Return a message none of whose fields is longer than any call's may be.

    Short elements take twenty times their size once parsed. On the event loop, where no two
    are parsed at once, only one message ever takes that.
    """
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise InvalidArgument(
            "request", f"{len(data)} bytes", f"must be a serialised {kind.DESCRIPTOR.name}"
        ) from None
    if len(data) > limits.large_bytes:
        for field in kind.DESCRIPTOR.fields:
            if field.is_repeated:
                count = len(getattr(message, field.name))
                by_rollout = field.name in ("rewards", "completion_tokens")
                most = limits.total_rollouts if by_rollout else limits.prompts
                if count > most:
                    raise InvalidArgument(
                        field.name, f"{count} values", f"must be at most {most} in one call"
                    )
    return message


def _answer_bytes(request: Message) -> int:
    """Return at most how many bytes an answer will have beyond those of its request."""
    if isinstance(request, pb.ListPromptStatsRequest):
        size = page_size(request.page_size, 1000, 100_000)
        return min(size * _PROMPT_BYTES, LARGEST_PAGE_BYTES)
    if isinstance(request, pb.ListRunsRequest):
        return page_size(request.page_size, 100, 1000) * _RUN_BYTES
    return _EXTENSION_BYTES if isinstance(request, pb.ExtendRequest) else _RUN_BYTES

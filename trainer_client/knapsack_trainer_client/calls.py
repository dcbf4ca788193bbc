"""One call to the scheduler: its deadline, its retries, and what its status means.

A call ends in an answer, or as ``Refused``, ``NotFound``, ``AccessDenied`` or
``Unanswered``, for which there is a fallback. Nothing else gets out.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from knapsack_trainer_client.breaker import Breaker
from knapsack_trainer_client.errors import AccessDenied
from knapsack_trainer_client.events import CallRetried, Event, SchedulerBack, SchedulerLost
from knapsack_trainer_client.transport import (
    Method,
    RequestT,
    ResponseT,
    StatusError,
    Transport,
)

PROBE_SECONDS = 0.25
"""Longest wait of a call while the scheduler is known to be down."""

_Code = grpc.StatusCode
_RETRIED = frozenset({_Code.UNAVAILABLE, _Code.ABORTED, _Code.CANCELLED})
_SILENT = _RETRIED | {_Code.DEADLINE_EXCEEDED}
_REFUSED = frozenset(
    {
        _Code.INVALID_ARGUMENT,
        _Code.ALREADY_EXISTS,
        _Code.OUT_OF_RANGE,
        _Code.FAILED_PRECONDITION,
    }
)
_DENIED = frozenset({_Code.UNAUTHENTICATED, _Code.PERMISSION_DENIED})


class Unanswered(Exception):
    """A call without a usable answer.

    Attributes:
        reason: status and message.
        unreachable: nobody answered, as against an answer that was a failure.
        denied: the token or certificate is no longer accepted.
    """

    def __init__(self, reason: str, unreachable: bool, denied: bool = False) -> None:
        self.reason = reason
        self.unreachable = unreachable
        self.denied = denied
        super().__init__(reason)


class NotFound(Exception):
    """The run or the allocation is unknown to the scheduler."""


class Refused(Exception):
    """The call is wrong, whenever it is made.

    Attributes:
        code: the status, one of INVALID_ARGUMENT, ALREADY_EXISTS, OUT_OF_RANGE and
            FAILED_PRECONDITION.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Deadline:
    """The end of a call's time, on the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds left, possibly below 0."""
        return self.at - time.monotonic()


class Caller:
    """Makes calls, and knows whether the scheduler is down."""

    def __init__(
        self,
        transport: Transport,
        emit: Callable[[Event], None],
        pending_reports: Callable[[], int],
        on_news: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._emit = emit
        self._pending_reports = pending_reports
        # Told of a loss and of every answer, but not of patient calls, which are made by
        # whoever would act on it.
        self._on_news = on_news
        self._breaker = Breaker()
        self._accepted = False

    @property
    def is_down(self) -> bool:
        """Whether the scheduler is known to be down."""
        return self._breaker.is_open

    async def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        deadline: Deadline,
        *,
        patient: bool = False,
    ) -> ResponseT:
        """Return the answer, trying again until the deadline where nobody answers.

        While the scheduler is known to be down there is one short attempt; ``patient``
        gives it the whole time, for those that nobody waits for.

        Raises:
            Refused: the call is wrong.
            AccessDenied: it does not accept the caller and never did.
            NotFound: the run or allocation is unknown.
            Unanswered: anything else.
        """
        once = self._breaker.is_open
        if once and not patient:
            deadline = Deadline(min(deadline.at, Deadline.after(PROBE_SECONDS).at))
        pause = 0.05
        while True:
            try:
                # A deadline that has just passed still gets its one attempt.
                answer = await self._transport.call(method, request, max(deadline.left, 0.001))
            except StatusError as failure:
                wait = pause * random.uniform(0.5, 1.0)
                if once or failure.code not in _RETRIED or deadline.left <= wait:
                    self._settle(method.name, failure, patient)
                    raise self._verdict(failure) from None
                self._emit(CallRetried(method.name, str(failure)))
                await asyncio.sleep(wait)
                pause = min(pause * 2, 0.4)
            else:
                self._accepted = True
                self._answered(patient)
                return answer

    def _settle(self, call: str, failure: StatusError, patient: bool) -> None:
        if failure.code in _SILENT:
            if self._breaker.silent(time.monotonic()):
                self._emit(SchedulerLost(call, str(failure)))
                self._on_news()
        elif failure.code in _REFUSED or failure.code is _Code.NOT_FOUND:
            self._accepted = True
            self._answered(patient)

    def _answered(self, patient: bool) -> None:
        seconds = self._breaker.answered(time.monotonic())
        if seconds is not None:
            self._emit(SchedulerBack(seconds, self._pending_reports()))
        if not patient:
            self._on_news()

    def _verdict(self, failure: StatusError) -> Exception:
        if failure.code in _REFUSED:
            return Refused(failure.code, failure.message or failure.code.name)
        if failure.code is _Code.NOT_FOUND:
            return NotFound(failure.message)
        if failure.code in _DENIED:
            if not self._accepted:
                return AccessDenied(f"{self._transport.target}: {failure}")
            return Unanswered(str(failure), unreachable=False, denied=True)
        return Unanswered(str(failure), unreachable=failure.code in _SILENT)

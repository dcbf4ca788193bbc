"""The scheduler in this process: the same calls without a server or a socket.

The only file of the client that imports the scheduler, and only when it is used.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import grpc

from knapsack_trainer_client.errors import (
    ExtraMissing,
    InvalidRequest,
    KnapsackError,
    refused,
)
from knapsack_trainer_client.transport import Method, RequestT, ResponseT, StatusError

if TYPE_CHECKING:
    from knapsack_scheduler.service import SchedulerService


_HANDLERS = {
    "CreateRun": "create_run",
    "GetRun": "get_run",
    "ListRuns": "list_runs",
    "Allocate": "allocate",
    "Extend": "extend",
    "Report": "report",
    "RewindRun": "rewind_run",
    "ListPromptStats": "list_prompt_stats",
}


class EmbeddedTransport:
    """Calls to a scheduler in this process, in the event loop of the client."""

    def __init__(self, store: str | os.PathLike[str]) -> None:
        if not isinstance(store, str | os.PathLike) or not os.fspath(store):
            raise refused("store", store, "must be a file or a store URL")
        path = os.fspath(store)
        # The outbox of a store is found again from another working directory.
        self._store_url = path if "://" in path else f"sqlite:///{os.path.abspath(path)}"
        self._service: SchedulerService | None = None
        self._serving: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()

    @property
    def target(self) -> str:
        """The store."""
        return self._store_url

    async def open(self) -> None:
        """Open the store.

        Raises:
            ExtraMissing: the scheduler is not installed.
            InvalidRequest: the store cannot be opened, or another process has it.
        """
        ready: asyncio.Future[SchedulerService] = asyncio.get_running_loop().create_future()
        self._leave.clear()
        self._serving = asyncio.create_task(self._serve(ready), name="knapsack-rl-embedded")
        self._service = await ready

    async def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout: float
    ) -> ResponseT:
        """Return the scheduler's answer, or raise ``StatusError`` within ``timeout`` s."""
        from knapsack_scheduler.errors import SchedulerError

        if self._service is None:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the store is closed")
        handler: Any = getattr(self._service, _HANDLERS[method.name])
        try:
            async with asyncio.timeout(timeout):
                answer: ResponseT = await handler(request)
                return answer
        except TimeoutError:
            raise StatusError(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer in {timeout:.1f} s"
            ) from None
        except SchedulerError as error:
            raise StatusError(grpc.StatusCode[error.code], str(error)) from error
        except Exception as error:
            raise StatusError(grpc.StatusCode.INTERNAL, repr(error)) from error

    async def close(self) -> None:
        """Close the store."""
        self._service = None
        serving, self._serving = self._serving, None
        if serving is not None:
            self._leave.set()
            try:
                await serving
            except RuntimeError:
                # A process that ends starts no more threads. What was answered is in the
                # store, and its lock ends with the process.
                if threading.main_thread().is_alive():
                    raise

    async def _serve(self, ready: asyncio.Future[SchedulerService]) -> None:
        # One task enters and leaves the service, because it may hold tasks of its own.
        try:
            async with _open_service(self._store_url) as service:
                ready.set_result(service)
                await self._leave.wait()
        except Exception as error:
            if ready.done():
                raise
            ready.set_exception(_open_error(error))


def _open_service(store_url: str) -> AbstractAsyncContextManager[SchedulerService]:
    try:
        from knapsack_scheduler.embedded import open_service
    except ImportError as error:
        raise ExtraMissing(
            "the embedded scheduler needs more packages: pip install 'knapsack-rl[scheduler]' "
            f"({error})"
        ) from error
    return open_service(store_url, auto_create_runs=True)


def _open_error(error: Exception) -> Exception:
    if isinstance(error, KnapsackError):
        return error
    from knapsack_scheduler.errors import ConfigError

    return InvalidRequest(str(error)) if isinstance(error, ConfigError) else error

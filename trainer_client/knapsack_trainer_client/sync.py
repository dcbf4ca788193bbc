"""The client for code that is not asynchronous: ``AsyncBudgetClient`` on a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError
from typing import Any, Literal, NoReturn, Self, TypeVar

from knapsack_trainer_client.client import AsyncBudgetClient, OnUnavailable
from knapsack_trainer_client.closing import Closing
from knapsack_trainer_client.errors import ClientMisuse
from knapsack_trainer_client.events import Event
from knapsack_trainer_client.nouns import (
    TLS,
    Allocation,
    PromptStats,
    ReportReceipt,
    Run,
    RunConfig,
)
from knapsack_trainer_client.outbox import Limits
from knapsack_trainer_client.telemetry import ClientStats
from knapsack_trainer_client.transport import Token

T = TypeVar("T")


class BudgetClient(Closing):
    """Asks a budget scheduler how many rollouts each prompt should get.

    The promises, arguments and errors are those of ``AsyncBudgetClient``, whose calls it
    runs on one background thread; queued reports are delivered there while the trainer
    trains. May be used from several threads, and from none of a forked child.

    ``close`` it, or use it in a ``with`` block; what is left open is closed when the
    process ends.
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
        self._start(
            AsyncBudgetClient(
                address,
                run_id,
                timeout=timeout,
                on_unavailable=on_unavailable,
                outbox=outbox,
                token=token,
                tls=tls,
                config=config,
                on_event=on_event,
                outbox_limits=outbox_limits,
            )
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

        Opens the store before it returns; see ``AsyncBudgetClient.embedded``.

        Raises:
            InvalidRequest: an argument is wrong, or the store cannot be opened.
            ExtraMissing: the scheduler is not installed.
        """
        client = cls.__new__(cls)
        client._start(
            AsyncBudgetClient.embedded(
                store,
                run_id,
                timeout=timeout,
                on_unavailable=on_unavailable,
                outbox=outbox,
                config=config,
                on_event=on_event,
                outbox_limits=outbox_limits,
            )
        )
        try:
            client._do(client._client.__aenter__())
        except BaseException:
            client.close()
            raise
        return client

    def _start(self, client: AsyncBudgetClient) -> None:
        self._client = client
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_run_loop, args=(self._loop,), name="knapsack-rl", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(
            self, _shut_down, self._pid, self._loop, self._thread, client
        )

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self._client.run_id

    @property
    def pending_reports(self) -> int:
        """Reports of the run that wait in the outbox, as last seen."""
        return self._client.pending_reports

    def stats(self) -> ClientStats:
        """Return what was counted since the client was made."""
        return self._client.stats()

    def allocate(
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
        """Return how many rollouts to generate; see ``AsyncBudgetClient.allocate``."""
        return self._do(
            self._client.allocate(
                prompt_ids,
                total_rollouts,
                step,
                min_rollouts,
                max_rollouts,
                wave_fraction,
                allow_partial,
                request_id,
                total_tokens,
                waves,
            )
        )

    def extend(
        self,
        allocation: Allocation,
        wave_fraction: float = 0,
        *,
        keep_outstanding: bool = False,
        request_id: str | None = None,
    ) -> Allocation:
        """Return the next wave of an allocation; see ``AsyncBudgetClient.extend``."""
        return self._do(
            self._client.extend(
                allocation,
                wave_fraction,
                keep_outstanding=keep_outstanding,
                request_id=request_id,
            )
        )

    def report(
        self,
        allocation: Allocation,
        rewards: Iterable[Any],
        policy_version: int = 0,
        completion_tokens: Iterable[Any] | None = None,
        *,
        report_id: str | None = None,
    ) -> ReportReceipt:
        """Return a receipt for finished rollouts; see ``AsyncBudgetClient.report``."""
        return self._do(
            self._client.report(
                allocation, rewards, policy_version, completion_tokens, report_id=report_id
            )
        )

    def rewind(self, step: int) -> Run | None:
        """Forget what came after ``step``; see ``AsyncBudgetClient.rewind``."""
        return self._do(self._client.rewind(step))

    def prompt_stats(self) -> list[PromptStats]:
        """Return what is known of every prompt; see ``AsyncBudgetClient.prompt_stats``."""
        return self._do(self._client.prompt_stats())

    def run(self) -> Run:
        """Return the run and its progress; see ``AsyncBudgetClient.run``."""
        return self._do(self._client.run())

    def flush(self, timeout: float) -> bool:
        """Deliver what waits; return whether nothing waits any more."""
        return self._do(self._client.flush(timeout))

    def close(self) -> None:
        """Deliver what can be delivered within the timeout and let go of everything.

        What remains stays in the outbox for the next client of the run. A second call
        does nothing, nor does a call in a forked child.
        """
        self._finalizer()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a connection belongs to one process."""
        raise ClientMisuse("a client cannot be pickled; make one in the process that uses it")

    def _do(self, call: Coroutine[Any, Any, T]) -> T:
        if self._pid != os.getpid():
            call.close()
            raise ClientMisuse(
                "this client was made before a fork; make a new one in the child process"
            )
        if not self._finalizer.alive:
            call.close()
            raise ClientMisuse("this client is closed")
        if threading.current_thread() is self._thread:
            call.close()
            raise ClientMisuse("on_event must not call the client, which is waiting for it")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ClientMisuse("this client was closed during the call") from None
        except BaseException:
            # Also when the wait is interrupted from the keyboard.
            future.cancel()
            raise


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    # Calls of other threads must end, or those threads would wait for ever.
    calls = asyncio.all_tasks(loop)
    for call in calls:
        call.cancel()
    loop.run_until_complete(asyncio.gather(*calls, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _shut_down(
    pid: int,
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    client: AsyncBudgetClient,
) -> None:
    if pid != os.getpid() or loop.is_closed():
        return
    closing = asyncio.run_coroutine_threadsafe(client.close(), loop)
    if threading.current_thread() is thread:
        # The last reference was dropped in the loop itself, which cannot wait for itself.
        closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
        return
    try:
        closing.result()
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join()

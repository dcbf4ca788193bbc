"""Keeps what could not be delivered and delivers it later, in the background.

A waiting rewind goes before every report. Reports go in the order they were queued, but
one that fails by itself stands back and never holds up the others. Delivery is tried
again with a growing pause, at once when any call is answered, and now and then for
reports that another process of the run left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from knapsack_trainer_client.calls import Deadline, NotFound, Refused, Unanswered
from knapsack_trainer_client.errors import KnapsackError
from knapsack_trainer_client.events import (
    CallFailed,
    Event,
    OutboxFailed,
    ReportDelivered,
    ReportQueued,
    ReportRefused,
    ReportsDropped,
    RewindQueued,
)
from knapsack_trainer_client.outbox import (
    DiskOutbox,
    Limits,
    MemoryOutbox,
    Outbox,
    OutboxUnusable,
    WaitingRewind,
)
from knapsack_trainer_client.wire import Parcel
from knapsack_trainer_client.worker import Worker

T = TypeVar("T")

DISK_SECONDS = 2.0
"""Longest that anybody waits for the disk."""

_BATCH = 16
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 10.0
_LOOK_SECONDS = 30.0
"""How often to look for reports that another process left, in seconds."""

_STAND_BACK_SECONDS = 60.0
"""Pause of a report that failed although the scheduler answered, in seconds."""

_MEMORY_LIMITS = Limits(reports=20_000, bytes=2**28)


class Courier:
    """The outbox of one client and the task that empties it.

    Args:
        path: the outbox file; None for memory only.
        run_id: the run.
        limits: of the file.
        deliver: sends one report; raises what ``Caller.call`` raises.
        deliver_rewind: sends one rewind; raises the same.
        probe: asks whether the scheduler answers, while ``is_down`` says it does not;
            raises ``Unanswered``.
        is_down: whether the scheduler is known to be down.
        emit: takes events.
        noted: takes the number of waiting reports whenever it may have changed.
        timeout: of one delivery, in seconds.
    """

    def __init__(
        self,
        path: Path | None,
        run_id: str,
        limits: Limits,
        deliver: Callable[[Parcel, Deadline], Awaitable[object]],
        deliver_rewind: Callable[[WaitingRewind, Deadline], Awaitable[object]],
        probe: Callable[[Deadline], Awaitable[object]],
        is_down: Callable[[], bool],
        emit: Callable[[Event], None],
        noted: Callable[[int], None],
        timeout: float,
    ) -> None:
        self._path = path
        self._disk = None if path is None else DiskOutbox(path, run_id, limits)
        self._memory = MemoryOutbox(limits if path is None else _MEMORY_LIMITS)
        self._deliver = deliver
        self._deliver_rewind = deliver_rewind
        self._probe = probe
        self._is_down = is_down
        self._emit = emit
        self._noted = noted
        self._timeout = timeout
        self._worker = Worker("knapsack-rl-outbox")
        self._stuck: Future[Any] | None = None
        self._disk_failed = False
        self._pending = 0
        self._rewind: WaitingRewind | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._round_lock = asyncio.Lock()

    @property
    def pending(self) -> int:
        """Reports of the run that wait, as last seen."""
        return self._pending

    @property
    def in_memory(self) -> int:
        """Those of them that end with the process."""
        return self._memory.count()

    @property
    def waiting_rewind(self) -> WaitingRewind | None:
        """The rewind that must go before anything else, if any."""
        return self._rewind

    async def start(self) -> None:
        """Look at what earlier processes left, and begin to deliver."""
        await self._look()
        self._task = asyncio.create_task(self._run(), name="knapsack-rl-courier")

    async def stop(self) -> None:
        """Stop delivering; what waits on disk stays there."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._disk is not None:
            await self._do_in(self._disk, lambda box: box.close())
        self._worker.stop()

    def wake(self) -> None:
        """Deliver now what is due, or ask whether the scheduler is back."""
        if self._pending or self._rewind or self._is_down():
            self._wake.set()

    async def keep(self, parcel: Parcel) -> None:
        """Queue a report."""
        dropped = await self._do(lambda box: box.put(parcel))
        self._emit(ReportQueued(parcel.report_id, parcel.step, parcel.rollouts))
        if dropped:
            self._emit(ReportsDropped(dropped, "the outbox is full"))
        await self._look()
        self._wake.set()

    async def keep_rewind(self, rewind: WaitingRewind) -> None:
        """Queue a rewind."""
        await self._do(lambda box: box.put_rewind(rewind))
        self._emit(RewindQueued(rewind.step))
        await self._look()
        self._wake.set()

    async def drop_after(self, step: int) -> None:
        """Forget queued reports of later steps."""
        dropped = 0
        for box in self._boxes():
            dropped += await self._do_in(box, lambda box: box.drop_after(step)) or 0
        if dropped:
            self._emit(ReportsDropped(dropped, f"the run was rewound to step {step}"))
        await self._look()

    async def deliver_rewind(self, rewind: WaitingRewind, deadline: Deadline) -> None:
        """Deliver a queued rewind and forget it; raise what its delivery raises."""
        try:
            await self._deliver_rewind(rewind, deadline)
        except Refused as error:
            # It would be refused for ever, and nothing may be delivered before it.
            self._emit(CallFailed("RewindRun", str(error), unreachable=False, denied=False))
        for box in self._boxes():
            await self._do_in(box, lambda box: box.remove_rewind(rewind.request_id))
        await self._look()

    @contextlib.asynccontextmanager
    async def quiet(self, deadline: Deadline) -> AsyncIterator[None]:
        """Hold deliveries back; raise ``Unanswered`` if one does not end in time."""
        try:
            async with asyncio.timeout(deadline.left):
                await self._round_lock.acquire()
        except TimeoutError:
            raise Unanswered("a delivery is under way", unreachable=False) from None
        try:
            yield
        finally:
            self._round_lock.release()

    async def flush(self, deadline: Deadline) -> bool:
        """Deliver until nothing waits or the deadline; return whether nothing waits."""
        for box in self._boxes():
            await self._do_in(box, lambda box: box.make_due())
        await self._look()
        pause = 0.05
        while self._pending or self._rewind:
            if deadline.left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline.left):
                    if not await self.deliver_due():
                        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                        pause = min(pause * 2, 0.5)
        return True

    async def deliver_due(self) -> bool:
        """Deliver one batch of what is due; return whether any of it got through."""
        async with self._round_lock:
            try:
                moved = False
                if self._rewind is not None:
                    await self.deliver_rewind(self._rewind, Deadline.after(self._timeout))
                    moved = True
                for box in self._boxes():
                    parcels = await self._do_in(box, lambda box: box.claim(_BATCH)) or []
                    moved = await self._deliver_batch(box, parcels) or moved
                return moved
            except (Unanswered, Refused, NotFound, KnapsackError):
                return False
            finally:
                await self._look()

    async def _deliver_batch(self, box: Outbox, parcels: list[Parcel]) -> bool:
        """Deliver parcels of a box; raise ``Unanswered`` if nobody answers."""
        waiting = [p.report_id for p in parcels]
        done: list[str] = []
        try:
            for parcel in parcels:
                try:
                    await self._deliver(parcel, Deadline.after(self._timeout))
                except Refused as error:
                    waiting.remove(parcel.report_id)
                    await self._bury(box, parcel, str(error))
                except (Unanswered, NotFound, KnapsackError) as error:
                    if isinstance(error, Unanswered) and error.unreachable:
                        raise
                    waiting.remove(parcel.report_id)
                    await self._stand_back(box, parcel.report_id)
                else:
                    waiting.remove(parcel.report_id)
                    done.append(parcel.report_id)
                    self._emit(ReportDelivered(parcel.report_id, parcel.step, parcel.rollouts))
        finally:
            # Also when cancelled: what was delivered should not be delivered again.
            await asyncio.shield(self._hand_back(box, done, waiting))
        return bool(done)

    async def _bury(self, box: Outbox, parcel: Parcel, reason: str) -> None:
        await self._do_in(box, lambda box: box.bury(parcel.report_id, reason))
        self._emit(ReportRefused(parcel.report_id, parcel.step, parcel.rollouts, reason))

    async def _stand_back(self, box: Outbox, report_id: str) -> None:
        await self._do_in(box, lambda box: box.postpone([report_id], _STAND_BACK_SECONDS))

    async def _hand_back(self, box: Outbox, done: list[str], waiting: list[str]) -> None:
        if done:
            await self._do_in(box, lambda box: box.remove(done))
        if waiting:
            await self._do_in(box, lambda box: box.postpone(waiting, 0.0))

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            work = self._pending or self._rewind or self._is_down()
            pause = pause if work else _FIRST_PAUSE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    pause * random.uniform(0.5, 1.0) if work else _LOOK_SECONDS
                ):
                    await self._wake.wait()
            self._wake.clear()
            await self._look()
            moved = False
            if self._pending or self._rewind:
                moved = await self.deliver_due()
            elif self._is_down():
                with contextlib.suppress(Unanswered, Refused, NotFound, KnapsackError):
                    await self._probe(Deadline.after(self._timeout))
            if moved:
                self._wake.set()
                pause = _FIRST_PAUSE
            else:
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _look(self) -> None:
        """Count what waits, and find the earliest rewind."""
        counts = [await self._do_in(box, lambda box: box.count()) or 0 for box in self._boxes()]
        rewinds = [await self._do_in(box, lambda box: box.rewind()) for box in self._boxes()]
        self._pending = sum(counts)
        self._rewind = min((r for r in rewinds if r), key=lambda r: r.step, default=None)
        self._noted(self._pending)

    def _boxes(self) -> Iterator[Outbox]:
        yield self._memory
        if self._disk is not None:
            yield self._disk

    async def _do(self, action: Callable[[Outbox], T]) -> T:
        """Do it on disk, else in memory."""
        if self._disk is not None:
            try:
                return await self._on_disk(self._disk, action)
            except OutboxUnusable as error:
                self._disk_trouble(str(error))
        return action(self._memory)

    async def _do_in(self, box: Outbox, action: Callable[[Outbox], T]) -> T | None:
        """Do it in one box; None if that is a file that cannot be used."""
        if box is self._memory:
            return action(box)
        try:
            return await self._on_disk(box, action)
        except OutboxUnusable as error:
            self._disk_trouble(str(error))
            return None

    async def _on_disk(self, box: Outbox, action: Callable[[Outbox], T]) -> T:
        if self._stuck is not None and not self._stuck.done():
            raise OutboxUnusable("the disk does not answer")
        job = self._worker.submit(lambda: action(box))
        result = asyncio.wrap_future(job)
        # Nobody may be left to hear of a failure.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(DISK_SECONDS):
                answer = await asyncio.shield(result)
        except TimeoutError:
            self._stuck = job
            raise OutboxUnusable("the disk does not answer") from None
        self._disk_failed = False
        return answer

    def _disk_trouble(self, reason: str) -> None:
        if not self._disk_failed:
            self._disk_failed = True
            self._emit(OutboxFailed(str(self._path), reason))

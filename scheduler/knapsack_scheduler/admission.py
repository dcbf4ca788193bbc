"""How many bytes of requests and answers may be in memory at once.

A message is in memory from its first byte, and nobody knows its size before the last one.
So a call first reserves the largest message there may be, receives, and then keeps what it
really holds. Callers wait for room in turn, one of each connection after the other, and
those who are slow to send or to receive give way to those who wait.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from knapsack_scheduler.errors import ResourceExhausted, TooSlow

GRACE_SECONDS = 1.0
"""How long a slow caller may hold room that others wait for."""

_LOOK_SECONDS = 1.0

_BEAT_SECONDS = 0.1
"""How often it is looked who gives way: a look that comes late tells how long nobody was heard."""

PATIENCE_SECONDS = 10.0
"""How long a call waits for room before it is refused."""


class Ticket:
    """Room that a call has; ``close`` gives it back.

    Attributes:
        size: bytes.
        abandoned: the caller has gone; whoever works for it still closes the ticket.
        since: when the transfer under way began, on the loop's clock.
        give_way: ends the transfer under way.
    """

    __slots__ = ("_admission", "abandoned", "give_way", "since", "size")

    def __init__(self, admission: Admission, size: int) -> None:
        self._admission = admission
        self.size = size
        self.abandoned = False
        self.since = 0.0
        self.give_way: Callable[[], object] | None = None

    @asynccontextmanager
    async def transfer(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Let a block wait for the other side, but not for ever.

        Args:
            seconds: longest wait if nobody else needs the room.
            what: for the message, such as "the request did not arrive".

        Raises:
            TooSlow: it took too long.
        """
        loop = asyncio.get_running_loop()
        self.since = loop.time()
        try:
            async with asyncio.timeout(seconds) as scope:
                self.give_way = partial(_end, scope)
                self._admission.watch(self)
                yield
        except TimeoutError:
            waited = loop.time() - self.since
            raise TooSlow(
                f"{what} within {waited:.1f} s; the limit is {seconds:g} s, or "
                f"{GRACE_SECONDS:g} s while other calls wait"
            ) from None
        finally:
            self._admission.unwatch(self)
            self.give_way = None

    def deliver(self, seconds: float, hang_up: Callable[[], object]) -> None:
        """Keep the room until the call that is being answered has ended, then close.

        gRPC sends what a handler returns after it, and waits for the other side for ever.

        Args:
            seconds: longest wait if nobody else needs the room.
            hang_up: called if the answer is not taken in time, to a second; must make the call
                end.
        """
        call = asyncio.current_task()
        assert call is not None
        self.since = asyncio.get_running_loop().time()
        self.give_way = hang_up
        self._admission.watch(self)
        self._admission.expect(self, self.since + seconds)
        call.add_done_callback(self._delivered)

    def _delivered(self, _call: object) -> None:
        self._admission.unwatch(self)
        self.close()

    def resize(self, size: int) -> None:
        """Keep this much instead; ResourceExhausted if there is no room for more."""
        self._admission.resize(self, size)

    def close(self) -> None:
        """Give the room back. May be called twice."""
        self._admission.resize(self, 0)


def _end(scope: asyncio.Timeout) -> None:
    # One whose own limit has just passed ends by itself.
    if not scope.expired():
        scope.reschedule(asyncio.get_running_loop().time())


class Admission:
    """Room for a number of bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self._transfers: dict[Ticket, None] = {}
        self._deliveries: dict[Ticket, float] = {}
        self._looks_later = False
        self._timer: asyncio.TimerHandle | None = None
        self._next_look = 0.0

    async def admit(self, size: int, peer: str, patience: float = PATIENCE_SECONDS) -> Ticket:
        """Return room for ``size`` bytes, at most the capacity, after waiting in turn.

        Args:
            size: bytes.
            peer: connection of the caller; those who wait are served in turn.
            patience: longest wait, s.

        Raises:
            ResourceExhausted: no room in time.
        """
        if not self._waiting and self.used + size <= self.capacity:
            self.used += size
            return Ticket(self, size)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, deque()).append((size, turn))
        try:
            self._make_room()
            async with asyncio.timeout(patience):
                await turn
        except BaseException as error:
            self._leave(peer, size, turn)
            if not isinstance(error, TimeoutError):
                raise
            raise ResourceExhausted(
                f"the server holds {self.used} of {self.capacity} bytes of requests and answers, "
                f"and had no room for this call within {patience:.1f} s; try again"
            ) from None
        return Ticket(self, size)

    def _leave(self, peer: str, size: int, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self.used -= size
        elif (size, turn) in (queue := self._waiting.get(peer, deque())):
            queue.remove((size, turn))
            if not queue:
                del self._waiting[peer]
        self._let_in()

    def resize(self, ticket: Ticket, size: int) -> None:
        """Change what a ticket holds; see ``Ticket.resize``."""
        more = size - ticket.size
        if more > 0 and self.used + more > self.capacity:
            raise ResourceExhausted(
                f"the server holds {self.used} of {self.capacity} bytes of requests and answers; "
                "try again later, or with less at once"
            )
        self.used += more
        ticket.size = size
        if more < 0:
            self._let_in()

    def watch(self, ticket: Ticket) -> None:
        """Note that a ticket waits for the other side of its call."""
        self._transfers[ticket] = None
        if self._waiting and self._timer is None:
            self._make_room()

    def unwatch(self, ticket: Ticket) -> None:
        """Note that it waits no longer."""
        self._transfers.pop(ticket, None)
        self._deliveries.pop(ticket, None)

    def expect(self, ticket: Ticket, due: float) -> None:
        """End a transfer that is not over by then, on the loop's clock.

        Looked at once a second: a timer for every answer would cost more than the answer's room.
        """
        self._deliveries[ticket] = due
        if not self._looks_later:
            self._looks_later = True
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._end_overdue)

    def _end_overdue(self) -> None:
        loop = asyncio.get_running_loop()
        overdue = [ticket for ticket, due in self._deliveries.items() if due <= loop.time()]
        for ticket in overdue:
            self.unwatch(ticket)
            if ticket.give_way is not None:
                ticket.give_way()
        self._looks_later = bool(self._deliveries)
        if self._looks_later:
            loop.call_later(_LOOK_SECONDS, self._end_overdue)

    def _let_in(self) -> None:
        while self._waiting:
            peer, queue = next(iter(self._waiting.items()))
            size, turn = queue[0]
            if self.used + size > self.capacity:
                break
            queue.popleft()
            self._waiting.move_to_end(peer)
            if not queue:
                del self._waiting[peer]
            # Its caller may have gone, and not have been told so yet.
            if not turn.done():
                self.used += size
                turn.set_result(None)

    def _make_room(self) -> None:
        """End the oldest transfer once it is past its grace, as long as somebody waits.

        Time in which the event loop was held up counts against nobody: what they sent lies
        there unread.
        """
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            late = loop.time() - self._next_look
            if late > _BEAT_SECONDS:
                for ticket in self._transfers:
                    ticket.since += late
        if not self._waiting or not self._transfers:
            return
        oldest = next(iter(self._transfers))
        due = oldest.since + GRACE_SECONDS
        if due <= loop.time():
            self.unwatch(oldest)
            if oldest.give_way is not None:
                oldest.give_way()
            due = loop.time()
        # Looks again while somebody waits; the next one may be past its grace already.
        soon = loop.time() + 0.01
        self._next_look = max(min(due, loop.time() + _BEAT_SECONDS), soon)
        self._timer = loop.call_at(self._next_look, self._make_room)

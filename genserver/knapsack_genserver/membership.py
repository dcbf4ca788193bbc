"""Which replicas a pool has, how many it should have, and who leaves when it has too many."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

from knapsack_genserver.engine import Engine, ReplicaState, ReplicaStatus
from knapsack_genserver.errors import FailedPrecondition, Unavailable
from knapsack_genserver.member import Member, PoolOptions

_LOG = logging.getLogger(__name__)


@runtime_checkable
class Placed(Protocol):
    """An engine that can say where it runs, or what it waits for."""

    @property
    def place(self) -> str:
        """Where it runs, such as a host and a process, or an address; empty if nowhere."""

    @property
    def waits_for(self) -> str:
        """What its start waits for; empty for nothing but itself."""


class Membership:
    """See the module.

    Args:
        options: of the pool.
        make: returns an engine for one more replica, not started; None if only ``add``
            brings any.
        admit: called when an engine has started; its replica serves when it returns.
        retire: called when a replica is to be given nothing more.

    Attributes:
        wanted: how many replicas there should be.
    """

    def __init__(
        self,
        options: PoolOptions,
        make: Callable[[], Engine] | None,
        admit: Callable[[Member], Awaitable[None]],
        retire: Callable[[Member], None],
    ) -> None:
        self._options = options
        self._make = make
        self._admit = admit
        self._retire = retire
        self._numbers = itertools.count(1)
        self._members: dict[int, Member] = {}
        # Those that leave, each with what sees it out.
        self._leaving: dict[Member, asyncio.Task[None]] = {}
        self._closing = False
        self._losses_of_gone = 0
        self.wanted = 0

    def __iter__(self) -> itertools.chain[Member]:
        """Those that are to stay and then those that leave, each oldest first."""
        return itertools.chain(self._members.values(), self._leaving)

    def __getitem__(self, number: int) -> Member:
        return self._members[number]

    @property
    def numbers(self) -> list[int]:
        """Numbers of those that are to stay, oldest first."""
        return list(self._members)

    @property
    def losses(self) -> int:
        """How often one that served or drained has been lost, also of those that are gone."""
        return self._losses_of_gone + sum(member.losses for member in self)

    def serving(self) -> dict[int, Member]:
        """Return the replicas that serve, by their names in the dispatch."""
        return {m.life: m for m in self._members.values() if m.life is not None}

    def problems(self) -> dict[int, str]:
        """Return why replicas that should serve do not, by number."""
        return {m.number: m.problem for m in self._members.values() if m.life is None}

    def add(self, engine: Engine) -> int:
        """Have one more; returns its number."""
        if self._closing:
            raise Unavailable("the engine is closing")
        self.wanted += 1
        member = Member(next(self._numbers), engine, self._options)
        self._members[member.number] = member
        member.begin(self._admit, self._retire)
        return member.number

    def remove(self, number: int) -> asyncio.Task[None]:
        """Let one finish what it holds, and close it; returns the task that does."""
        self.wanted -= 1
        member = self._members.pop(number)
        member.leaving = True
        self._retire(member)
        task = asyncio.get_running_loop().create_task(self._see_out(member))
        self._leaving[member] = task
        return task

    async def _see_out(self, member: Member) -> None:
        await member.drain()
        await member.end()
        self._losses_of_gone += member.losses
        del self._leaving[member]
        _LOG.info("replica %d has left", member.number)

    def set(self, wanted: int) -> None:
        """Have so many; those leave first that do not serve, then those that hold least.

        Args:
            wanted: 1 or more.

        Raises:
            FailedPrecondition: nobody knows how to make one more.
            Unavailable: it is closing.
        """
        if self._closing:
            raise Unavailable("the engine is closing")
        if self._make is None:
            raise FailedPrecondition(
                "the replicas are servers that run already; start this server with the addresses "
                "of those that it should use",
                "replicas",
            )
        if wanted != self.wanted:
            _LOG.info("%d replicas are wanted, not %d", wanted, self.wanted)
        spare = sorted(
            self._members.values(),
            key=lambda m: (m.life is not None, m.held, -m.number),
        )
        for member in spare[: max(0, len(spare) - wanted)]:
            self.remove(member.number)
        while len(self._members) < wanted:
            self.add(self._make())

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Return how each is."""
        return tuple(_status(member) for member in self)

    async def end(self) -> None:
        """Close all of them."""
        self._closing = True
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        await asyncio.gather(*(member.end() for member in self))


def _status(member: Member) -> ReplicaStatus:
    state = ReplicaState.SERVING if member.life is not None else ReplicaState.STARTING
    if member.leaving:
        state = ReplicaState.DRAINING
    place, problem = "", member.problem
    if isinstance(member.engine, Placed):
        place = member.engine.place
        waits_for = member.engine.waits_for
        if waits_for:
            problem = f"waits for {waits_for}"
    return ReplicaStatus(member.number, state, member.held, member.losses, place, problem)

"""Calls of a run take turns, and nobody waits for one for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from knapsack_scheduler.errors import Busy

PATIENCE_SECONDS = 30.0
"""How long a call waits for those of its run that came before."""


@dataclass(slots=True, eq=False)
class _Turn:
    """Who works on a run, and how many wait to."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Turns:
    """Lets one call at a time work on a run; keeps nothing of names nobody uses.

    Args:
        patience: longest wait for the calls of a run that came before, s.
    """

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._turns: dict[str, _Turn] = {}

    def __len__(self) -> int:
        """Count the runs that somebody works on."""
        return len(self._turns)

    def is_free(self, run_id: str) -> bool:
        """Return whether nobody works on the run, so that a turn is taken without waiting."""
        return run_id not in self._turns

    def awaited(self, run_id: str) -> bool:
        """Return whether others wait for whoever works on the run."""
        return self._turns[run_id].users > 1

    @asynccontextmanager
    async def of(self, run_id: str) -> AsyncIterator[None]:
        """Take a turn for as long as a block takes; see ``take``."""
        await self.take(run_id)
        try:
            yield
        finally:
            self.end(run_id)

    async def take(self, run_id: str) -> None:
        """Wait until nobody else works on the run; who has taken a turn has to end it.

        Not for ever: callers that repeat what was not answered in time would come to wait for
        calls that nobody wants answered any more.

        Raises:
            Busy: the calls before take too long; nothing was begun.
        """
        turn = self._turns.setdefault(run_id, _Turn())
        turn.users += 1
        try:
            # The lock is free, too, while the one it goes to next has yet to be told.
            if turn.users > 1:
                await self._wait(run_id, turn.lock)
            else:
                await turn.lock.acquire()
        except BaseException:
            self._leave(run_id, turn)
            raise

    def end(self, run_id: str) -> None:
        """End the turn that was taken: the next call may work on the run."""
        turn = self._turns[run_id]
        turn.lock.release()
        self._leave(run_id, turn)

    def _leave(self, run_id: str, turn: _Turn) -> None:
        turn.users -= 1
        if turn.users == 0:
            del self._turns[run_id]

    async def _wait(self, run_id: str, lock: asyncio.Lock) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await lock.acquire()
        except TimeoutError:
            raise Busy(
                f"the calls of run {run_id!r} before this one took longer than "
                f"{self._patience:g} s; try again"
            ) from None

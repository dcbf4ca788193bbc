"""A replica that tests can hold, kill, and let misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from knapsack_genserver.engine import Completion, EngineStatus, Group, LoadedWeights, Tokenizer
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.errors import FailedPrecondition, ReplicaLost, Unavailable


class MortalEngine:
    """A fake engine that dies when told to and has new weights in each life.

    Attributes:
        gate: rollouts are handed out while it is set.
        open: whether it starts when asked to.
        answers: whether checks succeed.
        asked: groups that it was asked for, with its weight version at the time.
        held, most_held: rollouts that it holds, now and at most.
        loads: weight versions that it took, of this life.
        refuses: weight versions that it refuses to take.
        forges: weight versions of which it has other weights than it should.
        deadly: prompts that kill it.
        fails: whether it makes nothing of what it is asked for, and lives on.
        repeats: whether it sends each rollout twice.
        hang: whether it never ends a weight update.
    """

    name = "mortal"
    tokenizer: Tokenizer | None = None

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.open = True
        self.answers = True
        self.asked: list[tuple[Group, int]] = []
        self.held = self.most_held = 0
        self.lives = 0
        self.loads: list[int] = []
        self.refuses: set[int] = set()
        self.forges: set[int] = set()
        self.deadly: set[tuple[int, ...]] = set()
        self.fails = False
        self.repeats = False
        self.hang = False
        self.closed = asyncio.Event()
        self._fake = FakeEngine()
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Begin a life with the weights of the beginning."""
        if not self.open:
            raise ReplicaLost("it is switched off")
        self.lives += 1
        self.loads = []
        self.closed.clear()
        self._fake = FakeEngine()
        self._death = asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """End this life."""
        self.die()
        self.closed.set()

    def die(self) -> None:
        """Fail everything that is under way."""
        if not self._death.done():
            self._death.set_result(None)

    async def check(self) -> None:
        """Answer, or not."""
        if not self.answers:
            raise TimeoutError

    def status(self) -> EngineStatus:
        """Return the fake's."""
        return self._fake.status()

    async def generate(self, group: Group) -> AsyncIterator[Completion]:
        """Hand out rollouts one by one while the gate is open."""
        death = self._death
        self.asked.append((group, self.status().weight_version))
        self.held += group.num_rollouts
        self.most_held = max(self.most_held, self.held)
        left = group.num_rollouts
        try:
            if self.fails:
                raise Unavailable("500: it fails")
            if tuple(group.prompt) in self.deadly:
                self.die()
            async for completion in self._fake.generate(group):
                gate = asyncio.ensure_future(self.gate.wait())
                await asyncio.wait([gate, death], return_when=asyncio.FIRST_COMPLETED)
                gate.cancel()
                if death.done():
                    raise ReplicaLost("it died")
                self.held -= 1
                left -= 1
                yield completion
                if self.repeats:
                    yield completion
        finally:
            self.held -= left

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Take, refuse or forge weights."""
        if self.hang:
            await asyncio.Event().wait()
        if version in self.refuses:
            raise FailedPrecondition("it refuses")
        loaded = await self._fake.load_weights(path, version)
        self.loads.append(version)
        return LoadedWeights(version, "forged") if version in self.forges else loaded

"""A seeded engine without a model, for tests: tokens are a hash of seed and place.

Obeys every promise of ``engine.Engine``, counts like a real one, and can be told to hold
rollouts back or to let some fail.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from knapsack_genserver import seeds
from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    Tokenizer,
    WeightSpan,
)
from knapsack_genserver.errors import FailedPrecondition, Unavailable
from knapsack_genserver.inbox import Inbox

VOCABULARY = 64
END_TOKEN = 0


class FakeEngine:
    """See the module.

    Args:
        hold: awaited before each group's rollouts are handed out; None for at once.
        fails: says of (group, rollout index) whether it fails; None for never.
        weight_version: of the weights it begins with.
    """

    name = "fake"
    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        *,
        hold: asyncio.Event | None = None,
        fails: Callable[[Group, int], bool] | None = None,
        weight_version: int = 0,
    ) -> None:
        self._hold = hold
        self._fails = fails
        self._version = weight_version
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._closing = False

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """End all work."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> EngineStatus:
        """Return how the engine is."""
        return EngineStatus("fake", self._version, 1, self._waiting, 0, 0, VOCABULARY)

    def generate(self, group: Group) -> Inbox:
        """Queue a group; return the iterator of its rollouts."""
        if self._closing:
            raise Unavailable("the engine is closing")

        def cancel() -> None:
            task.cancel()

        inbox = Inbox(group.num_rollouts, cancel)
        task = asyncio.get_running_loop().create_task(self._run(group, inbox, self._version))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return inbox

    async def _run(self, group: Group, inbox: Inbox, version: int) -> None:
        self._waiting += group.num_rollouts
        try:
            if self._hold is not None:
                await self._hold.wait()
            for index in range(group.first_index, group.first_index + group.num_rollouts):
                inbox.put([self._rollout(group, index, version)])
        finally:
            self._waiting -= group.num_rollouts

    def _rollout(self, group: Group, index: int, version: int) -> Completion:
        if self._fails is not None and self._fails(group, index):
            return Completion(index, [], [], FinishReason.ERROR, (), "told to fail")
        key = seeds.rollout_keys(group.seed ^ version, np.array([index]))
        tokens: list[int] = []
        ends = {END_TOKEN, *group.sampling.stop_token_ids}
        while len(tokens) < group.sampling.max_tokens:
            tokens.append(int(seeds.uniforms(key, len(tokens))[0] * VOCABULARY))
            if tokens[-1] in ends:
                break
        reason = FinishReason.STOP if tokens[-1] in ends else FinishReason.LENGTH
        logprobs = [-math.log(VOCABULARY)] * len(tokens)
        return Completion(index, tokens, logprobs, reason, (WeightSpan(version, 0, len(tokens)),))

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Take any folder there is as weights."""
        if not await asyncio.to_thread(path.is_dir):
            raise FailedPrecondition(f"path = {str(path)!r}: is not a folder on the server's disk")
        self._version = version
        return LoadedWeights(version, f"fake-{version}")

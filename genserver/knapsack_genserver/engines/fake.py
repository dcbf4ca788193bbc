"""A seeded engine without a model, for tests: tokens are a hash of seed and place.

Obeys every promise of ``engine.Engine``, counts like a real one, and can be told to hold
rollouts back or to let some fail.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
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
        self._drawing = asyncio.Lock()
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
            # A group at a turn of the event loop, so that others have theirs.
            async with self._drawing:
                await asyncio.sleep(0)
                inbox.put(list(self._completions(group, version)))
        finally:
            self._waiting -= group.num_rollouts

    def _completions(self, group: Group, version: int) -> Iterator[Completion]:
        indices = np.arange(group.first_index, group.first_index + group.num_rollouts)
        keys = seeds.rollout_keys(group.seed ^ version, indices)
        ends = np.array([END_TOKEN, *group.sampling.stop_token_ids])
        columns: list[np.ndarray] = []
        lengths = np.zeros(len(indices), np.int64)
        while len(columns) < group.sampling.max_tokens and not lengths.all():
            columns.append((seeds.uniforms(keys, len(columns)) * VOCABULARY).astype(np.int64))
            lengths[np.isin(columns[-1], ends) & (lengths == 0)] = len(columns)
        stopped = lengths > 0
        lengths[~stopped] = len(columns)
        drawn = np.stack(columns, axis=1)
        for row, index in enumerate(indices.tolist()):
            if self._fails is not None and self._fails(group, index):
                yield Completion(index, [], [], FinishReason.ERROR, (), "told to fail")
                continue
            tokens: list[int] = drawn[row, : lengths[row]].tolist()
            reason = FinishReason.STOP if stopped[row] else FinishReason.LENGTH
            logprobs = [-math.log(VOCABULARY)] * len(tokens)
            span = (WeightSpan(version, 0, len(tokens)),)
            yield Completion(index, tokens, logprobs, reason, span)

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Take any folder there is as weights."""
        if not await asyncio.to_thread(path.is_dir):
            raise FailedPrecondition(f"path = {str(path)!r}: is not a folder on the server's disk")
        self._version = version
        return LoadedWeights(version, f"fake-{version}")

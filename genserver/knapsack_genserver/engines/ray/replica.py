"""The driver's end of one replica: a placement group with an actor in it, as an engine."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from knapsack_genserver import errors
from knapsack_genserver.engine import Completion, EngineStatus, Group, LoadedWeights, Tokenizer
from knapsack_genserver.engines.ray.actor import Refusal, Replica
from knapsack_genserver.engines.ray.store import WeightStore
from knapsack_genserver.errors import ReplicaLost

_LOG = logging.getLogger(__name__)
_AT_ONCE = 100_000
"""Calls that an actor works on at a time; the pool bounds the rollouts."""
_NOTE_SECONDS = 10.0
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RayOptions:
    """How a replica runs.

    Attributes:
        arguments: of the command line, for the engine in the actor.
        resources: what the replica takes of one node, such as {"CPU": 1, "GPU": 2}.
        store: where weights are passed through; None if every node sees their folder.
    """

    arguments: Sequence[str]
    resources: Mapping[str, float]
    store: WeightStore | None = None


class RayReplica:
    """An engine for a pool: it raises where rollouts may be made elsewhere.

    Attributes:
        place: host and process of the actor; empty while there is none.
        waits_for: what the start waits for; empty if for nothing but the engine.
    """

    name = "ray"
    tokenizer: Tokenizer | None = None

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        # What has been taken of the cluster, and what gives it back.
        self._placing: asyncio.Future[Any] | None = None
        self._actor: Any = None
        self._freeing: asyncio.Future[None] | None = None
        self._status = EngineStatus("", 0, 0, 0, 0, 0, 0)
        self._held = 0
        self._names = itertools.count()
        self._unwanted: list[int] = []
        self.place = self.waits_for = ""

    async def start(self) -> None:
        """Wait for room on a node, and start the engine there.

        Raises:
            ConfigError: the engine cannot start there; says why.
            ReplicaLost: the node or the actor died meanwhile.
        """
        resources = {name: amount for name, amount in self._options.resources.items() if amount}
        self.waits_for = f"a node with room for {resources}"
        try:
            group = await self._placed(resources)
        except RayError as error:
            raise ReplicaLost(_text(error)) from error
        finally:
            self.waits_for = ""
        actor = ray.remote(Replica).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_concurrency=_AT_ONCE,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        self._actor = actor.remote(list(self._options.arguments))
        self.place = await self._call(self._actor.place.remote())
        self._status = await self._call(self._actor.start.remote())

    async def _placed(self, resources: Mapping[str, float]) -> Any:
        """Return a placement group once it has its place."""
        # One bundle is on one node, so tensor parallelism stays within it. Ray asks the head
        # node and waits for its answer, so beside the event loop; and whatever ends this wait,
        # the group that comes of it has to be given back.
        making = asyncio.to_thread(placement_group, [dict(resources)], strategy="STRICT_PACK")
        self._placing = asyncio.ensure_future(making)
        group = await asyncio.shield(self._placing)
        ready = asyncio.ensure_future(_wait(group.ready()))
        try:
            done, _ = await asyncio.wait([ready], timeout=_NOTE_SECONDS)
            if not done:
                _LOG.warning("a replica waits for %s", self.waits_for)
            await ready
        finally:
            ready.cancel()
        return group

    async def close(self) -> None:
        """End the actor and give its room back, also if this is cancelled."""
        if self._freeing is None:
            self._freeing = asyncio.ensure_future(self._free(self._actor, self._placing))
            self._actor = self._placing = None
            self.place = ""
        await asyncio.shield(self._freeing)
        self._freeing = None

    async def _free(self, actor: Any, placing: asyncio.Future[Any] | None) -> None:
        if actor is not None:
            with suppress(RayError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await _wait(actor.close.remote())
            with suppress(RayError):
                await asyncio.to_thread(ray.kill, actor)
        if placing is not None:
            with suppress(RayError):
                await asyncio.to_thread(remove_placement_group, await placing)

    async def check(self) -> None:
        """Raise if the actor is gone or its engine has died."""
        self._status = await self._call(self._alive.check.remote())

    def status(self) -> EngineStatus:
        """Return what the actor said last."""
        return replace(self._status, running=self._held, waiting=0)

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve other weights, from a folder that the actor sees or through the store."""
        store = self._options.store
        if store is None:
            call = self._alive.load_weights.remote(str(path), version)
        else:
            files = await store.files(path, version)
            call = self._alive.load_files.remote(files, version)
        loaded: LoadedWeights = await self._call(call)
        self._status = replace(self._status, weight_version=version)
        return loaded

    async def generate(self, group: Group) -> AsyncIterator[Completion]:
        """Yield the rollouts of a group.

        Raises:
            GeneratorError: the engine refuses the group; says why.
            ReplicaLost: the actor or its node is gone.
        """
        name = next(self._names)
        stream = self._alive.generate.options(num_returns="streaming").remote(name, group)
        left = group.num_rollouts
        self._held += left
        try:
            async for item in stream:
                batch = _value(await item)
                for completion in batch:
                    left -= 1
                    self._held -= 1
                    yield completion
        except RayError as error:
            raise ReplicaLost(_text(error)) from error
        finally:
            self._held -= left
            if left:
                self._stop(name)

    def _stop(self, name: int) -> None:
        """Have the actor end work, all that is given up together in one call."""
        self._unwanted.append(name)
        if len(self._unwanted) == 1:
            asyncio.get_running_loop().call_soon(self._send_stops)

    def _send_stops(self) -> None:
        unwanted, self._unwanted = self._unwanted, []
        if self._actor is not None:
            with suppress(RayError):
                self._actor.stop.remote(unwanted)

    @property
    def _alive(self) -> Any:
        if self._actor is None:
            raise ReplicaLost("its actor has ended")
        return self._actor

    async def _call(self, reference: Any) -> Any:
        try:
            return _value(await _wait(reference))
        except RayError as error:
            raise ReplicaLost(_text(error)) from error


async def _wait(reference: Any) -> Any:
    return await reference


def _value(answer: Any) -> Any:
    """Return an answer of the actor's, or raise what the engine refused it with."""
    if not isinstance(answer, Refusal):
        return answer
    if answer.kind == "EngineDied":
        raise ReplicaLost(answer.text)
    kind = getattr(errors, answer.kind)
    if kind is errors.InvalidArgument:
        raise errors.GeneratorError(answer.text)
    raise kind(answer.text)


def _text(error: BaseException) -> str:
    """Return the first lines of one of Ray's long messages as one."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else f"{words[:300]}..."

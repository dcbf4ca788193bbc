"""The calls of the contract on one engine; knows neither gRPC nor Prometheus."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

from knapsack_genserver import wire
from knapsack_genserver.engine import Completion, Engine, FinishReason
from knapsack_genserver.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from knapsack_genserver.events import Events, GroupCompleted, RolloutDelivered, WeightsUpdated
from knapsack_proto.v1 import generation_pb2 as pb

_QUEUED = 256
"""Rollouts of one call that wait for a slow reader before its groups wait with them."""


class GeneratorService:
    """Rollouts, weights and status of one engine.

    Args:
        engine: started.
        events: told what happens.
        weights_root: folder that weights must lie in; None for anywhere.
        max_waiting_rollouts: most rollouts admitted and not yet handed out.
        seed: of the seeds for requests without one; None draws one.
        limits: largest requests that are served.
    """

    def __init__(
        self,
        engine: Engine,
        events: Events,
        *,
        weights_root: Path | None = None,
        max_waiting_rollouts: int = 1_000_000,
        seed: int | None = None,
        limits: wire.Limits | None = None,
    ) -> None:
        self._engine = engine
        self._events = events
        self._weights_root = weights_root.resolve() if weights_root else None
        self._most = max_waiting_rollouts
        self._admitted = 0
        self._requests = 0
        self._seed = secrets.randbits(64) if seed is None else seed
        self._limits = limits or wire.Limits()
        self._updating = asyncio.Lock()

    @property
    def admitted_rollouts(self) -> int:
        """Rollouts admitted and not yet handed out."""
        return self._admitted

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.Rollout, None]:
        """Yield every rollout as it finishes; closing the generator ends the work."""
        start = time.perf_counter()
        self._requests += 1
        groups = wire.groups_of(
            request,
            self._engine.status(),
            self._engine.tokenizer,
            self._limits,
            request_number=self._requests,
            default_seed=self._seed + self._requests,
        )
        left = {at: group.num_rollouts for at, group in groups.items()}
        total = sum(left.values())
        if self._admitted + total > self._most:
            raise ResourceExhausted(
                f"{total} rollouts do not fit beside the {self._admitted} that wait; "
                f"at most {self._most} may"
            )
        self._admitted += total
        undelivered = total
        streams = {at: self._engine.generate(group) for at, group in groups.items()}
        try:
            async with aclosing(_merged(streams)) as merged:
                async for at, completion in merged:
                    yield wire.rollout_message(at, completion, self._engine.tokenizer)
                    undelivered -= 1
                    self._admitted -= 1
                    self._delivered(completion)
                    left[at] -= 1
                    if left[at] == 0:
                        size = groups[at].num_rollouts
                        self._events.emit(GroupCompleted(size, time.perf_counter() - start))
        finally:
            self._admitted -= undelivered

    def _delivered(self, completion: Completion) -> None:
        reason = FinishReason.ERROR if completion.error else completion.reason
        self._events.emit(RolloutDelivered(reason, len(completion.token_ids)))

    async def update_weights(self, request: pb.UpdateWeightsRequest) -> pb.WeightStatus:
        """Serve other weights; one update at a time, in the order they came."""
        if request.weight_version < 0:
            raise InvalidArgument("weight_version", request.weight_version, "must be 0 or more")
        path = await asyncio.to_thread(self._weights_path, request.path)
        start = time.perf_counter()
        # A caller that goes away does not leave the update half waited for.
        return await asyncio.shield(
            asyncio.ensure_future(self._update(path, request.weight_version, start))
        )

    async def _update(self, path: Path, version: int, start: float) -> pb.WeightStatus:
        failed = True
        try:
            async with self._updating:
                loaded = await self._engine.load_weights(path, version)
            failed = False
        finally:
            self._events.emit(WeightsUpdated(version, time.perf_counter() - start, failed))
        return wire.weights_message(loaded)

    def _weights_path(self, path: str) -> Path:
        if not path or "\x00" in path:
            raise InvalidArgument("path", path, "must be a folder on the server's disk")
        resolved = Path(path).resolve()
        root = self._weights_root
        if root and root not in (resolved, *resolved.parents):
            raise InvalidArgument("path", path, f"must lie in the server's weights root, {root}")
        if not resolved.is_dir():
            raise FailedPrecondition(f"path = {path!r}: is not a folder on the server's disk")
        return resolved

    async def get_status(self, _request: pb.GetStatusRequest) -> pb.GeneratorStatus:
        """Return the engine's status."""
        return wire.status_message(self._engine.name, self._engine.status())


async def _merged(
    streams: dict[int, AsyncIterator[Completion]],
) -> AsyncGenerator[tuple[int, Completion], None]:
    """Yield (position, completion) of every stream as they come.

    Closing it, or being cancelled, closes every stream.
    """
    queue: asyncio.Queue[tuple[int, Completion | None]] = asyncio.Queue(_QUEUED)

    async def pump(at: int, stream: AsyncIterator[Completion]) -> None:
        async for completion in stream:
            await queue.put((at, completion))
        await queue.put((at, None))

    pumps = [asyncio.ensure_future(pump(at, stream)) for at, stream in streams.items()]
    open_streams = len(streams)
    try:
        while open_streams:
            at, completion = await queue.get()
            if completion is None:
                open_streams -= 1
            else:
                yield at, completion
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for stream in streams.values():
            close: Callable[[], object] | None = getattr(stream, "aclose", None)
            if close is not None:
                await close()  # type: ignore[misc]

"""The calls of the contract on one engine; knows neither gRPC nor Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from knapsack_genserver import wire
from knapsack_genserver.admission import Admission, AdmissionLimits
from knapsack_genserver.call import Call
from knapsack_genserver.engine import Engine, EngineStatus, Scalable
from knapsack_genserver.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from knapsack_genserver.events import Events, RolloutsGivenUp, WaveAdmitted, WeightsUpdated
from knapsack_genserver.feeder import Feeder, Feeding
from knapsack_genserver.session import Patience, Session
from knapsack_proto.v1 import generation_pb2 as pb

_THREAD_BYTES = 2**18
"""Requests that are larger are looked at beside the event loop."""
_MOST_REPLICAS = 4096
"""A slip of the finger is not to make an autoscaler buy machines without end."""


class GeneratorService:
    """Rollouts, weights and status of one engine.

    Args:
        engine: started.
        events: told what happens.
        weights_root: folder that weights must lie in; None for anywhere.
        seed: of the seeds for requests without one; None draws one.
        limits: largest requests that are served.
        admission: how much is held at once.
        feeding: how the engine is fed.
        patience: how long a session may leave the server waiting.
    """

    def __init__(
        self,
        engine: Engine,
        events: Events,
        *,
        weights_root: Path | None = None,
        seed: int | None = None,
        limits: wire.Limits | None = None,
        admission: AdmissionLimits | None = None,
        feeding: Feeding | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._engine = engine
        self._events = events
        self._weights_root = weights_root.resolve() if weights_root else None
        self._requests = 0
        self._seed = secrets.randbits(64) if seed is None else seed
        self._limits = limits or wire.Limits()
        self._admission = Admission(admission or AdmissionLimits())
        self._feeder = Feeder(engine, feeding or Feeding())
        self._patience = patience or Patience()
        self._updating = asyncio.Lock()
        self._draining = False
        self._calls: set[Call] = set()

    @property
    def admitted_rollouts(self) -> int:
        """Rollouts admitted and not accounted for."""
        return self._admission.rollouts

    @property
    def calls(self) -> int:
        """Calls that generate."""
        return self._admission.calls

    @property
    def unread_rollouts(self) -> int:
        """Rollouts that have finished and whose callers have not read them."""
        return self._feeder.unread

    def status(self) -> EngineStatus:
        """Return how the engine is, with what waits for it."""
        status = self._engine.status()
        return replace(status, waiting=status.waiting + self._feeder.waiting)

    def drain(self) -> None:
        """Take nothing on any more; what is under way goes on."""
        self._draining = True
        for call in self._calls:
            call.wake()

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.Rollout, None]:
        """Yield every rollout as it finishes; closing the generator ends the work."""
        async with self._call(request.request_id, request.sampling) as (call, seed):
            await self._add(call, request, request.sampling, seed)
            while call.left or call.unread:
                await call.changed()
                rollouts, _ = call.take()
                self._feeder.fill()
                for rollout in rollouts:
                    yield rollout

    async def generate_session(
        self, requests: AsyncIterator[pb.GenerateSessionRequest]
    ) -> AsyncGenerator[pb.GenerateSessionResponse, None]:
        """Yield what happens in a session; closing the generator ends its work.

        Args:
            requests: as they come; ends when the client has closed its side.
        """
        try:
            async with asyncio.timeout(self._patience.opening_seconds):
                opening = await anext(aiter(requests), None)
        except TimeoutError:
            raise InvalidArgument(
                "request", "none", f"must come within {self._patience.opening_seconds:g} s"
            ) from None
        if opening is None or opening.WhichOneof("request") != "open":
            kind = opening.WhichOneof("request") if opening else "none"
            raise InvalidArgument("request", kind, "must be open, for it is the first")
        sampling = opening.open.sampling
        async with self._call(opening.open.request_id, sampling) as (call, seed):

            async def add(request: pb.AddRollouts) -> None:
                await self._add(call, request, sampling, seed)

            async def stop(positions: set[int]) -> dict[int, list[int]]:
                stopped = await self._feeder.stop(call, positions)
                self._given_up(sum(map(len, stopped.values())), "stopped")
                return stopped

            session = Session(call, self._events, add, stop, lambda: self._draining, self._patience)
            async with contextlib.aclosing(session.responses(requests)) as responses:
                async for response in responses:
                    self._feeder.fill()
                    yield response

    @asynccontextmanager
    async def _call(
        self, request_id: str, sampling: pb.SamplingParams
    ) -> AsyncIterator[tuple[Call, int]]:
        """Open a call, with the seed of its groups; ends all its work at the end."""
        if self._draining:
            raise Unavailable("the server is shutting down")
        wire.check_sampling(sampling, self._engine.status())
        self._admission.admit_call()
        self._requests += 1
        seed = sampling.seed if sampling.HasField("seed") else self._seed + self._requests
        call = Call(
            self._requests,
            request_id,
            self._engine.tokenizer,
            self._events,
            self._admission.accounted,
        )
        self._calls.add(call)
        self._feeder.enter(call)
        try:
            yield call, seed
        finally:
            self._calls.discard(call)
            self._admission.ended(call.prompt_tokens)
            self._given_up(call.abandon(), "cancelled")
            await self._feeder.leave(call)

    async def _add(
        self,
        call: Call,
        request: pb.GenerateRequest | pb.AddRollouts,
        sampling: pb.SamplingParams,
        seed: int,
    ) -> None:
        """Look at a wave whole, then admit and begin it; nothing of it is done otherwise."""
        if self._draining:
            raise Unavailable("the server is shutting down")
        field = "add." if isinstance(request, pb.AddRollouts) else ""

        def look() -> tuple[list[wire.Wanted], list[wire.AskedPrompt]]:
            wanted = wire.wanted_of(request, call.asked, self._limits, field)
            prompts = wire.prompts_of(
                request.prompts,
                sampling,
                seed,
                self._engine.status(),
                self._engine.tokenizer,
                first=len(call.asked),
                field=field,
            )
            return wanted, prompts

        large = request.ByteSize() > _THREAD_BYTES
        wanted, prompts = await asyncio.to_thread(look) if large else look()
        for want in wanted:
            if call.unfinished_waves(want.position) >= self._limits.waves:
                raise ResourceExhausted(
                    f"prompt {want.position} has rollouts of {self._limits.waves} additions that "
                    "are not finished; it may have no more",
                    "waves",
                )
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        sizes = [want.rollouts for want in wanted]
        self._admission.admit(sum(sizes), tokens, call.left)
        call.add(prompts, wanted, tokens)
        self._events.emit(WaveAdmitted(sizes, tokens))
        self._feeder.fill()

    def _given_up(self, rollouts: int, why: str) -> None:
        if rollouts:
            self._events.emit(RolloutsGivenUp(rollouts, why))

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
        loaded = None
        try:
            async with self._updating:
                loaded = await self._engine.load_weights(path, version)
        finally:
            seconds = time.perf_counter() - start
            paused = loaded.paused_seconds if loaded else None
            self._events.emit(WeightsUpdated(version, seconds, loaded is None, paused))
        return wire.weights_message(loaded)

    def _weights_path(self, path: str) -> Path:
        if not path or "\x00" in path:
            raise InvalidArgument("path", path, "must be a folder on the server's disk")
        try:
            resolved = Path(path).resolve()
            is_folder = resolved.is_dir()
        except OSError as error:
            raise InvalidArgument("path", path, f"cannot be one: {error.strerror}") from None
        root = self._weights_root
        if root and root not in (resolved, *resolved.parents):
            raise InvalidArgument("path", path, f"must lie in the server's weights root, {root}")
        if not is_folder:
            raise FailedPrecondition(f"path = {path!r}: is not a folder on the server's disk")
        return resolved

    async def set_replicas(self, request: pb.SetReplicasRequest) -> pb.GeneratorStatus:
        """Change how many replicas there should be; return the status right after."""
        if not 1 <= request.replicas <= _MOST_REPLICAS:
            raise InvalidArgument("replicas", request.replicas, f"must be 1 to {_MOST_REPLICAS}")
        if self._draining:
            raise Unavailable("the server is shutting down")
        if not isinstance(self._engine, Scalable):
            raise FailedPrecondition(
                f"the engine {self._engine.name} is one process; --engine ray has replicas",
                "replicas",
            )
        self._engine.set_replicas(request.replicas)
        return wire.status_message(self._engine.name, self.status())

    async def get_status(self, _request: pb.GetStatusRequest) -> pb.GeneratorStatus:
        """Return the engine's status."""
        return wire.status_message(self._engine.name, self.status())

"""Client of the generation server: unequal groups of rollouts, and new weights.

    with RolloutClient("localhost:50061") as rollouts:
        groups = rollouts.generate(prompts, allocation.num_rollouts, max_tokens=512)
        rollouts.update_weights(folder, step)

Blocking calls on grpc's thread-based channel; ``AsyncRolloutClient`` runs them in
threads, because grpc.aio allows one event loop per process and a library cannot claim it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc
from knapsack_trainer_client.arguments import check_address
from knapsack_trainer_client.closing import AsyncClosing, Closing
from knapsack_trainer_client.errors import GeneratorUnavailable
from knapsack_trainer_client.rollout_session import AsyncRolloutSession, RolloutSession
from knapsack_trainer_client.rollout_wire import (
    MESSAGE_BYTES,
    PromptLike,
    Rollout,
    RolloutGroups,
    raise_status,
)

__all__ = [
    "AsyncRolloutClient",
    "AsyncRolloutSession",
    "GeneratorStatus",
    "PromptLike",
    "Rollout",
    "RolloutClient",
    "RolloutGroups",
    "RolloutSession",
]

_LOG = logging.getLogger("knapsack_rl")
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A server whose machine is gone says no goodbye; nobody waits for it for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True)
class GeneratorStatus:
    """How a generation server is: see GeneratorStatus of the wire contract."""

    model: str
    engine: str
    weight_version: int
    replicas: int
    running_rollouts: int
    waiting_rollouts: int
    max_model_tokens: int
    vocabulary_size: int


class RolloutClient(Closing):
    """Asks a generation server for rollouts. May be used from several threads.

    Args:
        address: gRPC target of the server, such as "localhost:50061".
        timeout: seconds to wait for an answer to ``status``, and for a server that
            starts to accept calls.
        update_timeout: seconds to wait for new weights to serve.
    """

    def __init__(
        self, address: str, *, timeout: float = 10.0, update_timeout: float = 600.0
    ) -> None:
        self._address = check_address(address)
        self._timeout = timeout
        self._update_timeout = update_timeout
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = rpc.RolloutGeneratorStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(
        self,
        prompts: Sequence[PromptLike],
        num_rollouts: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        prompt_ids: Sequence[str] = (),
        expected_tokens: Sequence[int] = (),
        request_id: str = "",
        timeout: float | None = None,
        on_rollout: Callable[[Rollout], object] | None = None,
        on_call: Callable[[Callable[[], object]], object] | None = None,
    ) -> RolloutGroups:
        """Return the rollouts of every prompt, ``num_rollouts[i]`` of ``prompts[i]``.

        Args:
            prompts: texts, token ids or chats, all of one kind or mixed.
            num_rollouts: 0 or more of each, such as ``allocation.num_rollouts``.
            max_tokens, temperature, top_p, top_k, seed, stop_token_ids: as
                SamplingParams of the wire contract; None is its default there.
            prompt_ids: names of the prompts, for the server's logs.
            expected_tokens: of a completion of each prompt, such as its mean so far; 0 if
                not known. What takes longest begins first; it limits nothing.
            request_id: name of the request, for the server's logs.
            timeout: seconds for all of it; None waits as long as it takes.
            on_rollout: called with each rollout as it comes. What it raises cancels
                the rest.
            on_call: called once with a function that cancels the work from any thread.

        Raises:
            InvalidRequest: an argument the server refuses; names it.
            GeneratorBusy: the server's queue is full.
            GeneratorUnavailable: no server, or it stopped before the last rollout.
        """
        groups = RolloutGroups(len(prompts))
        for rollout in self.stream(
            prompts,
            num_rollouts,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_token_ids=stop_token_ids,
            prompt_ids=prompt_ids,
            expected_tokens=expected_tokens,
            request_id=request_id,
            timeout=timeout,
            on_call=on_call,
        ):
            groups.put(rollout)
            if on_rollout is not None:
                on_rollout(rollout)
        groups.sort_groups()
        if groups.failed:
            _LOG.warning(
                "%d of %d rollouts failed, the first because: %s",
                len(groups.failed),
                sum(num_rollouts),
                groups.failed[0].error or "the engine gave it up",
            )
        return groups

    def stream(
        self,
        prompts: Sequence[PromptLike],
        num_rollouts: Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        prompt_ids: Sequence[str] = (),
        expected_tokens: Sequence[int] = (),
        request_id: str = "",
        timeout: float | None = None,
        on_call: Callable[[Callable[[], object]], object] | None = None,
    ) -> Iterator[Rollout]:
        """Yield every rollout as it finishes, failed ones too; see ``generate``.

        Closing the iterator stops the work. ``on_call`` is given what stops it from
        another thread.
        """
        # In a session, because its messages hold several rollouts where several are ready.
        session = self.session(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_token_ids=stop_token_ids,
            request_id=request_id,
            timeout=timeout,
        )
        if on_call is not None:
            on_call(session.cancel)
        try:
            session.add(
                num_rollouts, prompts, expected_tokens=expected_tokens, prompt_ids=prompt_ids
            )
            yield from session.pass_on()
        finally:
            session.close()

    def session(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        request_id: str = "",
        timeout: float | None = None,
    ) -> RolloutSession:
        """Return a session, in which rollouts are asked for wave by wave; see there.

        Args:
            max_tokens, temperature, top_p, top_k, seed, stop_token_ids, request_id: as
                ``generate``, for all of the session.
            timeout: seconds for all of it; None lets it last as long as it takes.

        Raises:
            GeneratorUnavailable: there is no server.
        """
        sampling = pb.SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_token_ids=stop_token_ids,
        )
        # A server that starts is waited for, and one that is not there is not for ever.
        self.status()
        return RolloutSession(
            self._stub,
            self._address,
            pb.OpenSession(request_id=request_id, sampling=sampling),
            timeout,
        )

    def update_weights(self, path: str | os.PathLike[str], weight_version: int) -> str:
        """Load a folder's weights and serve them; returns their fingerprint.

        Args:
            path: folder with ``*.safetensors``, on the server's disk.
            weight_version: what they are called, 0 or more.

        Raises:
            WeightUpdateFailed: the old weights serve on; says why.
            InvalidRequest, GeneratorUnavailable: as ``generate``.
        """
        request = pb.UpdateWeightsRequest(path=os.fspath(path), weight_version=weight_version)
        self.status()
        try:
            updated = self._stub.UpdateWeights(request, timeout=self._update_timeout)
        except grpc.RpcError as error:
            raise_status(error, self._address)
        return str(updated.fingerprint)

    def status(self) -> GeneratorStatus:
        """Return how the server is; GeneratorUnavailable if it does not answer."""
        try:
            answer = self._stub.GetStatus(
                pb.GetStatusRequest(), timeout=self._timeout, wait_for_ready=True
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise GeneratorUnavailable(
                    f"no generation server answered at {self._address} within {self._timeout:g} s"
                ) from None
            raise_status(error, self._address)
        return GeneratorStatus(
            answer.model,
            answer.engine,
            answer.weight_version,
            answer.replicas,
            answer.running_rollouts,
            answer.waiting_rollouts,
            answer.max_model_tokens,
            answer.vocabulary_size,
        )

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()


class AsyncRolloutClient(AsyncClosing):
    """``RolloutClient`` for code that is asynchronous; the same promises and errors.

    Cancelling a call stops the work on the server.
    """

    def __init__(
        self, address: str, *, timeout: float = 10.0, update_timeout: float = 600.0
    ) -> None:
        self._client = RolloutClient(address, timeout=timeout, update_timeout=update_timeout)

    async def generate(
        self, prompts: Sequence[PromptLike], num_rollouts: Sequence[int], **options: Any
    ) -> RolloutGroups:
        """Return the rollouts of every prompt; options as ``RolloutClient.generate``.

        ``on_rollout`` is called in a worker thread.
        """
        stop: list[Callable[[], object]] = []
        gone = threading.Event()

        def begun(cancel: Callable[[], object]) -> None:
            stop.append(cancel)
            if gone.is_set():
                # Cancelled before there was a call to cancel.
                cancel()

        work = asyncio.to_thread(
            self._client.generate, prompts, num_rollouts, on_call=begun, **options
        )
        try:
            return await work
        except asyncio.CancelledError:
            gone.set()
            for cancel in stop:
                cancel()
            raise

    async def session(self, **options: Any) -> AsyncRolloutSession:
        """Return a session; options as ``RolloutClient.session``."""
        return AsyncRolloutSession(await asyncio.to_thread(self._client.session, **options))

    async def update_weights(self, path: str | os.PathLike[str], weight_version: int) -> str:
        """Load a folder's weights and serve them; returns their fingerprint."""
        return await asyncio.to_thread(self._client.update_weights, path, weight_version)

    async def status(self) -> GeneratorStatus:
        """Return how the server is."""
        return await asyncio.to_thread(self._client.status)

    async def close(self) -> None:
        """Close the connection."""
        await asyncio.to_thread(self._client.close)

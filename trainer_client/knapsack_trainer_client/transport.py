"""One call to a scheduler, over gRPC or in this process, with one kind of failure.

The gRPC transport drives grpc's thread-based channel from asyncio. grpc.aio allows one
event loop per process, which a library cannot claim: the trainer, an engine or a server
in the same process may have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from knapsack_trainer_client.arguments import check_address
from knapsack_trainer_client.errors import refused
from knapsack_trainer_client.nouns import TLS

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)

Token = str | Callable[[], str]
"""A bearer token, or what returns the current one where tokens rotate."""

MAX_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT, ResponseT]):
    """A call of the scheduler's wire contract."""

    name: str
    request: type[RequestT]
    response: type[ResponseT]


class StatusError(Exception):
    """A call that ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(f"{code.name}: {message}" if message else code.name)


class Transport(Protocol):
    """How calls get to a scheduler.

    Implementations raise nothing but ``StatusError`` from ``call`` (and let
    cancellation pass), and answer or raise within ``timeout`` seconds.
    """

    @property
    def target(self) -> str:
        """Name of the scheduler for messages, and for the place of its outbox."""

    async def open(self) -> None:
        """Get ready. Called once, in the event loop that calls will come from."""

    async def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout: float
    ) -> ResponseT:
        """Return the scheduler's answer."""

    async def close(self) -> None:
        """Let go of everything. May be called without ``open``, and twice."""


REQUEST_ID_KEY = "x-request-id"
"""Metadata of a call with an id: in the scheduler's log and spans, and in its refusals."""

# What may stand in metadata, as the scheduler takes it.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

PENDING_REPORTS_KEY = "x-knapsack-pending-reports"
"""Metadata of every call: how many reports of the run wait, for the scheduler's metrics."""


class GrpcTransport:
    """Calls over one gRPC channel, to one scheduler or to several on one database.

    Attributes:
        pending_reports: how many reports wait at the moment, told with every call; None
            tells nothing.
    """

    def __init__(self, address: str, token: Token | None, tls: TLS | bool | None) -> None:
        self._address = check_address(address)
        self._token = token
        self._credentials, server_name = _credentials(tls)
        self._options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # A scheduler is a sidecar or a neighbour, never behind the web proxy that a
            # cluster sets for downloads.
            ("grpc.enable_http_proxy", 0),
            # Two clients must not share a connection's backoff or its credentials.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._address.startswith(("dns:", "ipv4:", "ipv6:")):
            # Several schedulers: every call goes to the next one that is up.
            balance = '{"loadBalancingConfig": [{"round_robin": {}}]}'
            self._options.append(("grpc.service_config", balance))
        if server_name:
            self._options.append(("grpc.ssl_target_name_override", server_name))
        self.pending_reports: Callable[[], int] | None = None
        self._channel: grpc.Channel | None = None
        self._stubs: dict[str, grpc.UnaryUnaryMultiCallable[Any, Any]] = {}

    @property
    def target(self) -> str:
        """The address."""
        return self._address

    async def open(self) -> None:
        """Make the channel; it connects at the first call."""
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._address, self._options)
        else:
            self._channel = grpc.secure_channel(self._address, self._credentials, self._options)

    async def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout: float
    ) -> ResponseT:
        """Return the scheduler's answer, or raise ``StatusError`` within ``timeout`` s."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[ResponseT] = loop.create_future()
        try:
            rpc = self._stub(method).future(
                request, timeout=timeout, metadata=self._metadata(request)
            )
        except Exception as error:
            raise StatusError(grpc.StatusCode.UNKNOWN, repr(error)) from error

        def settle() -> None:
            if answer.done():
                return
            try:
                answer.set_result(rpc.result(timeout=0))
            except grpc.RpcError as error:
                answer.set_exception(_status(error))
            except Exception as error:
                answer.set_exception(StatusError(grpc.StatusCode.UNKNOWN, repr(error)))

        def hand_over(_: object) -> None:
            # Called in a thread of grpc, where the loop may be gone already.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

        rpc.add_done_callback(hand_over)
        try:
            return await answer
        finally:
            rpc.cancel()

    async def close(self) -> None:
        """Close the channel; calls under way end as cancelled."""
        channel, self._channel = self._channel, None
        self._stubs.clear()
        if channel is not None:
            channel.close()

    def _stub(
        self, method: Method[RequestT, ResponseT]
    ) -> grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]:
        if self._channel is None:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the channel is closed")
        stub = self._stubs.get(method.name)
        if stub is None:
            stub = self._stubs[method.name] = self._channel.unary_unary(
                f"/knapsack_proto.v1.BudgetScheduler/{method.name}",
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        return stub

    def _metadata(self, request: Message) -> tuple[tuple[str, str | bytes], ...]:
        metadata: list[tuple[str, str | bytes]] = []
        call_id = getattr(request, "request_id", "") or getattr(request, "report_id", "")
        if _REQUEST_ID.fullmatch(call_id):
            metadata.append((REQUEST_ID_KEY, call_id))
        if self.pending_reports is not None:
            metadata.append((PENDING_REPORTS_KEY, str(self.pending_reports())))
        if self._token is not None:
            token = self._token if isinstance(self._token, str) else self._token()
            # A token read from a file ends in a newline, which HTTP/2 does not allow.
            metadata.append(("authorization", f"Bearer {token.strip()}"))
        return tuple(metadata)


def _status(error: grpc.RpcError) -> StatusError:
    if isinstance(error, grpc.Call):
        code, details = error.code() or grpc.StatusCode.UNKNOWN, error.details() or ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details += " (no scheduler listens at this address: is it a health port, or older?)"
        return StatusError(code, details)
    return StatusError(grpc.StatusCode.UNKNOWN, repr(error))


def _credentials(
    tls: TLS | bool | None,
) -> tuple[grpc.ChannelCredentials | None, str | None]:
    if tls is None or tls is False:
        return None, None
    files = TLS() if tls is True else tls
    if not isinstance(files, TLS):
        raise refused("tls", tls, "must be None, True or a TLS")
    parts = [_read(path) for path in (files.ca, files.key, files.certificate)]
    return grpc.ssl_channel_credentials(*parts), files.server_name


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise refused("tls", path, f"must be a readable PEM file ({error.strerror})") from error

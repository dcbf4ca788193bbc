"""Wires the service to its sockets and takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import grpc
import grpc.aio
from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    disable_created_metrics,
)

from knapsack_scheduler.admin import admin_app
from knapsack_scheduler.adminport import AdminPort
from knapsack_scheduler.config import Settings, default_config, host_and_port
from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.events import Event, Events
from knapsack_scheduler.health import Health
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.store import sqlite_file
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.livepage import LivePage
from knapsack_scheduler.logs import log_event
from knapsack_scheduler.metrics import Metrics
from knapsack_scheduler.openfiles import connections_within
from knapsack_scheduler.openservices import MESSAGE_BYTES, MOST_CALLS, OpenServices
from knapsack_scheduler.rpc import SERVICE, SchedulerServicer
from knapsack_scheduler.security import Certificates, TokenGuard, warn_of_readable
from knapsack_scheduler.service import LARGEST_PAGE_BYTES, SchedulerService
from knapsack_scheduler.tracing import Tracing
from knapsack_scheduler.watching import measured, watch

_LOG = logging.getLogger(__name__)
READINESS = ""
LIVENESS = "liveness"
_CONNECTION_OPTIONS = [
    # One connection may not take every call that is served.
    ("grpc.max_concurrent_streams", 256),
    # A connection that nobody uses, or whose other end is gone, costs memory for nothing.
    ("grpc.max_connection_idle_ms", 30 * 60 * 1000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ask whether the server is there every 10 s, not more often.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_metadata_size", 16 * 1024),
    # What a call may send before it is read. The size that the probe finds on a fast network
    # is 16 MiB, of every call that waits.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
]
_MOST_CONNECTIONS = "grpc.max_allowed_incoming_connections"
_MOST_PROBES = 128


def secrets_of(settings: Settings) -> tuple[TokenGuard | None, Certificates | None]:
    """Return what proves who calls and who answers; ConfigError says what is wrong with it."""
    guard = TokenGuard(settings.token_file) if settings.token_file else None
    if not (settings.tls_cert and settings.tls_key):
        return guard, None
    return guard, Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


class Server:
    """The scheduler with all its sockets, from start to drained."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limits = Limits(
            prompts=settings.max_prompts,
            jump=settings.max_jump,
            concurrent_calls=settings.max_concurrent_calls,
            message_bytes=settings.max_message_bytes,
            inflight_bytes=settings.max_inflight_bytes,
            connections=settings.max_connections,
        )
        self._journal = Journal(settings.store)
        self._events = Events()
        self._health = Health()
        self._serving = False
        self._tracing: Tracing | None = None
        self._guard, self._certificates = secrets_of(settings)
        self._service: SchedulerService | None = None
        self._servicer: SchedulerServicer | None = None
        self._api: grpc.aio.Server | None = None
        self._probes: grpc.aio.Server | None = None
        self._admin: AdminPort | None = None
        self._watch: asyncio.Task[None] | None = None
        self.addresses: dict[str, str] = {}

    @property
    def takes_calls(self) -> bool:
        """Whether the API has been opened."""
        return "listen" in self.addresses

    async def start(self) -> None:
        """Open the store and every socket; ConfigError says which of them failed."""
        settings = self._settings
        await asyncio.to_thread(self._journal.open)
        warn_of_readable([settings.token_file, settings.tls_key])
        try:
            self._service = SchedulerService(
                self._journal,
                auto_create_runs=settings.auto_create_runs,
                default_config=default_config(settings),
                limits=self._limits,
                events=self._events,
                retention=Retention(settings.rewind_horizon, settings.journal_calls),
                loaded_bytes=settings.max_loaded_bytes,
            )
            self._set_ready(False)
            self._health.set(LIVENESS, serving=True)
            await self._start_admin()
            await self._start_probes()
            # Alive but not ready: a trainer whose call had to wait for this would give up.
            await self._service.preload(settings.preload_runs)
            await self._start_api(self._service)
        except BaseException:
            await self.stop(0.0)
            raise
        self._set_ready(True)
        _LOG.info(
            "ready: knapsack-rl %s serves calls at %s, from %s",
            version("knapsack-rl"),
            self.addresses["listen"],
            settings.store,
        )

    async def _start_api(self, service: SchedulerService) -> None:
        settings = self._settings
        limits = self._limits
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", limits.message_bytes),
                # Pages end before they grow larger.
                ("grpc.max_send_message_length", 2 * LARGEST_PAGE_BYTES),
                *_CONNECTION_OPTIONS,
                (_MOST_CONNECTIONS, connections_within(limits.connections)),
            ],
        )
        self._servicer = SchedulerServicer(service, limits, self._guard)
        self._servicer.add_to(server)
        OpenServices(
            self._health,
            receiving_bytes=limits.receiving_bytes,
            messages=limits.open_messages,
            transfer_seconds=limits.transfer_seconds,
            described=(SERVICE.full_name,),
        ).add_to(server)
        credentials = self._certificates.credentials() if self._certificates else None
        self.addresses["listen"] = _bind(server, "listen", settings.listen, credentials)
        await server.start()
        self._api = server

    async def _start_probes(self) -> None:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_concurrent_streams", MOST_CALLS),
                ("grpc.max_metadata_size", 16 * 1024),
                (_MOST_CONNECTIONS, _MOST_PROBES),
            ]
        )
        OpenServices(
            self._health,
            receiving_bytes=MESSAGE_BYTES,
            messages=2 * MOST_CALLS,
            transfer_seconds=self._limits.transfer_seconds,
        ).add_to(server)
        self.addresses["health"] = _bind(server, "health_listen", self._settings.health_listen)
        await server.start()
        self._probes = server

    async def _start_admin(self) -> None:
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        page = LivePage()
        # The times at which series began: half as many series again, for nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        metrics = Metrics(registry, tuple(method.name for method in SERVICE.methods))
        metrics.describe(
            version=version("knapsack-rl"),
            store=self._settings.store.partition(":")[0].partition("+")[0],
            ready=lambda: self._serving,
            used_bytes=lambda: self._servicer.used_bytes if self._servicer else 0,
            most_bytes=self._limits.inflight_bytes,
            loaded_bytes=lambda: self._service.loaded_bytes if self._service else 0,
            most_loaded_bytes=self._settings.max_loaded_bytes,
        )
        for listener in (metrics, page, log_event):
            self._events.listen(listener)
        if self._settings.tracing:
            self._tracing = Tracing.exporting()
            self._events.listen(self._tracing)
        self._admin = AdminPort(admin_app(registry, page, lambda: self._serving, self._guard))
        host, port = host_and_port("admin_listen", self._settings.admin_listen)
        try:
            port = await self._admin.open(host, port)
        except OSError as error:
            raise ConfigError(
                f"admin_listen = {self._settings.admin_listen!r}: cannot be bound: {error.strerror}"
            ) from None
        self.addresses["admin"] = f"{host}:{port}"
        self._watch = asyncio.create_task(watch(self._events, *self._looks()))

    def _looks(self) -> Iterator[Callable[[], Event]]:
        store = sqlite_file(self._settings.store)
        if store is not None:
            yield partial(measured, store)
        if self._certificates is not None:
            yield self._certificates.ends

    def _set_ready(self, ready: bool) -> None:
        self._serving = ready
        for name in (READINESS, SERVICE.full_name):
            self._health.set(name, serving=ready)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those under way end, then close everything."""
        self._set_ready(False)
        self._health.end()
        if self._api:
            await self._api.stop(grace)
        if self._servicer:
            await self._servicer.settled()
        if self._service:
            await self._service.ended()
            await asyncio.to_thread(self._service.close)
        await asyncio.to_thread(self._journal.close)
        if self._watch:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        if self._probes:
            await self._probes.stop(0)
        if self._admin:
            await self._admin.close()
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)


def _bind(
    server: grpc.aio.Server,
    key: str,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
) -> str:
    host, _ = host_and_port(key, address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"{key} = {address!r}: cannot be bound; is it in use?")
    return f"{host}:{port}"


SWITCH_SECONDS = 0.0005
"""How long a worker thread may keep the event loop waiting for the interpreter. Python's
default of ten times that, a few times over, would be felt by every other call."""


CLOSING_SECONDS = 5.0
"""How long the end may take after calls under way had their time."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Prints one JSON object with the real addresses on stdout once calls are served. A signal
    before that ends the process at once, with 128 and its number.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    stopped = asyncio.Event()
    server = Server(settings)

    def stop(number: int) -> None:
        if not server.takes_calls:
            # Loading runs can take minutes, and there is no call to wait for.
            _LOG.warning("told to end before calls are served, which is done at once")
            logging.shutdown()
            os._exit(128 + number)
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.start()
    # What is there now stays. To look it through for garbage again and again would stop every
    # thread for tens of milliseconds, and longer with a million prompts.
    gc.collect()
    gc.freeze()
    order = ("listen", "admin", "health")
    line = {"event": "serving", **{name: server.addresses[name] for name in order}}
    print(json.dumps(line), file=sys.stdout, flush=True)  # noqa: T201
    await stopped.wait()
    _LOG.info(
        "told to end: no call is taken any more, those under way have %g s", settings.drain_seconds
    )
    try:
        async with asyncio.timeout(settings.drain_seconds + CLOSING_SECONDS):
            await server.stop(settings.drain_seconds)
    except TimeoutError:
        _LOG.warning(
            "work of calls that ended is still under way, as with a store that hangs; the process "
            "ends without it, and nothing that was answered is lost"
        )
        # Not by returning: Python would wait for the threads that hang.
        logging.shutdown()
        os._exit(0)
    _LOG.info("ended")

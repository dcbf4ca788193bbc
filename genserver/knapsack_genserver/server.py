"""Wires an engine to its sockets and takes them down in order."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.exposition import choose_encoder

from knapsack_genserver.admission import AdmissionLimits
from knapsack_genserver.engine import Engine
from knapsack_genserver.errors import ConfigError, EngineDied
from knapsack_genserver.events import Events, ServingBegan
from knapsack_genserver.feeder import Feeding
from knapsack_genserver.logs import log_event
from knapsack_genserver.metrics import Load, Metrics
from knapsack_genserver.rpc import GeneratorServicer, handlers_of
from knapsack_genserver.service import GeneratorService
from knapsack_genserver.session import Patience
from knapsack_genserver.wire import Limits
from knapsack_proto.v1 import generation_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["RolloutGenerator"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the server runs, the engine apart.

    Attributes:
        listen, admin_listen, health_listen: HOST:PORT of the API, of HTTP for metrics
            and probes, and of plaintext gRPC health checks; port 0 picks a free one.
        insecure: the API may be bound where others can reach it.
        weights_root: folder that weights must lie in; None for anywhere.
        limits: largest requests that are served.
        admission: how much is held at once.
        feeding: how the engine is fed.
        patience: how long a session may leave the server waiting.
        seed: of the seeds for requests without one; None draws one.
        keepalive_seconds: after which a silent client is asked whether it is there, and
            has as long again to answer.
        drain_seconds: how long calls under way may take to end after SIGTERM.
        http_listen: HOST:PORT of the engine's own HTTP API, where it has one; None for no
            such API.
        rl_routes: whether that API has the routes that change weights, which ask nobody
            who they are; None for: if only this machine can reach it.
    """

    listen: str = "127.0.0.1:50061"
    admin_listen: str = "127.0.0.1:9465"
    health_listen: str = "127.0.0.1:50062"
    insecure: bool = False
    weights_root: Path | None = None
    limits: Limits = field(default_factory=Limits)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    feeding: Feeding = field(default_factory=Feeding)
    patience: Patience = field(default_factory=Patience)
    seed: int | None = None
    keepalive_seconds: float = 20.0
    drain_seconds: float = 30.0
    http_listen: str | None = None
    rl_routes: bool | None = None


class Server:
    """The generation server with all its sockets, from start to drained."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self._engine = engine
        self._options = options
        self._events = Events()
        self._health = health_aio.HealthServicer()
        self._serving = False
        self._service: GeneratorService | None = None
        self._api: grpc.aio.Server | None = None
        self._probes: grpc.aio.Server | None = None
        self._admin: web.AppRunner | None = None
        self._http: socket.socket | None = None
        self.addresses: dict[str, str] = {}

    async def start(self) -> None:
        """Open the sockets for probes, load the model, then serve.

        Raises:
            ConfigError: says which socket or setting it was, or what of the model.
        """
        start = time.perf_counter()
        options = self._options
        for key, address in (("listen", options.listen), ("http_listen", options.http_listen)):
            if address is None:
                continue
            host, _ = host_and_port(key, address)
            if not (options.insecure or _is_loopback(host)):
                raise ConfigError(
                    f"{key} = {address!r}: others can reach this address and could replace "
                    "the weights; give --insecure if the network is yours alone"
                )
        try:
            if options.http_listen is not None:
                # Before the model is loaded, which may take minutes.
                self._http = _listening("http_listen", options.http_listen)
            await self._set_ready(False)
            await self._start_admin()
            await self._start_probes()
            await self._health.set("liveness", _SERVING)
            await self._engine.start()
            await self._start_http()
            await self._start_api()
        except BaseException:
            await self.stop(0.0)
            raise
        await self._set_ready(True)
        seconds = time.perf_counter() - start
        self._events.emit(ServingBegan(self._engine.status().weight_version, seconds))

    async def _start_http(self) -> None:
        serve_http = getattr(self._engine, "serve_http", None)
        if self._http is None or serve_http is None:
            return
        host, port = self._http.getsockname()[:2]
        rl_routes = self._options.rl_routes
        await serve_http(self._http, _is_loopback(host) if rl_routes is None else rl_routes)
        self.addresses["http"] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _start_api(self) -> None:
        options = self._options
        service = GeneratorService(
            self._engine,
            self._events,
            weights_root=options.weights_root,
            seed=options.seed,
            limits=options.limits,
            admission=options.admission,
            feeding=options.feeding,
            patience=options.patience,
        )
        self._service = service
        keepalive = round(1000 * options.keepalive_seconds)
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
                # A client whose machine is gone says no goodbye; its work ends all the same.
                ("grpc.keepalive_time_ms", keepalive),
                ("grpc.keepalive_timeout_ms", keepalive),
                # Without it the answer to a ping is waited for a minute, whatever the above.
                ("grpc.http2.ping_timeout_ms", keepalive),
                # Clients ask whether we are there, also while nothing comes.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
            ]
        )
        server.add_generic_rpc_handlers((handlers_of(GeneratorServicer(service, self._events)),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((_SERVICE, health, reflection.SERVICE_NAME), server)
        self.addresses["listen"] = _bind(server, "listen", options.listen)
        await server.start()
        self._api = server

    async def _start_probes(self) -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.addresses["health"] = _bind(server, "health_listen", self._options.health_listen)
        await server.start()
        self._probes = server

    async def _start_admin(self) -> None:
        # An engine with metrics of its own says where they are.
        registry = getattr(self._engine, "registry", None)
        if registry is None:
            registry = CollectorRegistry()
            for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
                registry.register(collector)
        self._events.listen(Metrics(registry, self._load))
        self._events.listen(log_event)
        runner = web.AppRunner(self._admin_app(registry))
        await runner.setup()
        self._admin = runner
        address = self._options.admin_listen
        host, port = host_and_port("admin_listen", address)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"admin_listen = {address!r}: cannot be bound: {error.strerror}"
            ) from None
        self.addresses["admin"] = f"{host}:{runner.addresses[0][1]}"

    def _admin_app(self, registry: CollectorRegistry) -> web.Application:
        async def metrics(request: web.Request) -> web.Response:
            encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
            return web.Response(body=encoder(registry), headers={"Content-Type": content_type})

        async def alive(_request: web.Request) -> web.Response:
            return web.Response(text="ok\n")

        async def ready(_request: web.Request) -> web.Response:
            if self._serving:
                return web.Response(text="ok\n")
            return web.Response(text="not serving\n", status=503)

        app = web.Application()
        app.router.add_get("/metrics", metrics)
        app.router.add_get("/healthz", alive)
        app.router.add_get("/readyz", ready)
        return app

    def _load(self) -> Load:
        """Return how busy the server is, also before it serves."""
        service = self._service
        if service is None:
            return Load(self._engine.status())
        return Load(service.status(), service.calls, service.unread_rollouts)

    async def _set_ready(self, ready: bool) -> None:
        self._serving = ready
        for name in ("", _SERVICE):
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Refuse new calls, let those under way end, then close everything."""
        await self._set_ready(False)
        if self._service:
            self._service.drain()
        if self._api:
            await self._api.stop(grace)
        await self._engine.close()
        if self._http:
            self._http.close()
        if self._probes:
            await self._probes.stop(0)
        if self._admin:
            await self._admin.cleanup()


def host_and_port(key: str, address: str) -> tuple[str, int]:
    """Return the parts of HOST:PORT; ConfigError naming the key otherwise."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{key} = {address!r}: must be HOST:PORT with a port from 0 to 65535")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(key: str, address: str) -> socket.socket:
    host, port = host_and_port(key, address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(f"{key} = {address!r}: cannot be bound: {error.strerror}") from None
    return sock


def _bind(server: grpc.aio.Server, key: str, address: str) -> str:
    host, _ = host_and_port(key, address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"{key} = {address!r}: cannot be bound; is it in use?")
    return f"{host}:{port}"


async def _started(server: Server, stopped: asyncio.Event) -> bool:
    """Start a server; False if it was told to stop before it served."""
    starting, stopping = (
        asyncio.ensure_future(server.start()),
        asyncio.ensure_future(stopped.wait()),
    )
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        return False
    starting.result()
    return True


async def serve(engine: Engine, options: ServerOptions) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Prints one JSON object with the real addresses on stdout once calls are served.

    Raises:
        EngineDied: the engine can generate nothing any more.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = Server(engine, options)
    if not await _started(server, stopped):
        return
    order = ("listen", "admin", "health", "http")
    found = {name: server.addresses[name] for name in order if name in server.addresses}
    print(json.dumps({"event": "serving", **found}), file=sys.stdout, flush=True)  # noqa: T201
    died: asyncio.Event | None = getattr(engine, "died", None)
    ends = [asyncio.ensure_future(event.wait()) for event in (stopped, died) if event is not None]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    dead = died is not None and died.is_set()
    for end in ends:
        end.cancel()
    await server.stop(0.0 if dead else options.drain_seconds)
    if dead:
        raise EngineDied("the engine has died; the log says why")

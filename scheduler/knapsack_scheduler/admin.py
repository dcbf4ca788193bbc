"""Admin HTTP: metrics for Prometheus, probes, and a page a person can read."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from knapsack_scheduler.errors import Unauthenticated
from knapsack_scheduler.livepage import LivePage
from knapsack_scheduler.security import TokenGuard

_PROBES = ("/healthz", "/readyz")


def _authorised(request: web.Request, guard: TokenGuard) -> bool:
    """Return whether a request carries a token for every run.

    As a bearer token, as Prometheus sends it, or as the password of a browser's question.
    """
    kind, _, value = request.headers.get("Authorization", "").partition(" ")
    if kind == "Basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind != "Bearer":
        return False
    try:
        return guard.bearer(value).is_everywhere
    except Unauthenticated:
        return False


def admin_app(
    registry: CollectorRegistry,
    page: LivePage,
    ready: Callable[[], bool],
    guard: TokenGuard | None = None,
) -> web.Application:
    """Return the admin application.

    Args:
        registry: what ``/metrics`` exposes.
        page: what ``/`` shows.
        ready: whether calls are served.
        guard: who may see the runs: holders of a token for every run. None for everybody.
            Probes need no token.
    """

    @web.middleware
    async def guarded(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if guard is None or request.path in _PROBES or _authorised(request, guard):
            return await handler(request)
        return web.Response(
            text="needs a token for every run (*), as bearer token or as password\n",
            status=401,
            headers={"WWW-Authenticate": 'Basic realm="knapsack-scheduler"'},
        )

    async def metrics(request: web.Request) -> web.Response:
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(registry), headers={"Content-Type": content_type})

    async def alive(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readiness(_request: web.Request) -> web.Response:
        if ready():
            return web.Response(text="ok\n")
        return web.Response(text="not serving\n", status=503)

    async def index(_request: web.Request) -> web.Response:
        return web.Response(text=page.render(ready()), content_type="text/html")

    app = web.Application(middlewares=[guarded])
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", alive)
    app.router.add_get("/readyz", readiness)
    app.router.add_get("/", index)
    return app

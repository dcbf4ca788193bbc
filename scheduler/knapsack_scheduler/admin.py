"""Admin HTTP: metrics for Prometheus, probes, and a page a person can read."""

from __future__ import annotations

import base64
import binascii
import html
from collections import deque
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from knapsack_scheduler.errors import Unauthenticated
from knapsack_scheduler.events import BudgetDivided, Event, OutcomesCounted, RunRemoved
from knapsack_scheduler.security import TokenGuard

_RECENT = 12
_MOST_RUNS = 200
_PROBES = ("/healthz", "/readyz")


class LivePage:
    """Listens to events and shows the runs as they go."""

    def __init__(self) -> None:
        self._runs: dict[str, BudgetDivided | None] = {}
        self._counts: dict[str, list[int]] = {}
        self._known: dict[str, int] = {}
        self._recent: deque[BudgetDivided] = deque(maxlen=_RECENT)

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case BudgetDivided():
                self._runs.pop(event.run_id, None)
                self._runs[event.run_id] = event
                self._recent.appendleft(event)
                while len(self._runs) > _MOST_RUNS:
                    self._drop(next(iter(self._runs)))
            case OutcomesCounted(imported=False):
                counted = event.counted
                sums = self._counts.setdefault(event.run_id, [0, 0, 0, 0])
                sums[0] += counted.groups
                sums[1] += counted.effective_groups
                sums[2] += counted.accepted
                sums[3] += counted.effective_rollouts
                self._known[event.run_id] = event.known_prompts
                self._runs.setdefault(event.run_id, None)
            case RunRemoved():
                self._drop(event.run_id)

    def _drop(self, run_id: str) -> None:
        for column in (self._runs, self._counts, self._known):
            column.pop(run_id, None)

    def render(self, ready: bool) -> str:
        """Return the page."""
        rows = "".join(self._run_row(run_id) for run_id in reversed(self._runs))
        recent = "".join(_allocation_row(event) for event in self._recent)
        return _PAGE.format(
            state="serving" if ready else "draining",
            runs=rows or _NOTHING.format(7, "No allocation or report since the start."),
            recent=recent or _NOTHING.format(7, "None yet."),
        )

    def _run_row(self, run_id: str) -> str:
        newest = self._runs[run_id]
        groups, effective, rollouts, in_effective = self._counts.get(run_id, [0, 0, 0, 0])
        predicted = newest.reasons.effective_group_rate if newest else None
        return _row(
            run_id,
            newest.step if newest else "",
            self._known.get(run_id, 0),
            f"{rollouts:,}",
            _percent(predicted),
            _percent(effective / groups if groups else None),
            _percent(in_effective / rollouts if rollouts else None),
        )


def _allocation_row(event: BudgetDivided) -> str:
    reasons = event.reasons
    return _row(
        event.run_id,
        event.step,
        event.wave,
        event.prompts,
        f"{event.allocated:,}",
        reasons.largest_group,
        f"{reasons.value:.3f} / {reasons.uniform_value:.3f}",
    )


def _row(*cells: object) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_NOTHING = "<tr><td colspan={}>{}</td></tr>"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>knapsack-scheduler</title>
<meta http-equiv="refresh" content="5"><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1d2433; background: #fff; }}
table {{ border-collapse: collapse; width: 100%; margin-bottom: 2rem; }}
th, td {{ text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #dde2ea; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ font-weight: 600; color: #566078; }}
.state {{ background: #e5f3ea; color: #1c6b3a; border-radius: 1rem; padding: .1rem .7rem;
          font-size: .8rem; }}
</style></head><body>
<h1>knapsack-scheduler <span class="state">{state}</span></h1>
<h2>Runs since the start</h2>
<table><tr><th>run</th><th>step</th><th>known prompts</th><th>rollouts reported</th>
<th>effective groups, predicted</th><th>effective groups, realised</th>
<th>rollouts in effective groups</th></tr>{runs}</table>
<h2>Recent allocations</h2>
<table><tr><th>run</th><th>step</th><th>wave</th><th>prompts</th><th>rollouts</th>
<th>largest group</th><th>value / uniform</th></tr>{recent}</table>
<p><a href="/metrics">metrics</a> · <a href="/readyz">readyz</a></p></body></html>"""


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

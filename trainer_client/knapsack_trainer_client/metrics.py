"""What the clients of this process do, for Prometheus.

The client lives in the trainer, so its metrics do too: ``expose_metrics`` serves them on a
port of their own, ``register_metrics`` adds them to a registry that the trainer serves
already. Needs ``prometheus-client``; nothing else of this package does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from knapsack_trainer_client.errors import ExtraMissing, refused
from knapsack_trainer_client.telemetry import ClientStats

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

DEFAULT_ADDRESS = "127.0.0.1:9466"
"""Where ``expose_metrics`` listens unless told otherwise."""


class _Client(Protocol):
    """A ``BudgetClient`` or an ``AsyncBudgetClient``."""

    @property
    def run_id(self) -> str:
        """Name of the run."""

    def stats(self) -> ClientStats:
        """Return what was counted since the client was made."""


def expose_metrics(client: _Client, address: str = DEFAULT_ADDRESS) -> Callable[[], None]:
    """Serve the metrics of a client over HTTP, with those of the process.

    Args:
        client: of the run; its metrics end with it.
        address: host and port to listen at. Loopback unless Prometheus is elsewhere: there is
            no authentication.

    Returns:
        A function that ends it.

    Raises:
        ExtraMissing: prometheus-client is not installed.
        InvalidRequest: the address is none.
        OSError: it cannot be listened at.
    """
    _installed()
    from prometheus_client import (
        PROCESS_COLLECTOR,
        CollectorRegistry,
        start_http_server,
    )

    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise refused("address", address, 'must be HOST:PORT, such as "127.0.0.1:9466"')
    registry = CollectorRegistry()
    registry.register(PROCESS_COLLECTOR)
    register_metrics(client, registry)
    server, thread = start_http_server(int(port), host.strip("[]"), registry)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


def register_metrics(client: _Client, registry: CollectorRegistry) -> None:
    """Add the metrics of a client to a registry, for as long as the client lives.

    One client a registry and run: two of one run would be one series twice.
    """
    _installed()
    registry.register(_Collector(client))


def _installed() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ExtraMissing(
            "metrics need prometheus-client: pip install 'knapsack-rl[metrics]'"
        ) from error


class _Collector:
    """Reads a client's counts at every scrape; see METRICS.md."""

    def __init__(self, client: _Client) -> None:
        self._client = weakref.ref(client)
        self._run_id = client.run_id

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what a second client of the process has is the same."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the metrics; none once the client is gone."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        client = self._client()
        if client is None:
            return
        stats = client.stats()
        for name, text, value in (
            (
                "allocations",
                "Allocations handed to the trainer, waves included.",
                stats.allocations,
            ),
            (
                "fallbacks",
                "Allocations that were uniform because the scheduler did not answer.",
                stats.fallbacks,
            ),
            ("reports_sent", "Reports delivered at once.", stats.reports_sent),
            ("reports_queued", "Reports put into the outbox.", stats.reports_queued),
            ("reports_delivered", "Reports delivered from the outbox.", stats.reports_delivered),
            (
                "reports_dropped",
                "Waiting reports given up, by the bound of the outbox or a rewind.",
                stats.reports_dropped,
            ),
            (
                "reports_refused",
                "Waiting reports that the scheduler refused as invalid.",
                stats.reports_refused,
            ),
            ("call_failures", "Calls without a usable answer.", stats.failures),
            ("call_retries", "Attempts repeated within a call's timeout.", stats.retries),
        ):
            counter = CounterMetricFamily(f"knapsack_client_{name}", text, labels=["run_id"])
            counter.add_metric([self._run_id], value)
            yield counter
        for name, text, value in (
            ("pending_reports", "Reports that wait in the outbox.", stats.pending_reports),
            (
                "scheduler_down",
                "1 while the scheduler is known to be down and calls do not wait for it.",
                int(stats.breaker_open),
            ),
        ):
            gauge = GaugeMetricFamily(f"knapsack_client_{name}", text, labels=["run_id"])
            gauge.add_metric([self._run_id], value)
            yield gauge

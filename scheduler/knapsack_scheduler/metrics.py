"""Events become Prometheus metrics. No label holds a prompt id; runs are bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from knapsack_scheduler.errors import SchedulerError
from knapsack_scheduler.events import (
    CallBegun,
    CallHandled,
    CertificatesRead,
    Committed,
    Event,
    LoopLagged,
    RunRead,
    SnapshotEnded,
    StoreMeasured,
)
from knapsack_scheduler.runmetrics import RunMetrics

_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAG_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

CODES = ("OK", "CANCELLED", *sorted({error.code for error in SchedulerError.__subclasses__()}))
"""Codes that every method's calls are counted under from the start: an increase from nothing
is none to Prometheus, and the first error is the one to be told of."""


class Metrics:
    """Listens to events and keeps the metrics of one registry.

    Args:
        registry: what they are registered in.
        methods: names of the RPCs.
    """

    def __init__(self, registry: CollectorRegistry, methods: tuple[str, ...] = ()) -> None:
        name = "knapsack_scheduler_{}".format
        self.runs = RunMetrics(registry)
        self.calls = Counter(
            name("calls_total"), "Calls answered or refused.", ["method", "code"], registry=registry
        )
        self.call_seconds = Histogram(
            name("call_seconds"),
            "Time from a call to its answer.",
            ["method"],
            buckets=_CALL_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            name("calls_in_progress"), "Calls under way.", ["method"], registry=registry
        )
        for method in methods:
            self.call_seconds.labels(method)
            self.in_progress.labels(method)
            for code in CODES:
                self.calls.labels(method, code)
        self.commit_seconds = Histogram(
            name("store_transaction_seconds"),
            "Time of one transaction of the store.",
            buckets=_CALL_SECONDS,
            registry=registry,
        )
        self.commit_failures = Counter(
            name("store_failures_total"),
            "Transactions of the store that failed.",
            registry=registry,
        )
        self.commits_not_begun = Counter(
            name("store_busy_total"),
            "Transactions that were not begun: the threads for them were busy.",
            registry=registry,
        )
        self.snapshots = Counter(
            name("snapshots_total"), "Snapshots of runs.", ["result"], registry=registry
        )
        for result in ("written", "failed"):
            self.snapshots.labels(result)
        self.run_reads = Counter(
            name("run_reads_total"),
            "Calls that had to read their run from the store.",
            registry=registry,
        )
        self._store_bytes: dict[str, Gauge] = {}
        self._ends: Gauge | None = None
        self._registry = registry
        self.loop_lag = Histogram(
            name("event_loop_lag_seconds"),
            "How much later than it was due the event loop came to a timer, once a second.",
            buckets=_LAG_SECONDS,
            registry=registry,
        )

    def describe(
        self,
        *,
        version: str,
        store: str,
        ready: Callable[[], float],
        used_bytes: Callable[[], float],
        most_bytes: int,
        loaded_bytes: Callable[[], float],
        most_loaded_bytes: int,
    ) -> None:
        """Show what the server is, and what is asked for at every scrape.

        Args:
            version: of the program.
            store: kind of the store.
            ready: 1 while calls are served, else 0.
            used_bytes: of requests and answers in memory.
            most_bytes: that these may take.
            loaded_bytes: of runs in memory.
            most_loaded_bytes: that these may take while they are not used.
        """
        name = "knapsack_scheduler_{}".format
        info = Gauge(
            name("build_info"),
            "Always 1; its labels say what runs.",
            ["version", "store"],
            registry=self._registry,
        )
        info.labels(version, store).set(1)
        for gauge, text, value in (
            ("ready", "1 while calls are served, 0 while it starts or drains.", ready),
            ("inflight_bytes", "Bytes of requests and answers in memory.", used_bytes),
            ("inflight_limit_bytes", "Bytes that these may take.", lambda: most_bytes),
            ("loaded_bytes", "Bytes of runs in memory, about.", loaded_bytes),
            ("loaded_limit_bytes", "Bytes that these may take.", lambda: most_loaded_bytes),
        ):
            Gauge(name(gauge), text, registry=self._registry).set_function(value)

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case CallBegun():
                self.in_progress.labels(event.method).inc()
            case CallHandled():
                self.in_progress.labels(event.method).dec()
                self.calls.labels(event.method, event.code).inc()
                self.call_seconds.labels(event.method).observe(event.seconds)
            case Committed():
                self.commit_seconds.observe(event.seconds)
                self.commit_failures.inc(int(event.failed))
                self.commits_not_begun.inc(int(event.busy))
            case SnapshotEnded():
                self.snapshots.labels("failed" if event.failed else "written").inc()
            case RunRead():
                self.run_reads.inc()
            case LoopLagged():
                self.loop_lag.observe(event.seconds)
            case StoreMeasured():
                self._measured("store_bytes", "Bytes of the store's files.", event.bytes)
                self._measured(
                    "store_free_bytes", "Bytes free on the disk of the store.", event.free_bytes
                )
                self._measured(
                    "store_disk_bytes", "Size of the disk of the store.", event.disk_bytes
                )
            case CertificatesRead():
                self._certificates_end(event.ends)
        self.runs(event)

    def _certificates_end(self, ends: Mapping[str, float]) -> None:
        # Only a server with TLS has them.
        if self._ends is None:
            self._ends = Gauge(
                "knapsack_scheduler_certificate_expiration_timestamp_seconds",
                "When the first certificate of a file that the API serves with ends, Unix time.",
                ["file"],
                registry=self._registry,
            )
        self._ends.clear()
        for file, end in ends.items():
            self._ends.labels(file).set(end)

    def _measured(self, name: str, text: str, value: int) -> None:
        # Only a store that is a file has them; 0 for another would be a full disk.
        gauge = self._store_bytes.get(name)
        if gauge is None:
            gauge = self._store_bytes[name] = Gauge(
                f"knapsack_scheduler_{name}", text, registry=self._registry
            )
        gauge.set(value)

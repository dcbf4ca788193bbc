"""Events become Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from knapsack_genserver.engine import EngineStatus
from knapsack_genserver.events import (
    CallHandled,
    Event,
    GroupCompleted,
    RolloutDelivered,
    WeightsUpdated,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
_GROUP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """Listens to events and keeps the metrics of one registry.

    Args:
        registry: what they are registered in.
        status: how the engine is, asked for at every scrape.
    """

    def __init__(self, registry: CollectorRegistry, status: Callable[[], EngineStatus]) -> None:
        name = "knapsack_genserver_{}".format
        self.calls = Counter(
            name("calls_total"), "Calls answered or refused.", ["method", "code"], registry=registry
        )
        self.call_seconds = Histogram(
            name("call_seconds"),
            "Time from a call to its end.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rollouts = Counter(
            name("rollouts_total"),
            "Rollouts handed out, by why they ended.",
            ["finish_reason"],
            registry=registry,
        )
        self.tokens = Counter(
            name("completion_tokens_total"), "Tokens of rollouts handed out.", registry=registry
        )
        self.group_size = Histogram(
            name("group_size_rollouts"),
            "Rollouts asked for of one prompt.",
            buckets=_GROUP_SIZES,
            registry=registry,
        )
        self.group_seconds = Histogram(
            name("group_seconds"),
            "Time from a request to the last rollout of one of its prompts.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.updates = Counter(
            name("weight_updates_total"), "Weight updates.", ["result"], registry=registry
        )
        self.update_seconds = Histogram(
            name("weight_update_seconds"),
            "Time from a weight update's arrival to its end.",
            buckets=_SECONDS,
            registry=registry,
        )
        for gauge, text, value in (
            ("running_rollouts", "Rollouts being generated.", lambda: status().running),
            ("waiting_rollouts", "Rollouts waiting for a place.", lambda: status().waiting),
            ("weight_version", "Version of the weights.", lambda: status().weight_version),
            ("replicas", "Copies of the model that generate.", lambda: status().replicas),
        ):
            Gauge(name(gauge), text, registry=registry).set_function(value)

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case CallHandled():
                self.calls.labels(event.method, event.code).inc()
                self.call_seconds.labels(event.method).observe(event.seconds)
            case RolloutDelivered():
                self.rollouts.labels(event.reason.value).inc()
                self.tokens.inc(event.tokens)
            case GroupCompleted():
                self.group_size.observe(event.rollouts)
                self.group_seconds.observe(event.seconds)
            case WeightsUpdated():
                self.updates.labels("failed" if event.failed else "served").inc()
                self.update_seconds.observe(event.seconds)

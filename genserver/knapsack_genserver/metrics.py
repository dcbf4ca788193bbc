"""Events become Prometheus metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from knapsack_genserver.engine import EngineStatus, FinishReason
from knapsack_genserver.events import (
    CallHandled,
    Event,
    GroupCompleted,
    RolloutDelivered,
    RolloutsGivenUp,
    ServingBegan,
    SessionRefused,
    WaveAdmitted,
    WaveCompleted,
    WeightsUpdated,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
_GROUP_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_RATIOS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0, 10.0)
_LEAST_FOR_TAIL = 20
"""Rollouts of a wave: of fewer, the last is within the 95 %."""

_NAME = "knapsack_genserver_{}".format


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the server is.

    Attributes:
        engine: its status, with what the server keeps waiting for it.
        calls: that generate.
        unread: rollouts that have finished and have not been read.
    """

    engine: EngineStatus
    calls: int = 0
    unread: int = 0


class Metrics:
    """Listens to events and keeps the metrics of one registry.

    Args:
        registry: what they are registered in.
        load: how busy the server is, asked for once at every scrape.
    """

    def __init__(self, registry: CollectorRegistry, load: Callable[[], Load]) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_NAME(name), text, labels, registry=registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
        ) -> Histogram:
            return Histogram(_NAME(name), text, labels, buckets=buckets, registry=registry)

        self.calls = counter("calls_total", "Calls answered or refused.", "method", "code")
        self.call_seconds = histogram("call_seconds", "Time from a call to its end.", "method")
        self.refusals = counter(
            "refusals_total", "Calls, and requests in sessions, that were refused.", "reason"
        )
        self.rollouts = counter(
            "rollouts_total", "Rollouts finished, by why they ended.", "finish_reason"
        )
        for reason in FinishReason:
            self.rollouts.labels(reason.value)
        self.given_up = counter(
            "rollouts_given_up_total",
            "Rollouts asked for that will not come: their group was stopped or their call ended.",
            "why",
        )
        for why in ("stopped", "cancelled"):
            self.given_up.labels(why)
        self.tokens = counter("completion_tokens_total", "Tokens of finished rollouts.")
        self.prompt_tokens = counter(
            "prompt_tokens_total", "Tokens of prompts, each counted once per call."
        )
        self.group_size = histogram(
            "group_size_rollouts",
            "Rollouts asked for of one prompt in one wave.",
            buckets=_GROUP_SIZES,
        )
        self.group_seconds = histogram(
            "group_seconds", "Time from a wave's arrival to the last rollout of one of its prompts."
        )
        self.wave_seconds = histogram(
            "wave_seconds", "Time from a wave's arrival to its last rollout."
        )
        self.tail_ratio = histogram(
            "wave_tail_ratio",
            "Time to the last rollout of a wave over the time to 95 % of them.",
            buckets=_RATIOS,
        )
        self.updates = counter("weight_updates_total", "Weight updates.", "result")
        for result in ("served", "failed"):
            self.updates.labels(result)
        self.update_seconds = histogram(
            "weight_update_seconds", "Time from a weight update's arrival to its end."
        )
        self.pause_seconds = histogram(
            "weight_pause_seconds", "Time of a weight update in which no token was made."
        )
        self.weights_since = Gauge(
            _NAME("weights_loaded_timestamp_seconds"),
            "When the weights that serve began to, in Unix time.",
            registry=registry,
        )
        registry.register(_Levels(load))

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case RolloutDelivered():
                self.rollouts.labels(event.reason.value).inc()
                self.tokens.inc(event.tokens)
            case GroupCompleted():
                self.group_seconds.observe(event.seconds)
            case WaveAdmitted():
                self.prompt_tokens.inc(event.prompt_tokens)
                for size in event.group_sizes:
                    self.group_size.observe(size)
            case WaveCompleted():
                self.wave_seconds.observe(event.seconds)
                if event.rollouts >= _LEAST_FOR_TAIL and not event.stopped:
                    self.tail_ratio.observe(event.seconds / max(event.seconds_to_95, 1e-9))
            case RolloutsGivenUp():
                self.given_up.labels(event.why).inc(event.rollouts)
            case CallHandled():
                self.calls.labels(event.method, event.code).inc()
                self.call_seconds.labels(event.method).observe(event.seconds)
                if event.reason:
                    self.refusals.labels(event.reason).inc()
            case SessionRefused():
                self.refusals.labels(event.reason).inc()
            case ServingBegan():
                self.weights_since.set(time.time())
            case WeightsUpdated():
                self.updates.labels("failed" if event.failed else "served").inc()
                self.update_seconds.observe(event.seconds)
                if event.paused_seconds is not None:
                    self.pause_seconds.observe(event.paused_seconds)
                if not event.failed:
                    self.weights_since.set(time.time())


class _Levels:
    """What is as it is at the moment of a scrape."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        load = self._load()
        engine = load.engine
        for name, text, value in (
            ("running_rollouts", "Rollouts being generated.", engine.running),
            ("waiting_rollouts", "Rollouts waiting for a place.", engine.waiting),
            (
                "unread_rollouts",
                "Rollouts that have finished and that their callers have not read.",
                load.unread,
            ),
            ("calls_under_way", "Calls that generate.", load.calls),
            (
                "capacity_rollouts",
                "Rollouts that the engine is given at once, running and waiting.",
                engine.capacity,
            ),
            ("weight_version", "Version of the weights that serve.", engine.weight_version),
            ("replicas", "Copies of the model that generate.", engine.replicas),
            (
                "wanted_replicas",
                "Copies of the model that there should be.",
                engine.wanted_replicas,
            ),
        ):
            yield GaugeMetricFamily(_NAME(name), text, value)
        yield _by_replica(engine)
        for name, text, value in (
            (
                "prefix_cache_queried_tokens",
                "Prompt tokens looked up in the prefix cache, once per chunk of a group.",
                engine.prefix_queried_tokens,
            ),
            (
                "prefix_cache_hit_tokens",
                "Prompt tokens that were found in the prefix cache.",
                engine.prefix_hit_tokens,
            ),
            ("replica_losses", "Replicas lost while they served.", engine.lost_replicas),
            (
                "redone_rollouts",
                "Rollouts asked for anew, because a replica was lost or failed with them.",
                engine.redone_rollouts,
            ),
        ):
            yield CounterMetricFamily(_NAME(name), text, value)


def _by_replica(engine: EngineStatus) -> Metric:
    """Return what each replica holds; an engine that is one copy is its only replica."""
    family = GaugeMetricFamily(
        _NAME("replica_running_rollouts"), "Rollouts that a replica holds.", labels=["replica"]
    )
    for each in engine.members:
        family.add_metric([str(each.number)], each.running)
    if not engine.members:
        family.add_metric(["1"], engine.running)
    return family

"""Events become Prometheus metrics. No label holds a prompt id; runs are bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from knapsack_scheduler.bulk_histogram import BulkHistogram
from knapsack_scheduler.events import (
    BudgetDivided,
    CallHandled,
    Committed,
    Event,
    OutcomesCounted,
    RunRemoved,
    RunRewound,
)

MOST_RUNS = 100
"""Runs with labels of their own; later ones share the label ``other``."""

_CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SOLVE_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 2.5)
_GROUP_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)


class Metrics:
    """Listens to events and keeps the metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        run = ["run_id"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"knapsack_scheduler_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(f"knapsack_scheduler_{name}", text, labels, registry=registry)

        def histogram(
            name: str, text: str, labels: list[str], buckets: tuple[float, ...]
        ) -> Histogram:
            return Histogram(
                f"knapsack_scheduler_{name}", text, labels, buckets=buckets, registry=registry
            )

        self.calls = counter("calls_total", "Calls answered or refused.", ["method", "code"])
        self.call_seconds = histogram(
            "call_seconds", "Time from a call to its answer.", ["method"], _CALL_SECONDS
        )
        self.solve_seconds = histogram(
            "solve_seconds", "Time to divide one budget.", run, _SOLVE_SECONDS
        )
        self.commit_seconds = histogram(
            "store_transaction_seconds", "Time of one transaction of the store.", [], _CALL_SECONDS
        )
        self.commit_failures = counter(
            "store_failures_total", "Transactions of the store that failed.", []
        )
        self.allocated = counter("allocated_rollouts_total", "Rollouts allocated.", run)
        self.unallocated = counter(
            "unallocated_rollouts_total", "Budget that the bounds could not hold.", run
        )
        self.reported = counter("reported_rollouts_total", "Rollouts reported and counted.", run)
        self.ignored = counter(
            "ignored_rollouts_total", "Rollouts reported of allocations that were rewound.", run
        )
        self.imported = counter("imported_rollouts_total", "Rollouts imported.", run)
        self.groups = counter("reported_groups_total", "Groups with a rollout reported.", run)
        self.effective_groups = counter(
            "effective_groups_total", "Groups whose rewards are not all equal.", run
        )
        self.effective_rollouts = counter(
            "effective_rollouts_total", "Rollouts in groups whose rewards are not all equal.", run
        )
        self.judged_groups = counter(
            "judged_groups_total", "Groups of which a predicted chance was judged.", run
        )
        self.judged_effective = counter(
            "judged_effective_groups_total", "Judged groups that came out effective.", run
        )
        self.judged_predicted = counter(
            "judged_predicted_effective_groups_total",
            "Sum of the predicted chances of the judged groups.",
            run,
        )
        self.group_size = BulkHistogram(
            "knapsack_scheduler_group_wave_rollouts",
            "Rollouts given to a group in one wave.",
            "run_id",
            _GROUP_SIZES,
            registry,
        )
        self.rewinds = counter("rewinds_total", "Rewinds.", run)
        self.group_rate = gauge(
            "predicted_effective_group_ratio",
            "Expected share of groups that are effective, of the newest allocation.",
            run,
        )
        self.rollout_rate = gauge(
            "predicted_effective_rollout_ratio",
            "Expected share of rollouts in effective groups, of the newest allocation.",
            run,
        )
        self.value = gauge("predicted_value", "Expected objective of the newest allocation.", run)
        self.uniform_value = gauge(
            "predicted_uniform_value", "Expected objective of the same budget uniformly.", run
        )
        self.unseen = gauge(
            "unseen_prompts", "Prompts without an outcome in the newest allocation.", run
        )
        self.known = gauge("known_prompts", "Prompts with an outcome.", run)
        self.step = gauge("step", "Step of the newest allocation or report.", run)
        self.policy_version = gauge("policy_version", "Policy version of the newest report.", run)
        self._by_run = [
            *(self.solve_seconds, self.allocated, self.unallocated, self.reported, self.ignored),
            *(self.imported, self.groups, self.effective_groups, self.effective_rollouts),
            *(self.judged_groups, self.judged_effective, self.judged_predicted),
            *(self.rewinds, self.group_rate, self.rollout_rate, self.value),
            *(self.uniform_value, self.unseen, self.known, self.step, self.policy_version),
        ]
        self._runs: set[str] = set()

    def label(self, run_id: str) -> str:
        """Return the run's label: its id, or ``other`` when there are too many."""
        if run_id not in self._runs and len(self._runs) >= MOST_RUNS:
            return "other"
        self._runs.add(run_id)
        return run_id

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case CallHandled():
                self.calls.labels(event.method, event.code).inc()
                self.call_seconds.labels(event.method).observe(event.seconds)
            case Committed():
                self.commit_seconds.observe(event.seconds)
                self.commit_failures.inc(int(event.failed))
            case BudgetDivided():
                self._divided(event, self.label(event.run_id))
            case OutcomesCounted():
                self._counted(event, self.label(event.run_id))
            case RunRewound():
                self.rewinds.labels(self.label(event.run_id)).inc()
            case RunRemoved():
                self._forget(event.run_id)

    def _divided(self, event: BudgetDivided, run: str) -> None:
        reasons = event.reasons
        self.solve_seconds.labels(run).observe(event.seconds)
        self.allocated.labels(run).inc(event.allocated)
        self.unallocated.labels(run).inc(max(event.unallocated, 0))
        self.group_size.observe(run, event.num_rollouts)
        self.group_rate.labels(run).set(reasons.effective_group_rate)
        self.rollout_rate.labels(run).set(reasons.effective_rollout_rate)
        self.value.labels(run).set(reasons.value)
        self.uniform_value.labels(run).set(reasons.uniform_value)
        self.unseen.labels(run).set(reasons.unseen_prompts)
        self.step.labels(run).set(event.step)

    def _counted(self, event: OutcomesCounted, run: str) -> None:
        counted = event.counted
        self.known.labels(run).set(event.known_prompts)
        if event.imported:
            self.imported.labels(run).inc(counted.accepted)
            return
        self.reported.labels(run).inc(counted.accepted)
        self.ignored.labels(run).inc(counted.ignored)
        self.groups.labels(run).inc(counted.groups)
        self.effective_groups.labels(run).inc(counted.effective_groups)
        self.effective_rollouts.labels(run).inc(counted.effective_rollouts)
        self.judged_groups.labels(run).inc(counted.judged_groups)
        self.judged_effective.labels(run).inc(counted.judged_effective_groups)
        self.judged_predicted.labels(run).inc(counted.predicted_effective_groups)
        if counted.accepted:
            self.policy_version.labels(run).set(event.policy_version)

    def _forget(self, run_id: str) -> None:
        if run_id in self._runs:
            self._runs.discard(run_id)
            for metric in self._by_run:
                metric.remove_by_labels({"run_id": run_id})
            self.group_size.remove(run_id)

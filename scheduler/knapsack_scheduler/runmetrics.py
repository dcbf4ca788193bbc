"""What runs spend and get, as Prometheus metrics. METRICS.md says what each one means."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from knapsack_scheduler.bulk_histogram import BulkHistogram
from knapsack_scheduler.core.bands import BANDS
from knapsack_scheduler.core.calibration import BINS, Calibration
from knapsack_scheduler.core.outlook import Outlook
from knapsack_scheduler.events import (
    BudgetDivided,
    CallHandled,
    Event,
    OutcomesCounted,
    Prompts,
    RunLoaded,
    RunRemoved,
    RunRewound,
)
from knapsack_scheduler.jumps import NOTICED
from knapsack_scheduler.runlabels import RunLabels

CHANCES = tuple(f"{k / BINS:g}-{(k + 1) / BINS:g}" for k in range(BINS))
"""Labels of the tenths of predicted chance."""

_SOLVE_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 2.5)
_GROUP_SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_AGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_LAGS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


class RunMetrics:
    """Listens to events of runs and keeps their metrics.

    Args:
        registry: what they are registered in.
        clock: returns seconds that never go back.
    """

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._all: list[Counter | Gauge | Histogram] = []
        self._children: dict[tuple[Counter, str], list[Counter]] = {}
        self._labels = RunLabels(clock, self._begin, self._forget)
        prefix = "knapsack_scheduler_"

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(prefix + name, text, ["run_id", *labels], registry=registry)
            self._all.append(made)
            return made

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            made = Gauge(prefix + name, text, ["run_id", *labels], registry=registry)
            self._all.append(made)
            return made

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(prefix + name, text, ["run_id"], buckets=buckets, registry=registry)
            self._all.append(made)
            return made

        def bulk(name: str, text: str, buckets: tuple[float, ...]) -> BulkHistogram:
            return BulkHistogram(prefix + name, text, "run_id", buckets, registry)

        self.allocated = counter(
            "allocated_rollouts_total", "Rollouts allocated, by the band of their prompt.", "band"
        )
        self.unallocated = counter(
            "unallocated_rollouts_total", "Budget that the bounds could not hold."
        )
        self.reported = counter("reported_rollouts_total", "Rollouts reported and counted.")
        self.unasked = counter(
            "reported_without_allocation_rollouts_total",
            "Rollouts reported and counted that the scheduler did not allocate.",
        )
        self.ignored = counter(
            "ignored_rollouts_total", "Rollouts reported of steps that a rewind had forgotten."
        )
        self.imported = counter("imported_rollouts_total", "Rollouts imported of earlier runs.")
        self.groups = counter("reported_groups_total", "Groups that had their first rollout.")
        self.effective_groups = counter(
            "effective_groups_total", "Groups whose rewards are not all equal."
        )
        self.effective_rollouts = counter(
            "effective_rollouts_total", "Rollouts in groups whose rewards are not all equal."
        )
        self.planned = {
            name: counter(f"predicted_{name}_total", text)
            for name, text in (
                ("groups", "Groups of budgets that were given out in full."),
                ("rollouts", "Rollouts of budgets that were given out in full."),
                ("effective_groups", "Groups of those budgets expected to be effective."),
                ("effective_rollouts", "Rollouts of those budgets expected in effective groups."),
                ("value", "Expected objective of those budgets."),
                ("uniform_effective_groups", "Effective groups expected had they been uniform."),
                (
                    "uniform_effective_rollouts",
                    "Rollouts expected in effective groups had those budgets been uniform.",
                ),
                ("uniform_value", "Expected objective of those budgets had they been uniform."),
            )
        }
        self.judged_groups = counter(
            "judged_groups_total", "Groups of which a predicted chance was judged.", "chance"
        )
        self.judged_effective = counter(
            "judged_effective_groups_total", "Judged groups that came out effective.", "chance"
        )
        self.judged_predicted = counter(
            "judged_predicted_effective_groups_total",
            "Sum of the predicted chances of the judged groups.",
            "chance",
        )
        self.solve_seconds = histogram(
            "solve_seconds", "Time to divide one budget.", _SOLVE_SECONDS
        )
        self.step_lag = histogram(
            "report_lag_steps", "Steps that the run had gone on when a report came.", _LAGS
        )
        self.version_lag = histogram(
            "report_lag_versions",
            "Newest policy version that the run has seen, less that of a report.",
            _LAGS,
        )
        self.group_size = bulk(
            "group_wave_rollouts", "Rollouts given to a group in one wave.", _GROUP_SIZES
        )
        self.evidence_age = bulk(
            "evidence_age_steps",
            "Steps since the newest outcome of a prompt that is allocated rollouts.",
            _AGES,
        )
        self.prompts = gauge("prompts", "Prompts of the run, by band.", "band")
        self.known = gauge("known_prompts", "Prompts with an outcome.")
        self.unseen = gauge(
            "unseen_prompts", "Prompts without an outcome in the newest allocation."
        )
        self.step = gauge("step", "Step of the newest allocation.")
        self.policy_version = gauge("policy_version", "Policy version of the newest report.")
        self.allocation_time = gauge(
            "newest_allocation_timestamp_seconds", "When rollouts were last allocated."
        )
        self.report_time = gauge(
            "newest_report_timestamp_seconds", "When rollouts were last reported."
        )
        self.pending = gauge(
            "client_pending_reports",
            "Reports that wait in the outbox of the run's client, as it said last.",
        )
        self.rewinds = counter("rewinds_total", "Rewinds.")
        self.jumps = counter(
            "jumps_total",
            "Steps and policy versions taken that were far beyond the newest ones before.",
        )
        self._bulk = (self.group_size, self.evidence_age)

    def __call__(self, event: Event) -> None:
        """Count an event."""
        match event:
            case BudgetDivided():
                self._divided(event, self._labels.of(event.run_id))
            case OutcomesCounted():
                self._counted(event, self._labels.of(event.run_id))
            case RunLoaded():
                run = self._labels.of(event.run_id)
                self._know(run, event.prompts)
                self.step.labels(run).set(event.step)
                self.policy_version.labels(run).set(event.policy_version)
            case RunRewound():
                run = self._labels.of(event.run_id)
                self.rewinds.labels(run).inc()
                self.step.labels(run).set(event.step)
                self._know(run, event.prompts)
            case RunRemoved():
                self._labels.remove(event.run_id)
            case CallHandled(code="OK", pending_reports=int(pending)) if (
                event.run_id and event.method != "DeleteRun"
            ):
                self.pending.labels(self._labels.of(event.run_id)).set(pending)

    def _divided(self, event: BudgetDivided, run: str) -> None:
        self.jumps.labels(run).inc(int(event.step_jump > NOTICED))
        by_band = np.bincount(event.bands, event.num_rollouts, len(BANDS)).tolist()
        self._add(self.allocated, run, BANDS, by_band)
        self.unallocated.labels(run).inc(max(event.unallocated, 0))
        self.solve_seconds.labels(run).observe(event.seconds)
        self.group_size.observe(run, event.num_rollouts)
        self.evidence_age.observe(run, event.evidence_ages)
        self.unseen.labels(run).set(event.reasons.unseen_prompts)
        self.step.labels(run).set(event.step)
        self.allocation_time.labels(run).set(event.end_time / 1e9)
        if event.outlook:
            self._planned(event.outlook, run)

    def _planned(self, outlook: Outlook, run: str) -> None:
        for name, metric in self.planned.items():
            # An objective may be worth less than nothing to rounding, a counter may not.
            metric.labels(run).inc(max(getattr(outlook, name), 0.0))

    def _counted(self, event: OutcomesCounted, run: str) -> None:
        counted = event.counted
        self._know(run, event.prompts)
        if event.imported:
            self.imported.labels(run).inc(counted.accepted)
            return
        self.jumps.labels(run).inc((event.step_jump > NOTICED) + (event.version_jump > NOTICED))
        self.reported.labels(run).inc(counted.accepted)
        self.unasked.labels(run).inc(0 if event.allocated else counted.accepted)
        self.ignored.labels(run).inc(counted.ignored)
        self.groups.labels(run).inc(counted.groups)
        self.effective_groups.labels(run).inc(counted.effective_groups)
        self.effective_rollouts.labels(run).inc(counted.effective_rollouts)
        if counted.judged is not None:
            self._judged(counted.judged, run)
        if counted.accepted:
            self.policy_version.labels(run).set(event.policy_version)
            self.report_time.labels(run).set(time.time())
            self.step_lag.labels(run).observe(event.step_lag)
            self.version_lag.labels(run).observe(event.version_lag)

    def _judged(self, judged: Calibration, run: str) -> None:
        self._add(self.judged_groups, run, CHANCES, judged.groups.tolist())
        self._add(self.judged_effective, run, CHANCES, judged.effective.tolist())
        self._add(self.judged_predicted, run, CHANCES, judged.predicted.tolist())

    def _add(self, metric: Counter, run: str, names: tuple[str, ...], amounts: list[float]) -> None:
        """Count an amount under each value of a metric's second label."""
        children = self._children.get((metric, run))
        if children is None:
            # All of them at once: a series that begins later would lack its first increase.
            children = self._children[metric, run] = [metric.labels(run, name) for name in names]
        for child, amount in zip(children, amounts, strict=True):
            if amount:
                child.inc(amount)

    def _know(self, run: str, prompts: Prompts) -> None:
        self.known.labels(run).set(prompts.known)
        for band, count in zip(BANDS, prompts.by_band, strict=True):
            self.prompts.labels(run, band).set(count)

    def _begin(self, run: str) -> None:
        # What never happens is 0 and not absent.
        for counter in (
            *(self.unallocated, self.reported, self.unasked, self.ignored, self.imported),
            *(self.groups, self.effective_groups, self.effective_rollouts, self.rewinds),
            self.jumps,
            *self.planned.values(),
        ):
            counter.labels(run)

    def _forget(self, run: str) -> None:
        for metric in self._all:
            metric.remove_by_labels({"run_id": run})
        self._children = {key: kept for key, kept in self._children.items() if key[1] != run}
        for histogram in self._bulk:
            histogram.remove(run)

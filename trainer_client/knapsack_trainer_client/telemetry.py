"""Events -> log lines, counters and the user's hook."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from knapsack_trainer_client.events import (
    AllocationMade,
    CallFailed,
    CallRetried,
    Event,
    NothingReported,
    OutboxFailed,
    ReportDelivered,
    ReportQueued,
    ReportRefused,
    ReportsDropped,
    ReportSent,
    RewindQueued,
    RewoundElsewhere,
    RunCreated,
    SchedulerBack,
    SchedulerLost,
    StepsBehind,
)

logger = logging.getLogger("knapsack_rl")


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Counts since the client was made.

    Attributes:
        allocations: allocations handed to the trainer, fallbacks and waves included.
        fallbacks: those that were uniform because the scheduler did not answer.
        reports_sent: reports delivered at once.
        reports_queued: reports put into the outbox.
        reports_delivered: reports delivered from the outbox by this client, those that
            an earlier process left included.
        reports_dropped: waiting reports given up, by the bound of the outbox or a rewind.
        reports_refused: waiting reports that the scheduler refused as invalid.
        pending_reports: reports of the run in the outbox when last looked at.
        failures: calls without a usable answer, whether or not a fallback hid it.
        retries: attempts repeated within a timeout.
        breaker_open: the scheduler is known to be down and calls do not wait for it.
        last_error: status and message of the newest failure; empty if none.
    """

    allocations: int = 0
    fallbacks: int = 0
    reports_sent: int = 0
    reports_queued: int = 0
    reports_delivered: int = 0
    reports_dropped: int = 0
    reports_refused: int = 0
    pending_reports: int = 0
    failures: int = 0
    retries: int = 0
    breaker_open: bool = False
    last_error: str = ""


class Telemetry:
    """Tells the log, the counters and the hook what happens; never raises."""

    def __init__(
        self, target: str, raises: bool, on_event: Callable[[Event], object] | None
    ) -> None:
        self._target = target
        self._meanwhile = (
            "calls raise until it does"
            if raises
            else "going on with uniform allocations, reports are queued"
        )
        self._on_event = on_event
        self.stats = ClientStats()

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self.stats = counted(self.stats, event)
        self._log(event)
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                logger.exception("on_event failed on %r", event)

    def pending(self, reports: int) -> None:
        """Note how many reports wait."""
        if reports != self.stats.pending_reports:
            self.stats = replace(self.stats, pending_reports=reports)

    def _log(self, event: Event) -> None:
        target = self._target
        match event:
            case SchedulerLost(call, reason):
                logger.warning(
                    "scheduler %s does not answer (%s: %s); %s",
                    target,
                    call,
                    reason,
                    self._meanwhile,
                )
            case SchedulerBack(seconds, reports):
                logger.warning(
                    "scheduler %s is back after %.1f s; reports queued: %d",
                    target,
                    seconds,
                    reports,
                )
            case CallFailed(call, reason, unreachable, denied):
                level = logging.ERROR if denied else logging.WARNING
                # One line for an outage is enough; SchedulerLost was it.
                level = logging.DEBUG if unreachable else level
                logger.log(level, "%s failed at scheduler %s: %s", call, target, reason)
            case CallRetried(call, reason):
                logger.debug("%s is tried again: %s", call, reason)
            case RunCreated(run_id):
                logger.info("run %r created at scheduler %s", run_id, target)
            case StepsBehind(run_id, step, last_step):
                logger.warning(
                    "run %r has been at step %d and is asked for step %d: what it knows is used "
                    "and added to. A resumed training calls rewind(%d) first, a new one "
                    "rewind(-1) or another run_id",
                    run_id,
                    last_step,
                    step,
                    step - 1,
                )
            case RewoundElsewhere(run_id, step, rollouts):
                logger.error(
                    "run %r was rewound by another client while step %d was generated; its %d "
                    "rollouts are not counted. Each training needs a run_id of its own",
                    run_id,
                    step,
                    rollouts,
                )
            case ReportsDropped(reports, reason):
                logger.error("queued reports dropped: %d (%s)", reports, reason)
            case ReportRefused(report_id, step, rollouts, reason):
                logger.error(
                    "queued report %s of step %d (%d rollouts) was refused and is kept as a "
                    "dead letter: %s",
                    report_id,
                    step,
                    rollouts,
                    reason,
                )
            case RewindQueued(step):
                logger.warning("rewind to step %d is queued until the scheduler is back", step)
            case NothingReported(step, rollouts):
                logger.warning(
                    "no reward of the %d rollouts of step %d was reported: all are None or NaN, "
                    "or missing",
                    rollouts,
                    step,
                )
            case OutboxFailed(path, reason):
                logger.warning(
                    "outbox %s cannot be used (%s); reports wait in memory", path, reason
                )
            case AllocationMade() | ReportSent() | ReportQueued() | ReportDelivered():
                logger.debug("%r", event)


def counted(stats: ClientStats, event: Event) -> ClientStats:
    """Return the counts after an event."""
    match event:
        case AllocationMade(is_fallback=is_fallback):
            return replace(
                stats,
                allocations=stats.allocations + 1,
                fallbacks=stats.fallbacks + is_fallback,
            )
        case CallFailed(call, reason):
            return replace(stats, failures=stats.failures + 1, last_error=f"{call}: {reason}")
        case CallRetried(call, reason):
            return replace(stats, retries=stats.retries + 1, last_error=f"{call}: {reason}")
        case SchedulerLost():
            return replace(stats, breaker_open=True)
        case SchedulerBack():
            return replace(stats, breaker_open=False)
        case ReportSent():
            return replace(stats, reports_sent=stats.reports_sent + 1)
        case ReportQueued():
            return replace(stats, reports_queued=stats.reports_queued + 1)
        case ReportDelivered():
            return replace(stats, reports_delivered=stats.reports_delivered + 1)
        case ReportsDropped(reports):
            return replace(stats, reports_dropped=stats.reports_dropped + reports)
        case ReportRefused(reason=reason):
            return replace(stats, reports_refused=stats.reports_refused + 1, last_error=reason)
        case OutboxFailed(reason=reason):
            return replace(stats, last_error=f"outbox: {reason}")
        case RunCreated() | StepsBehind() | RewoundElsewhere() | RewindQueued() | NothingReported():
            return stats

"""What happens in a client, as frozen facts for logs, counters and the user's hook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class AllocationMade:
    """An allocation was handed to the trainer.

    Attributes:
        step, wave: which.
        rollouts: how many it has.
        is_fallback: whether it is uniform because the scheduler did not answer.
        seconds: how long the trainer waited.
    """

    step: int
    wave: int
    rollouts: int
    is_fallback: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call got no usable answer; the trainer went on without.

    Attributes:
        call: name of the call, as in the wire contract.
        reason: status and message.
        unreachable: nobody answered, as against an answer that was a failure.
        denied: the scheduler stopped accepting the client's token or certificate.
    """

    call: str
    reason: str
    unreachable: bool
    denied: bool


@dataclass(frozen=True, slots=True)
class CallRetried:
    """An attempt failed and another follows within the same timeout."""

    call: str
    reason: str


@dataclass(frozen=True, slots=True)
class SchedulerLost:
    """The scheduler stopped answering: calls no longer wait for it."""

    call: str
    reason: str


@dataclass(frozen=True, slots=True)
class SchedulerBack:
    """The scheduler answers again, ``seconds`` after it was lost."""

    seconds: float
    pending_reports: int


@dataclass(frozen=True, slots=True)
class RunCreated:
    """The run was unknown to the scheduler and was created."""

    run_id: str


@dataclass(frozen=True, slots=True)
class StepsBehind:
    """The client's first allocation is of a step that the run had passed already.

    Attributes:
        run_id: the run.
        step: of the allocation.
        last_step: the furthest that the run has been.
    """

    run_id: str
    step: int
    last_step: int


@dataclass(frozen=True, slots=True)
class RewoundElsewhere:
    """A report was ignored: another client rewound the run since the allocation.

    Attributes:
        run_id: the run.
        step: of the allocation.
        rollouts: reported and not counted.
    """

    run_id: str
    step: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class ReportSent:
    """A report was delivered at once."""

    report_id: str
    step: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class ReportQueued:
    """A report waits in the outbox."""

    report_id: str
    step: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class ReportDelivered:
    """A report that waited in the outbox was delivered."""

    report_id: str
    step: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class ReportsDropped:
    """Waiting reports were given up: the outbox was full, or a rewind forgot their steps."""

    reports: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReportRefused:
    """The scheduler refused a waiting report as invalid; it is kept as a dead letter."""

    report_id: str
    step: int
    rollouts: int
    reason: str


@dataclass(frozen=True, slots=True)
class RewindQueued:
    """A rewind waits and will be delivered before anything else."""

    step: int


@dataclass(frozen=True, slots=True)
class NothingReported:
    """A report named no reward of the rollouts allocated: all are missing."""

    step: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class OutboxFailed:
    """The outbox file cannot be used; reports wait in memory until it can."""

    path: str
    reason: str


Event: TypeAlias = (
    AllocationMade
    | CallFailed
    | CallRetried
    | SchedulerLost
    | SchedulerBack
    | RunCreated
    | StepsBehind
    | RewoundElsewhere
    | ReportSent
    | ReportQueued
    | ReportDelivered
    | ReportsDropped
    | ReportRefused
    | RewindQueued
    | NothingReported
    | OutboxFailed
)
"""Everything that ``on_event`` may be called with."""

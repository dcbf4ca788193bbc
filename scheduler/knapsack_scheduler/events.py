"""What the service says happened, for whoever listens: metrics, logs, the live page.

Frozen facts. Handlers emit them and know no listener.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from knapsack_scheduler.allocations import Counted
from knapsack_scheduler.core.bands import BandArray
from knapsack_scheduler.core.outlook import Outlook
from knapsack_scheduler.core.problem import IntArray, Reasons


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call arrived.

    Attributes:
        method: name of the RPC.
        request_id: names the call in logs; the caller's own, or made here.
        metadata: of the call; may hold secrets.
    """

    method: str
    request_id: str
    metadata: Mapping[str, str | bytes]


@dataclass(frozen=True, slots=True)
class CallHandled:
    """A call was answered or refused.

    Attributes:
        method: name of the RPC.
        code: name of the gRPC status code.
        seconds: from its arrival to its answer.
        run_id: as asked for; empty if the call names none.
        call_id: request or report id; empty if it has none.
        message: why it was refused; empty if it was not.
        request_id: names the call in logs.
        pending_reports: reports of the run that the caller says wait in its outbox; None
            where it says nothing.
    """

    method: str
    code: str
    seconds: float
    run_id: str = ""
    call_id: str = ""
    message: str = ""
    request_id: str = ""
    pending_reports: int | None = None


@dataclass(frozen=True, slots=True)
class BudgetDivided:
    """An Allocate or Extend was decided (not: answered again).

    Attributes:
        run_id: the run.
        step: the trainer's.
        wave: 1 for Allocate.
        prompts: positions of the batch.
        allocated: rollouts of this wave.
        unallocated: budget that the bounds could not hold.
        reasons: of the decision.
        num_rollouts: of each position, int64[M].
        bands: of each position's prompt, int8[M]; see ``core.bands``.
        evidence_ages: steps since the newest outcome of each position's prompt that has one.
        outlook: what the whole budget is expected to bring; None while waves are to come.
        seconds: that the solver took.
        end_time: when it was done, nanoseconds since 1970.
        step_jump: steps that it is beyond the newest one before, see ``jumps.py``.
    """

    run_id: str
    step: int
    wave: int
    prompts: int
    allocated: int
    unallocated: int
    reasons: Reasons
    num_rollouts: IntArray
    bands: BandArray
    evidence_ages: IntArray
    outlook: Outlook | None
    seconds: float
    end_time: int = 0
    step_jump: int = 0


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is known of a run's prompts.

    Attributes:
        known: prompts with an outcome.
        by_band: prompts in each band, in the order of ``core.bands.BANDS``; unseen ones are
            those of allocations of which nothing was reported.
    """

    known: int
    by_band: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunLoaded:
    """A run was read from the store, before its first call."""

    run_id: str
    prompts: Prompts
    step: int
    policy_version: int


@dataclass(frozen=True, slots=True)
class RunRead:
    """A call had to read its run from the store. Emitted in the thread that read it."""

    run_id: str


@dataclass(frozen=True, slots=True)
class OutcomesCounted:
    """A report or an import was counted.

    Attributes:
        run_id: the run.
        step: of the allocation, or the report's own; -1 for an import.
        policy_version: that generated the rollouts.
        counted: what it changed.
        prompts: what is known of the run's prompts.
        allocated: the rollouts belong to an allocation.
        imported: they are of an earlier run.
        step_lag: steps that the run had gone on when they came.
        version_lag: newest policy version that the run has seen, less theirs.
        step_jump, version_jump: how far step and policy version are beyond the newest ones
            before, see ``jumps.py``.
    """

    run_id: str
    step: int
    policy_version: int
    counted: Counted
    prompts: Prompts
    allocated: bool = True
    imported: bool = False
    step_lag: int = 0
    version_lag: int = 0
    step_jump: int = 0
    version_jump: int = 0


@dataclass(frozen=True, slots=True)
class RunRewound:
    """A run forgot its later steps."""

    run_id: str
    step: int
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class RunRemoved:
    """A run was deleted."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A transaction of the store ended, or no thread came free for it.

    It is not told of a request that is wrong, in itself or for its run.

    Attributes:
        seconds: from the wait for its thread to its end, the decision of a small call included.
        failed: it could not be committed.
        busy: no thread came free for it in time; the store has not failed.
    """

    seconds: float
    failed: bool
    busy: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotEnded:
    """A snapshot was written, or could not be. Emitted in the thread that wrote it."""

    failed: bool


@dataclass(frozen=True, slots=True)
class LoopLagged:
    """The event loop came to a timer so many seconds later than it was due."""

    seconds: float


@dataclass(frozen=True, slots=True)
class StoreMeasured:
    """The store is a file, and was looked at.

    Attributes:
        bytes: of its files.
        free_bytes: left on their disk for the scheduler.
        disk_bytes: size of that disk.
    """

    bytes: int
    free_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class CertificatesRead:
    """The API serves with certificates, and they were looked at.

    Attributes:
        ends: when the first certificate of a file ends, in seconds since 1970, by the setting
            that names the file; without files of which it is not known.
    """

    ends: Mapping[str, float]


Event = (
    CallBegun
    | CallHandled
    | BudgetDivided
    | OutcomesCounted
    | RunLoaded
    | RunRead
    | RunRewound
    | RunRemoved
    | Committed
    | SnapshotEnded
    | LoopLagged
    | StoreMeasured
    | CertificatesRead
)
Listener = Callable[[Event], None]


class Events:
    """Hands events to listeners. A listener that fails is logged and harms nobody."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Add a listener; it is called on the event loop and must not block."""
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Hand an event to every listener."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:
                logging.getLogger(__name__).exception("a listener failed on %s", type(event))

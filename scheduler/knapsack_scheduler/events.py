"""What the service says happened, for whoever listens: metrics, logs, the live page.

Frozen facts. Handlers emit them and know no listener.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from knapsack_scheduler.allocations import Counted
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
    """

    method: str
    code: str
    seconds: float
    run_id: str = ""
    call_id: str = ""
    message: str = ""
    request_id: str = ""


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
        num_rollouts: of each position.
        seconds: that the solver took.
        end_time: when it was done, nanoseconds since 1970.
    """

    run_id: str
    step: int
    wave: int
    prompts: int
    allocated: int
    unallocated: int
    reasons: Reasons
    num_rollouts: IntArray
    seconds: float
    end_time: int = 0


@dataclass(frozen=True, slots=True)
class OutcomesCounted:
    """A report or an import was counted."""

    run_id: str
    step: int
    policy_version: int
    counted: Counted
    known_prompts: int
    imported: bool = False


@dataclass(frozen=True, slots=True)
class RunRewound:
    """A run forgot its later steps."""

    run_id: str
    step: int


@dataclass(frozen=True, slots=True)
class RunRemoved:
    """A run was deleted."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A transaction of the store ended.

    Attributes:
        seconds: from beginning to end, the decision inside it included.
        failed: it could not be committed.
    """

    seconds: float
    failed: bool


Event = (
    CallBegun | CallHandled | BudgetDivided | OutcomesCounted | RunRewound | RunRemoved | Committed
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

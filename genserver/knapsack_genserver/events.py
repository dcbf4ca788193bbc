"""What the service says happened, for whoever listens: metrics and logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from knapsack_genserver.engine import FinishReason


@dataclass(frozen=True, slots=True)
class CallHandled:
    """A call was answered or refused.

    Attributes:
        method: name of the RPC.
        code: name of the gRPC status code.
        seconds: from its arrival to its end.
        request_id: as given by the caller.
        message: why it was refused; empty if it was not.
    """

    method: str
    code: str
    seconds: float
    request_id: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class RolloutDelivered:
    """A rollout was handed to the stream."""

    reason: FinishReason
    tokens: int


@dataclass(frozen=True, slots=True)
class GroupCompleted:
    """Every rollout of a prompt was handed out, so many seconds after the request came."""

    rollouts: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WeightsUpdated:
    """Other weights serve, or an update failed and the old ones do."""

    version: int
    seconds: float
    failed: bool


Event = CallHandled | RolloutDelivered | GroupCompleted | WeightsUpdated
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

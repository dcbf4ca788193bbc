"""What the service says happened, for whoever listens: metrics and logs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knapsack_genserver.engine import FinishReason


@dataclass(frozen=True, slots=True)
class ServingBegan:
    """The model is loaded and calls are served."""

    weight_version: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CallHandled:
    """A call was answered or refused.

    Attributes:
        method: name of the RPC.
        code: name of the gRPC status code.
        seconds: from its arrival to its end.
        request_id: as given by the caller.
        message: why it was refused; empty if it was not.
        reason: the same as one of few words.
    """

    method: str
    code: str
    seconds: float
    request_id: str = ""
    message: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """A request in a session was refused; the session goes on."""

    code: str
    request_id: str
    message: str
    reason: str


@dataclass(frozen=True, slots=True)
class WaveAdmitted:
    """Rollouts were asked for together: a request, or one addition to a session.

    Attributes:
        group_sizes: rollouts of each prompt that has any.
        prompt_tokens: of the prompts that are new.
    """

    group_sizes: Sequence[int]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class RolloutDelivered:
    """A rollout was finished and handed over to its caller."""

    reason: FinishReason
    tokens: int


@dataclass(frozen=True, slots=True)
class GroupCompleted:
    """Every rollout of a prompt in a wave is accounted for, so long after it was asked for."""

    rollouts: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WaveCompleted:
    """Every rollout of a wave is accounted for.

    Attributes:
        request_id: as given by the caller.
        prompts, rollouts: of the wave.
        failed, stopped: rollouts of it that were no completions.
        tokens: of the completions.
        seconds: from its arrival to the last rollout.
        seconds_to_95: from its arrival until 95 % were there.
        error: why the first that failed did; empty if none did.
    """

    request_id: str
    prompts: int
    rollouts: int
    failed: int
    stopped: int
    tokens: int
    seconds: float
    seconds_to_95: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class RolloutsGivenUp:
    """Rollouts will not be finished: their group was "stopped" or their call "cancelled"."""

    rollouts: int
    why: str


@dataclass(frozen=True, slots=True)
class WeightsUpdated:
    """Other weights serve, or an update failed and the old ones do, or none.

    Attributes:
        version: that was asked for; where none was before it failed, the old one.
        seconds: from the update's arrival to its end.
        failed: the old weights serve, or none until an update succeeds.
        paused_seconds: in which no token was made; None if not known.
    """

    version: int
    seconds: float
    failed: bool
    paused_seconds: float | None = None


Event = (
    ServingBegan
    | CallHandled
    | SessionRefused
    | WaveAdmitted
    | RolloutDelivered
    | GroupCompleted
    | WaveCompleted
    | RolloutsGivenUp
    | WeightsUpdated
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

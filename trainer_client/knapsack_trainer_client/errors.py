"""What a caller of this package may catch.

KnapsackError
├── InvalidRequest        (ValueError)       an argument the scheduler refuses
│   └── RunConfigConflict                    the run exists with another config
├── SchedulerUnavailable  (ConnectionError)  no answer, and no way to go on without
├── GeneratorUnavailable  (ConnectionError)  the generation server did not answer, or stopped
├── GeneratorBusy         (ConnectionError)  the generation server's queue is full
├── WeightUpdateFailed    (RuntimeError)     the old weights serve on
├── WrongGroups           (RuntimeError)     advantages of groups that are not the allocation's
├── AccessDenied          (PermissionError)  the scheduler does not accept the caller
├── ClientMisuse          (RuntimeError)     closed, forked or in another event loop
└── ExtraMissing          (ImportError)      an optional part is not installed
"""

from __future__ import annotations


class KnapsackError(Exception):
    """Base of every error raised by this package."""


class InvalidRequest(KnapsackError, ValueError):
    """A call that is wrong whether or not the scheduler answers.

    Raised by the client where it can tell, else by the scheduler's INVALID_ARGUMENT,
    ALREADY_EXISTS, OUT_OF_RANGE or FAILED_PRECONDITION. Never replaced by a fallback.
    """


class RunConfigConflict(InvalidRequest):
    """The run exists with a config other than the one given to the client."""


class SchedulerUnavailable(KnapsackError, ConnectionError):
    """No usable answer within the timeout.

    Raised by ``allocate``, ``extend``, ``report`` and ``rewind`` only with
    ``on_unavailable="raise"``, and by calls that have no fallback, such as
    ``prompt_stats``.
    """


class GeneratorUnavailable(KnapsackError, ConnectionError):
    """The generation server did not answer, or stopped before every rollout had come."""


class GeneratorBusy(KnapsackError, ConnectionError):
    """The generation server's queue cannot hold the rollouts asked for; try again later."""


class WeightUpdateFailed(KnapsackError, RuntimeError):
    """The generation server refused or could not load the weights; the old ones serve on."""


class WrongGroups(KnapsackError, RuntimeError):
    """Advantages were not computed within the groups of the allocation; says how they were."""


class AccessDenied(KnapsackError, PermissionError):
    """The scheduler refuses the token or certificate, and never accepted it before."""


class ClientMisuse(KnapsackError, RuntimeError):
    """The client object cannot be used here: closed, forked, or another event loop."""


class ExtraMissing(KnapsackError, ImportError):
    """An optional part is not installed; the message has the command that installs it."""


def refused(field: str, value: object, allowed: str) -> InvalidRequest:
    """Return the error for a wrong argument: its name, its value and what is allowed."""
    shown = repr(value)
    if len(shown) > 200:
        shown = shown[:200] + "..."
    return InvalidRequest(f"{field} = {shown}: {allowed}")

"""What can go wrong, one tree; turned into gRPC status in ``rpc.py`` only.

SchedulerError
├── InvalidArgument      a field, its value, and what is allowed
├── NotFound             no such allocation
│   └── RunNotFound      no such run
├── AlreadyExists        an id used again with other content
├── FailedPrecondition   a call out of order
├── ResourceExhausted    a limit of the server
│   └── TooSlow          a caller that did not send or receive in time
├── Unauthenticated      no token, or an unknown one
├── PermissionDenied     a token for other runs
└── Unavailable          the call may work later, elsewhere
    ├── Busy             the calls before it take too long
    └── StoreUnavailable the journal could not be read or written
        └── StoreInterrupted  the same transaction may work if begun anew

ConfigError              a setting that the server cannot start with
"""

from __future__ import annotations


class SchedulerError(Exception):
    """A call that is refused; nothing was changed.

    Attributes:
        code: name of the gRPC status code.
    """

    code = "INTERNAL"


class InvalidArgument(SchedulerError):
    """A field of the request has a value that is not allowed.

    Attributes:
        field: its name, with the position where it is repeated.
        value: what it was.
        allowed: what is allowed.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field} = {short(value)}: {allowed}")


class NotFound(SchedulerError):
    """The run or the allocation does not exist."""

    code = "NOT_FOUND"


class RunNotFound(NotFound):
    """The run does not exist."""


class AlreadyExists(SchedulerError):
    """The id was used before, with other content."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(SchedulerError):
    """Another call must come first."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(SchedulerError):
    """A limit of the server is reached."""

    code = "RESOURCE_EXHAUSTED"


class TooSlow(ResourceExhausted):
    """The other side was too slow to send its request or to take its answer."""


class Unauthenticated(SchedulerError):
    """The call carries no token that the server knows."""

    code = "UNAUTHENTICATED"


class PermissionDenied(SchedulerError):
    """The token does not cover the run."""

    code = "PERMISSION_DENIED"


class Unavailable(SchedulerError):
    """The server cannot answer now."""

    code = "UNAVAILABLE"


class Busy(Unavailable):
    """The calls before this one take too long; nothing of it was begun."""


class StoreUnavailable(Unavailable):
    """The journal could not be read or written; nothing was acknowledged."""


class StoreInterrupted(StoreUnavailable):
    """The database ended the transaction for a reason that passes.

    The connection was lost, or another transaction had to go first. What was being
    committed may have been stored: whoever begins anew looks for it first.
    """


class ConfigError(Exception):
    """A setting that the server cannot start with; names it and the consequence."""


def short(value: object) -> str:
    """Return a value as a message shows it: of what a caller made long, the beginning."""
    text = repr(value)
    if len(text) <= 120:
        return text
    length = len(value) if isinstance(value, str) else len(text)
    return text[:100] + f"... ({length} characters)"

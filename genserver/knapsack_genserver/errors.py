"""What can go wrong, one tree; turned into gRPC status in ``rpc.py`` only.

GeneratorError
├── InvalidArgument      a field, its value, and what is allowed
├── FailedPrecondition   a weight update refused or failed, and the old weights serve; or a
│                        number of replicas that is not this server's to change
├── ResourceExhausted    a limit of the server is reached
└── Unavailable          the server starts or drains, a replica cannot be reached, or no
    │                    weights serve
    └── ReplicaLost      a replica is gone, with what it held

ConfigError              a setting or a model that the server cannot start with
EngineDied               the engine can generate nothing any more
"""

from __future__ import annotations


class GeneratorError(Exception):
    """A call that is refused.

    Attributes:
        code: name of the gRPC status code.
        reason: why, as a word for metrics; one of few.
    """

    code = "INTERNAL"
    reason = "internal"


class InvalidArgument(GeneratorError):
    """A field of the request has a value that is not allowed.

    Attributes:
        field: its name, with the position where it is repeated.
        value: what it was.
        allowed: what is allowed.
    """

    code = "INVALID_ARGUMENT"
    reason = "invalid"

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        text = repr(value)
        shown = text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
        super().__init__(f"{field} = {shown}: {allowed}")


class FailedPrecondition(GeneratorError):
    """A weight update was refused or failed; the old weights serve on.

    Args:
        message: says why.
        reason: another one, as a word for metrics.
    """

    code = "FAILED_PRECONDITION"
    reason = "weights"

    def __init__(self, message: str, reason: str = "weights") -> None:
        self.reason = reason
        super().__init__(message)


class ResourceExhausted(GeneratorError):
    """A limit of the server is reached.

    Args:
        message: names the limit.
        reason: which of them, as a word for metrics.
    """

    code = "RESOURCE_EXHAUSTED"
    reason = "full"

    def __init__(self, message: str, reason: str = "full") -> None:
        self.reason = reason
        super().__init__(message)


class Unavailable(GeneratorError):
    """The server starts or drains, a replica cannot be reached, or no weights serve."""

    code = "UNAVAILABLE"
    reason = "unavailable"


class ReplicaLost(Unavailable):
    """A replica is gone, with the rollouts and weights that it held."""


class ConfigError(Exception):
    """A setting or a model that the server cannot start with; names it and why."""


class EngineDied(Exception):
    """The engine can generate nothing any more; only a new process can."""

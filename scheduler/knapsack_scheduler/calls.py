"""A call that changes a run, as the journal stores and recognises it."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from google.protobuf.message import Message

from knapsack_scheduler import wire
from knapsack_scheduler.journal.records import Entry
from knapsack_scheduler.loaded import LoadedRun

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Repeated(Generic[Answer]):
    """A call that was made before: its answer is the stored one.

    Attributes:
        seq: number of its entry.
        answer: reads the stored answer.
    """

    seq: int
    answer: Callable[[bytes], Answer]


class Once(Generic[Answer]):
    """Returns what some work returns, which is done when it is first asked for."""

    __slots__ = ("_answers", "_work")

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answers: list[Answer] = []

    def __call__(self) -> Answer:
        """Return it; work that raises is done anew next time."""
        if not self._answers:
            self._answers.append(self._work())
        return self._answers[0]


class Call:
    """A request by its kind, its id and its content.

    A large one takes long to check and to serialise: that is done once, where others do not
    wait for it.

    Args:
        kind: allocate, extend, report, import or rewind.
        key: its request or report id.
        payload: returns its content, equal for equal requests.
        check: raises what refuses it whatever its run is like. Called more than once.
    """

    def __init__(
        self,
        kind: str,
        key: str,
        payload: Callable[[], bytes],
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.kind = kind
        self.key = key
        self._payload = payload
        self.check = check

    @classmethod
    def of(
        cls, kind: str, key: str, request: Message, check: Callable[[], object] = lambda: None
    ) -> Call:
        """Return the call of a request that is one message."""
        return cls(kind, key, lambda: wire.payload_of(request), check)

    @cached_property
    def payload(self) -> bytes:
        """Its content."""
        return self._payload()

    @cached_property
    def digest(self) -> bytes:
        """What tells it from a call with other content."""
        return wire.digest_of(self.payload)

    def prepare(self) -> None:
        """Check it, and work out content and digest, now."""
        self.check()
        _ = self.digest

    def repeated(
        self, run: LoadedRun, answer: Callable[[bytes], Answer]
    ) -> Repeated[Answer] | None:
        """Return the same call as it was made before, or None.

        Raises:
            AlreadyExists: the id was used with other content.
        """
        seq = run.recorded(self.kind, self.key, self.digest)
        return None if seq is None else Repeated(seq, answer)

    def apart(self) -> Call:
        """Return it under a name that no id can be, made of its content: its id stays free."""
        apart = copy(self)
        apart.key = f"\x01{self.digest.hex()}"
        return apart

    def entry(self, step: int, answer: Message) -> Entry:
        """Return what is to be appended for it; see ``Entry`` for the step."""
        return Entry(
            0, self.kind, self.key, 0, step, self.digest, self.payload, answer.SerializeToString()
        )

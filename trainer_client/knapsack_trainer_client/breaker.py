"""Whether the scheduler is known to be down. Pure: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Breaker:
    """Open from the first call that nobody answered until the next answer.

    Attributes:
        opened_at: when it opened, in seconds of the caller's clock; None while closed.
    """

    opened_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Calls should not wait for an answer."""
        return self.opened_at is not None

    def silent(self, now: float) -> bool:
        """Note that nobody answered; return whether that is news."""
        if self.opened_at is not None:
            return False
        self.opened_at = now
        return True

    def answered(self, now: float) -> float | None:
        """Note an answer; return for how long there was none, or None if that is no news."""
        if self.opened_at is None:
            return None
        opened_at, self.opened_at = self.opened_at, None
        return now - opened_at

"""Which runs have series of their own: a bounded number, whatever callers name their runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MOST_RUNS = 100
"""Runs with a label of their own at once."""

REST_SECONDS = 3600.0
"""A run that was silent for this long gives its place to a new one."""

OTHER = "other"
"""Label of the runs that found no place."""


class RunLabels:
    """Gives each run its id as a label as long as there is a place.

    Args:
        clock: returns seconds that never go back.
        begin: called with a label before it is returned for the first time.
        forget: called with a label whose series are to end.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        begin: Callable[[str], None],
        forget: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._begin = begin
        self._forget = forget
        self._seen: OrderedDict[str, float] = OrderedDict()

    def of(self, run_id: str) -> str:
        """Return the label of a run that something happened to."""
        now = self._clock()
        if run_id not in self._seen and len(self._seen) >= MOST_RUNS:
            oldest, since = next(iter(self._seen.items()))
            if now - since < REST_SECONDS:
                return OTHER
            self.remove(oldest)
        if run_id not in self._seen:
            self._begin(run_id)
        self._seen[run_id] = now
        self._seen.move_to_end(run_id)
        return run_id

    def remove(self, run_id: str) -> None:
        """End a run's series; one that has none is no error."""
        if self._seen.pop(run_id, None) is not None:
            self._forget(run_id)

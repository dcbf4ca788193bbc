"""The runs in memory: those used last, as many as their bytes allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from knapsack_scheduler.loaded import LoadedRun
from knapsack_scheduler.memory import give_back

LOADED_BYTES = 4 * 2**30
"""Bytes that runs in memory may take unless the server is told otherwise."""

_WORTH_GIVING_BACK = 64 * 2**20
"""Bytes that the C library is asked to give back once they are let go of."""


class LoadedRuns(Mapping[str, LoadedRun]):
    """Runs in memory by name, the one unused for longest first. Thread-safe.

    The run that was used last stays however large it is, and so do those that are being
    used: whoever works on a run takes it from here and keeps it here again.

    Args:
        most_bytes: of runs that are not being used.

    Attributes:
        bytes: of the runs that are here, about.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._runs: dict[str, LoadedRun] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self.bytes = 0

    def __getitem__(self, run_id: str) -> LoadedRun:
        """Return a run that is here."""
        return self._runs[run_id]

    def __iter__(self) -> Iterator[str]:
        """Go over the names, the one unused for longest first."""
        return iter(list(self._runs))

    def __len__(self) -> int:
        """Count the runs."""
        return len(self._runs)

    def take(self, run_id: str) -> LoadedRun | None:
        """Return the run and hold it here no longer; None if it is not here."""
        with self._lock:
            return self._take(run_id)

    def keep(self, run_id: str, run: LoadedRun) -> None:
        """Hold a run here, at the cost of those that were not used for longest."""
        let_go = 0
        with self._lock:
            self._take(run_id)
            self._runs[run_id] = run
            self._sizes[run_id] = run.bytes
            self.bytes += run.bytes
            for other in list(self._runs)[:-1] if self.bytes > self._most_bytes else ():
                let_go += self._sizes[other]
                self._take(other)
                if self.bytes <= self._most_bytes:
                    break
        if let_go >= _WORTH_GIVING_BACK:
            give_back()

    def clear(self) -> None:
        """Let go of every run."""
        for run_id in self:
            self.take(run_id)

    def _take(self, run_id: str) -> LoadedRun | None:
        self.bytes -= self._sizes.pop(run_id, 0)
        return self._runs.pop(run_id, None)

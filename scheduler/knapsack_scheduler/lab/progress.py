"""One line of progress that is written over, where somebody is looking."""

from __future__ import annotations

import time
from typing import TextIO

_EVERY_SECONDS = 0.2


class Progress:
    """A line on a terminal; nothing anywhere else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._next = 0.0

    def show(self, text: str) -> None:
        """Write the line anew; most of many calls do nothing."""
        if self._shown and time.monotonic() >= self._next:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
            self._next = time.monotonic() + _EVERY_SECONDS

    def clear(self) -> None:
        """Take the line away; the next one is shown at once."""
        self._next = 0.0
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

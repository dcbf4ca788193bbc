"""Writes the lines of a log from a thread of its own, so that nobody waits for who reads them.

A pipe that nobody reads is full after some hundred lines, and a disk may hang: who writes to
them waits for ever, and with it every call, health checks and the answer to SIGTERM.
"""

from __future__ import annotations

import logging
import os
import queue
import threading

MOST_LINES = 10_000
"""Lines that wait to be written; those beyond are lost."""

_LAST_SECONDS = 1.0
"""How long the end of the process waits for lines to be taken."""


class LogWriter(logging.Handler):
    """Hands lines to a thread, and tells how many were lost as soon as there is room again.

    Args:
        descriptor: of the open file that the lines go to.
        most_lines: that may wait.
    """

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes] = queue.Queue(most_lines)
        # Counted by different threads, so apart.
        self._not_taken = self._not_written = self._told = 0
        # A daemon: one that hangs keeps no process from its end.
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record in; never waits."""
        lost = self._not_taken + self._not_written
        if lost > self._told and self._put(self._notice(lost - self._told)):
            self._told = lost
        if not self._put(record):
            self._not_taken += 1

    def flush(self) -> None:
        """Wait until all lines are written, but not for one that hangs."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(
                lambda: not self._lines.unfinished_tasks, _LAST_SECONDS
            )

    def _put(self, record: logging.LogRecord) -> bool:
        if self._lines.full():
            return False
        # Here, where it is known what call the line is about.
        line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        self._lines.put_nowait(line)
        return True

    def _notice(self, lost: int) -> logging.LogRecord:
        message = "%d lines of the log were lost: they could not be written"
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (lost,), None)

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError:
                self._not_written += 1
            finally:
                self._lines.task_done()

"""Writes the lines of a log, and waits for nobody who should read them.

A pipe that nobody reads is full after some hundred lines, and who writes to it then waits for
ever: with the line every call, health checks and the answer to SIGTERM.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading

MOST_LINES = 10_000
"""Lines that wait to be taken; those beyond are lost."""

_LAST_SECONDS = 1.0
"""How long the end of the process waits for lines to be taken."""


class LogWriter(logging.Handler):
    """Writes at once where there is room, else leaves lines to a thread that may wait.

    What is lost is counted, in a line where it is missing.

    Args:
        descriptor: of the open file that the lines go to.
        most_lines: that may wait.
    """

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)
        self._waiting: queue.Queue[bytes] = queue.Queue(most_lines)
        # Counted by different threads, so apart.
        self._not_taken = self._not_written = self._told = 0
        # A daemon: one that hangs keeps no process from its end.
        threading.Thread(target=self._write_waiting, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record in; never waits, and never fails who logs."""
        lost = self._not_taken + self._not_written
        if lost > self._told and self._take(self._notice(lost - self._told)):
            self._told = lost
        try:
            taken = self._take(record)
        except Exception:
            # Its words do not fit its arguments, say.
            taken = False
        self._not_taken += not taken

    def flush(self) -> None:
        """Wait until all lines are written, but not for one that hangs."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(
                lambda: not self._waiting.unfinished_tasks, _LAST_SECONDS
            )

    def _take(self, record: logging.LogRecord) -> bool:
        if self._waiting.full():
            return False
        # Here, where it is known what call the line is about.
        line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
        # Those that wait go first, and a pipe with any room has it for as much as this.
        if not self._waiting.unfinished_tasks and len(line) <= select.PIPE_BUF:
            events = self._room.poll(0)
            if events and events[0][1] & select.POLLOUT:
                self._write(line)
                return True
        self._waiting.put_nowait(line)
        return True

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            self._not_written += 1

    def _write_waiting(self) -> None:
        while True:
            self._write(self._waiting.get())
            self._waiting.task_done()

    def _notice(self, lost: int) -> logging.LogRecord:
        message = "%d lines of the log were lost: they could not be written"
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (lost,), None)

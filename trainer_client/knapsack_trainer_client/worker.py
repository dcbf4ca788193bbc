"""A thread that does one thing after the other, for work that may block on a disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class Worker:
    """Runs functions in the order they were given, in a thread of its own.

    Unlike a ThreadPoolExecutor it neither holds up the end of the process nor refuses
    work while the interpreter shuts down, when a client says its last.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Return the future result of ``function``."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T] = Future()

        def job() -> None:
            # A caller that went away does not take its work back: it may be half the
            # promise to another.
            try:
                result = function()
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self._jobs.put(job)
        return future

    def stop(self) -> None:
        """End the thread once it has done what it was given."""
        if self._thread is not None:
            self._thread = None
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

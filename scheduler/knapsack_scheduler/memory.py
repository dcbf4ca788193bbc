"""Gives freed memory back to the system, which the C library does not do by itself."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return lambda _keep: 0
    return trim


_trim = _find()


def give_back() -> None:
    """Return what was freed since to the system. Takes milliseconds; call it in a thread.

    The arenas of the C library, one per thread, keep what a large call has freed: hundreds of
    megabytes that no other process could use. Does nothing where there is no such library.
    """
    _trim(0)

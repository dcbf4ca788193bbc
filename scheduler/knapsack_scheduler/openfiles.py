"""How many files the process may have open: every connection is one.

A process that has run out of them can open neither its store nor a module of its own.
"""

from __future__ import annotations

import logging
import resource

_LOG = logging.getLogger(__name__)

RESERVED = 384
"""Open files that connections of the API may not take: the store, probes, pages, the rest."""

_FEWEST = 16


def connections_within(wanted: int) -> int:
    """Return how many connections may be open, at most ``wanted``.

    Raises the process's own limit of open files for them, as far as the system allows, and
    logs a warning where that is not enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    connections = max(allowed - RESERVED, _FEWEST)
    if connections < wanted:
        _LOG.warning(
            "open files are limited to %d (ulimit -n), so %d connections are accepted at once "
            "instead of max_connections = %d",
            allowed,
            connections,
            wanted,
        )
    return min(connections, wanted)

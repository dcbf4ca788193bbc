"""Ends the connection of a caller that does not take its answers.

gRPC's asyncio server cannot end a stream whose data nobody takes: its answer stays in memory
for as long as the connection does, whatever status the call was given.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from urllib.parse import unquote

_LOG = logging.getLogger(__name__)


def hang_up(peer: str) -> bool:
    """Shut down this process's connection to a peer; returns whether there is one.

    All calls of the connection end, and what was kept for them is freed; clients connect again
    by themselves. Looks through the open files: call it in a thread.

    Args:
        peer: as gRPC names it, such as ``ipv4:127.0.0.1:40000``.
    """
    wanted = _address(peer)
    if wanted is None:
        return False
    for name in os.listdir("/dev/fd"):
        # Not duplicated and never closed: to close any file of a SQLite store that is open
        # twice would give up its locks.
        try:
            connection = socket.socket(fileno=int(name))
        except OSError:
            continue
        try:
            host, port = connection.getpeername()[:2]
            if (_plain(host), port) == wanted:
                connection.shutdown(socket.SHUT_RDWR)
                _LOG.warning("hung up on %s, which did not take its answers", peer)
                return True
        except (OSError, ValueError):
            continue
        finally:
            connection.detach()
    return False


def _address(peer: str) -> tuple[str, int] | None:
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    try:
        return (_plain(host.strip("[]")), int(port)) if kind in ("ipv4", "ipv6") else None
    except ValueError:
        return None


def _plain(host: str) -> str:
    """Return an address as text; one of IPv4 is the same on a socket of both families."""
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)

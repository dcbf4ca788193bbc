"""Ports that stay a test's own, from before its first server to after its last."""

from __future__ import annotations

import socket


class HeldPort:
    """A port of loopback that nobody else is given until it is closed.

    A port that is free when it is looked for may be another's when it is used, and so may that
    of a server that was killed before it is started again. This one is bound to a socket that
    does not listen: who connects is refused, as if there were none, and a server may listen
    there whose sockets have SO_REUSEADDR, as those of gRPC, asyncio, Python and Go have.

    Attributes:
        number: of the port.
        address: host and port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = int(self._socket.getsockname()[1])
        self.address = f"127.0.0.1:{self.number}"

    def close(self) -> None:
        """Let go of it."""
        self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""A client of a gRPC server that speaks HTTP/2 by hand, to leave out what gRPC's own would do."""

from __future__ import annotations

import socket
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE = 4


class SilentClient:
    """A connection whose window is 0: it asks, and never takes any data of an answer.

    Args:
        address: of the server, HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), timeout=60)
        window = struct.pack("!HI", _INITIAL_WINDOW_SIZE, 0)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, window))
        self._next = 1

    def call(self, method: str, message: bytes) -> None:
        """Send a whole request.

        Args:
            method: path such as ``/package.Service/Method``.
            message: serialised, of less than 16 KiB.
        """
        names = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "here",
            "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        headers = b"".join(b"\0" + _word(key) + _word(value) for key, value in names.items())
        body = struct.pack("!BI", 0, len(message)) + message
        self._socket.sendall(
            _frame(_HEADERS, _END_HEADERS, self._next, headers)
            + _frame(_DATA, _END_STREAM, self._next, body)
        )
        self._next += 2

    def wait_until_hung_up(self) -> None:
        """Read what is not data until the server closes the connection; TimeoutError if not."""
        try:
            while self._socket.recv(65536):
                pass
        except ConnectionResetError:
            pass

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _word(text: str) -> bytes:
    """Return a short text as HPACK has it: its length, then itself."""
    return bytes([len(text)]) + text.encode()

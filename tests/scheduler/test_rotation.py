"""A certificate and its key are two files, which nobody replaces at once."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from authority import Authority

from knapsack_scheduler import security
from knapsack_scheduler.security import Certificates

ROTATIONS = 100


class Served:
    """A server whose certificate and key are two files.

    Attributes:
        cert, key: the files.
        pairs: two keys and their certificates, by one authority.
    """

    def __init__(self, folder: Path) -> None:
        self._authority = Authority(folder, "authority")
        self.cert, self.key = folder / "server.pem", folder / "server.key"
        self.pairs = [self._authority.issue("server") for _ in range(2)]
        # Of another size: clocks of file systems tick too slowly for writes of a test.
        self.pairs[1] = (self.pairs[1][0] + b"\n", self.pairs[1][1] + b"\n\n\n\n\n\n\n\n")
        self.key.write_bytes(self.pairs[0][0])
        self.cert.write_bytes(self.pairs[0][1])
        self.server = grpc.server(ThreadPoolExecutor(1))
        credentials = Certificates(self.cert, self.key, None).credentials()
        self._port = self.server.add_secure_port("localhost:0", credentials)
        self.server.start()

    def connect(self) -> int:
        """Return which of the pairs a new connection is served with; ssl.SSLError if with none."""
        context = ssl.create_default_context(cafile=self._authority.cert)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("localhost", self._port), timeout=30) as connection,
            context.wrap_socket(connection, server_hostname="localhost") as secured,
        ):
            peer = secured.getpeercert(binary_form=True)
        assert peer is not None
        ours = [ssl.PEM_cert_to_DER_cert(cert.decode()) for _, cert in self.pairs]
        return ours.index(peer)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A server with the first pair."""
    made = Served(tmp_path)
    yield made
    made.server.stop(None).wait()


def test_a_key_that_comes_after_its_certificate_was_read_is_not_missed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is the new certificate and the old key, while on the disk all is well."""
    key, cert = served.pairs[1]
    check = security._check_certificates

    def late(*paths: Path) -> None:
        if served.key.read_bytes() != key:
            served.key.write_bytes(key)
        check(*paths)

    assert served.connect() == 0
    monkeypatch.setattr(security, "_check_certificates", late)
    served.cert.write_bytes(cert)
    assert served.connect() == 1


@pytest.mark.parametrize("replaced", [False, True])
def test_every_connection_is_served_while_the_two_files_are_rotated(
    served: Served, replaced: bool
) -> None:
    """With the pair before or the one after, however it falls among the changes."""
    seen, connected = [], threading.Semaphore(0)

    def put(file: Path, data: bytes) -> None:
        new = file.with_suffix(".new") if replaced else file
        new.write_bytes(data)
        new.replace(file)

    def rotate() -> None:
        for turn in range(1, ROTATIONS):
            key, cert = served.pairs[turn % 2]
            both = [(served.cert, cert), (served.key, key)]
            # Now the one first, now the other.
            for file, data in both if turn % 4 < 2 else reversed(both):
                put(file, data)
            connected.acquire()

    rotating = threading.Thread(target=rotate)
    rotating.start()
    try:
        for _ in range(ROTATIONS):
            seen.append(served.connect())
            connected.release()
    finally:
        connected.release(ROTATIONS)
        rotating.join()
    assert set(seen) == {0, 1}
    assert served.connect() == (ROTATIONS - 1) % 2

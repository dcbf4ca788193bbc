"""When certificates end, in seconds since 1970: what Python's ssl tells of them."""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from pathlib import Path

_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, for which ssl has no name: when one that has ended did is
to be told, too."""

_TURNS = 4
"""Of each side: more than any handshake takes."""


def end_of_chain(cert: Path, key: Path) -> float:
    """Return when the first certificate of a chain ends.

    ssl tells what is in a certificate only to a peer that trusts it, so a server with this one
    and a client that trusts it shake hands in memory.

    Args:
        cert: PEM certificate chain.
        key: its PEM private key, not encrypted.

    Raises:
        OSError: a file cannot be read.
        ssl.SSLError: the two do not belong together, or clients would refuse the certificate
            whatever the time, as one that is not made for servers. It is an OSError.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key, password="")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_TURNS):
        for side in (asking, answering):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return min(_end(each) for each in (asking.getpeercert(), *client.get_ca_certs()))


def end_of_authorities(client_ca: Path) -> float | None:
    """Return when the first authority of a PEM file ends; None if it holds none.

    Raises:
        OSError: it cannot be read.
        ssl.SSLError: it is no PEM file of certificates. It is an OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_verify_locations(client_ca)
    return min(map(_end, context.get_ca_certs()), default=None)


def in_words(end: float) -> str:
    """Return a time as a person reads it, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(end))


def _end(certificate: object) -> float:
    assert isinstance(certificate, dict)
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))

"""When certificates end: what openssl says, what is measured, what check says."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from authority import Authority
from prometheus_client import CollectorRegistry

from knapsack_scheduler.expiry import end_of_authorities, end_of_chain
from knapsack_scheduler.metrics import Metrics
from knapsack_scheduler.security import Certificates

METRIC = "knapsack_scheduler_certificate_expiration_timestamp_seconds"


def end_by_openssl(cert: Path) -> float:
    """Return when a certificate ends, as openssl says."""
    command = ["openssl", "x509", "-in", cert, "-noout", "-enddate"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(ssl.cert_time_to_seconds(done.stdout.strip().removeprefix("notAfter=")))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that is good for two days."""
    return Authority(tmp_path, "authority")


def test_the_first_end_of_a_file_is_told(authority: Authority, tmp_path: Path) -> None:
    """Of a leaf, of one that has ended, of the authority where that ends before its leaf."""
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    for days in ("9", "-1"):
        authority.issue_to(cert, key, days)
        assert end_of_chain(cert, key) == end_by_openssl(cert)
    authority.issue_to(cert, key, "9")
    cert.write_bytes(cert.read_bytes() + authority.cert.read_bytes())
    assert end_of_chain(cert, key) == end_by_openssl(authority.cert) < end_by_openssl(cert)
    assert end_of_chain(authority.cert, authority.key) == end_by_openssl(authority.cert)
    later, bundle = Authority(tmp_path, "later", days="9"), tmp_path / "bundle.pem"
    bundle.write_bytes(later.cert.read_bytes() + authority.cert.read_bytes())
    assert end_of_authorities(bundle) == end_by_openssl(authority.cert)
    # A certificate that is no authority's signs nobody's.
    authority.issue_to(bundle, key)
    assert end_of_authorities(bundle) is None


@pytest.fixture
def served() -> Iterator[Callable[[Certificates], int]]:
    """A function that serves with certificates and returns the port."""
    servers: list[grpc.Server] = []

    def serve(certificates: Certificates) -> int:
        server = grpc.server(ThreadPoolExecutor(1))
        servers.append(server)
        port = server.add_secure_port("localhost:0", certificates.credentials())
        server.start()
        return port

    yield serve
    for server in servers:
        server.stop(None).wait()


def test_the_metric_is_of_what_is_served(
    authority: Authority, tmp_path: Path, served: Callable[[Certificates], int]
) -> None:
    """It follows a rotation before anybody connects, and not files that cannot be served."""
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    authority.issue_to(cert, key, "3")
    certificates = Certificates(cert, key, None)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    port = served(certificates)

    def measured() -> float | None:
        metrics(certificates.ends())
        return registry.get_sample_value(METRIC, {"file": "tls_cert"})

    def seen_by_a_client() -> float:
        context = ssl.create_default_context(cafile=authority.cert)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("localhost", port), timeout=30) as connection,
            context.wrap_socket(connection, server_hostname="localhost") as secured,
        ):
            peer: Any = secured.getpeercert()
            return float(ssl.cert_time_to_seconds(peer["notAfter"]))

    first = end_by_openssl(cert)
    assert measured() == first == seen_by_a_client()
    authority.issue_to(cert, key, "5")
    second = end_by_openssl(cert)
    assert measured() == second == seen_by_a_client() > first
    # Another one's key, as between the two writes of a rotation.
    before = key.read_bytes()
    authority.issue_to(cert, key, "7")
    key.write_bytes(before)
    assert measured() == second == seen_by_a_client()
    # And where a client comes first.
    authority.issue_to(cert, key, "8")
    assert seen_by_a_client() == measured() == end_by_openssl(cert)


def test_one_whose_end_is_not_known_has_no_metric(tmp_path: Path, caplog: Any) -> None:
    """It serves, as clients may think otherwise, and the log says why; not 0, which has ended."""
    authority = Authority(tmp_path, "authority")
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    authority.issue_to(cert, key, more="extendedKeyUsage=clientAuth")
    certificates = Certificates(cert, key, authority.cert)
    assert dict(certificates.ends().ends) == {"tls_client_ca": end_by_openssl(authority.cert)}
    assert "clients may refuse it" in caplog.text


def test_check_says_how_long_certificates_are_good(
    authority: Authority, tmp_path: Path, command: Any
) -> None:
    """Each with its date; one that has ended is a fault and exit code 1."""
    cert, key = tmp_path / "server.pem", tmp_path / "server.key"
    flags = (f"--tls-cert={cert}", f"--tls-key={key}", f"--tls-client-ca={authority.cert}")
    authority.issue_to(cert, key, "9")
    done = command("check", *flags)
    assert done.returncode == 0
    assert "tls_cert: good until 20" in done.stderr
    assert "tls_client_ca: good until 20" in done.stderr
    assert "UTC, 9.0 days from now" in done.stderr
    authority.issue_to(cert, key, "-1")
    done = command("check", *flags)
    assert done.returncode == 1
    assert "fault: tls_cert: ended on 20" in done.stderr
    assert "UTC, 1.0 days ago" in done.stderr
    assert "settings are right" not in done.stderr

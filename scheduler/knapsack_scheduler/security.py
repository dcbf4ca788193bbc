"""Who may call: bearer tokens for run prefixes, and TLS whose files are read again.

A token file has a token and a run prefix per line; ``*`` is every run. Lines that are
empty or begin with ``#`` are passed over. It is read again when it changes; a file that
has become unreadable leaves the tokens as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import ssl
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from knapsack_scheduler.errors import ConfigError, PermissionDenied, Unauthenticated, short
from knapsack_scheduler.events import CertificatesRead
from knapsack_scheduler.expiry import end_of_authorities, end_of_chain, in_words

_LOG = logging.getLogger(__name__)
_BEARER = "Bearer "

_LOOKS = 5
"""At certificates that are being replaced, before the next connection looks again."""


class Watched:
    """A file's bytes, read again when the file changes or is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self.data = b""

    def changed(self) -> bool:
        """Return whether the file was read anew; OSError if it cannot be."""
        status = self._path.stat()
        # A file put in place of another may have its time and its size.
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns)
        if stamp == self._stamp:
            return False
        self.data = self._path.read_bytes()
        self._stamp = stamp
        return True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the runs that a token is for.

    Attributes:
        prefixes: of the names of those runs; ``*`` is every run.
    """

    prefixes: tuple[str, ...]

    @property
    def is_everywhere(self) -> bool:
        """Whether every run may be called, those to come among them."""
        return "*" in self.prefixes

    def covers(self, run_id: str) -> bool:
        """Return whether calls of this run may be made."""
        return self.is_everywhere or run_id.startswith(self.prefixes)

    def check(self, run_id: str) -> None:
        """Raise PermissionDenied unless calls of this run may be made.

        A call that names no run passes: it is about the runs that the caller may see, or
        refused for want of a name.
        """
        if run_id and not self.covers(run_id):
            raise PermissionDenied(f"the token does not cover run {short(run_id)}")


EVERYBODY = Caller(("*",))
"""Whoever can reach a server without tokens."""


class TokenGuard:
    """Knows the callers by the tokens of a file, which is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Watched(path)
        try:
            self._file.changed()
        except OSError as error:
            raise ConfigError(
                f"token_file = {str(path)!r}: cannot be read: {error.strerror}"
            ) from None
        self._prefixes = _parse(path, self._file.data)
        self._failed = ""

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Return who a call with this metadata is from; Unauthenticated for nobody."""
        value = str(metadata.get("authorization", ""))
        if not value.startswith(_BEARER):
            raise Unauthenticated("the call needs metadata authorization: Bearer TOKEN")
        return self.bearer(value[len(_BEARER) :])

    def bearer(self, token: str) -> Caller:
        """Return whom a token is of; Unauthenticated for nobody."""
        self._reload()
        given = _fingerprint(token.encode("utf-8", "surrogateescape"))
        # Every token is compared, so that time tells nothing of which one is near; and
        # fingerprints are, so that it tells nothing of their lengths.
        prefixes = [prefix for known, prefix in self._prefixes if hmac.compare_digest(known, given)]
        if not prefixes:
            raise Unauthenticated("the token is not known")
        return Caller(tuple(prefixes))

    def _reload(self) -> None:
        try:
            if self._file.changed():
                self._prefixes = _parse(self._path, self._file.data)
                _LOG.warning("token file read again")
                self._failed = ""
        except (OSError, ConfigError) as error:
            # Said once, not with every call.
            if self._failed != str(error):
                _LOG.error("token file cannot be read, the old tokens stay: %s", error)
            self._failed = str(error)


def _fingerprint(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _parse(path: Path, data: bytes) -> list[tuple[bytes, str]]:
    tokens = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # Zeros are what a disk may leave of a file, U+FFFD is what is no UTF-8.
        if len(words) != 2 or not "".join(words).isprintable() or "\ufffd" in line:
            raise ConfigError(
                f"token_file = {str(path)!r}: line {number} must be a token and a run prefix, "
                "in UTF-8 and without control characters"
            )
        tokens.append((_fingerprint(words[0].encode()), words[1]))
    if not tokens:
        raise ConfigError(f"token_file = {str(path)!r}: holds no token; nobody could call")
    return tokens


def warn_of_readable(paths: Iterable[Path | None]) -> None:
    """Log a warning for each file of secrets that every user of the machine may read."""
    for path in paths:
        if path is not None and path.is_file() and path.stat().st_mode & stat.S_IROTH:
            _LOG.warning("%s can be read by every user of this machine; chmod o-r it", path)


class Certificates:
    """The server's certificate, its key and its clients' authorities, as files that may change.

    What was read again serves the next connections, and what cannot serve leaves what there was:
    a file that is missing for a moment, a certificate beside another one's key. What is read while
    the files are replaced is read again, so that no certificate is served with another one's key.

    Args:
        cert: PEM certificate chain.
        key: PEM private key of the certificate.
        client_ca: PEM authorities of clients; None for clients without certificates.

    Raises:
        ConfigError: they cannot serve; says why.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = (cert, key, client_ca)
        self._files = [Watched(path) for path in self._paths if path is not None]
        # gRPC asks in threads of its own, whoever looks at the ends in another.
        self._lock = threading.Lock()
        self._is_new = False
        self._is_to_be_served = False
        self._failed = ""
        self._ends: dict[str, float] = {}
        try:
            self._read()
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
        self._is_to_be_served = False

    def ends(self) -> CertificatesRead:
        """Return when what serves ends, after a look at whether the files have changed."""
        with self._lock:
            self._refresh()
            return CertificatesRead(self._ends)

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._fetch,  # type: ignore[arg-type]  # None, for no change, is missing in the stubs.
            require_client_authentication=self._paths[2] is not None,
        )

    def _read(self) -> bool:
        """Return whether there is something new that can serve."""
        self._look()
        if not self._is_new:
            return False
        for _ in range(_LOOKS):
            _check_certificates(*self._paths)
            # What was checked is what was read, unless a file has changed since.
            if self._look():
                continue
            ends = _ends_of(*self._paths)
            if not self._look():
                break
        else:
            raise ConfigError("their files change all the time")
        self._is_new = False
        cert, key, *authorities = (file.data for file in self._files)
        self._configuration = grpc.ssl_server_certificate_configuration(
            [(key, cert)], root_certificates=authorities[0] if authorities else None
        )
        self._ends = ends
        self._is_to_be_served = True
        return True

    def _look(self) -> bool:
        """Read what has changed; returns whether anything has."""
        changed = False
        for file in self._files:
            if file.changed():
                # Remembered when another file cannot be read, and used when it can.
                changed = self._is_new = True
        return changed

    def _refresh(self) -> None:
        try:
            if self._read():
                until = (f"{name} until {in_words(end)}" for name, end in self._ends.items())
                _LOG.warning("certificates read again: %s", ", ".join(until))
                self._failed = ""
        except (OSError, ConfigError) as error:
            # Said once, not with every connection.
            if self._failed != str(error):
                _LOG.error("certificates cannot be used, the old ones stay: %s", error)
            self._failed = str(error)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            self._refresh()
            if not self._is_to_be_served:
                return None
            self._is_to_be_served = False
            return self._configuration


def _ends_of(cert: Path, key: Path, client_ca: Path | None) -> dict[str, float]:
    """Return when certificates that can serve end, by setting; without those that do not say."""
    ends: dict[str, float | None] = {}
    try:
        ends["tls_cert"] = end_of_chain(cert, key)
    except ssl.SSLError as error:
        _LOG.warning(
            "tls_cert = %r: clients may refuse it, and when it ends is not known: %s",
            str(cert), error,
        )  # fmt: skip
    if client_ca is not None:
        ends["tls_client_ca"] = end_of_authorities(client_ca)
    return {name: end for name, end in ends.items() if end is not None}


def _check_certificates(cert: Path, key: Path, client_ca: Path | None) -> None:
    """Raise ConfigError unless they can serve: gRPC itself says nothing of what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Asked for a password, it would wait at the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_cert = {str(cert)!r}, tls_key = {str(key)!r}: must be a PEM certificate and its "
            f"own key, not encrypted: {error.reason or error}"
        ) from None
    if client_ca is None:
        return
    try:
        context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls_client_ca = {str(client_ca)!r}: must hold PEM certificates: "
            f"{error.reason or error}"
        ) from None

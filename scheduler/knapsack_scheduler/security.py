"""Who may call: bearer tokens for run prefixes, and TLS whose files are read again.

A token file has a token and a run prefix per line; ``*`` is every run. Lines that are
empty or begin with ``#`` are passed over. It is read again when it changes; a file that
has become unreadable leaves the tokens as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from knapsack_scheduler.errors import ConfigError, PermissionDenied, Unauthenticated

_LOG = logging.getLogger(__name__)
_BEARER = "Bearer "


class Watched:
    """A file's bytes, read again when its time or size changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self.data = b""

    def changed(self) -> bool:
        """Return whether the file was read anew; OSError if it cannot be."""
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
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
            raise PermissionDenied(f"the token does not cover run {run_id!r}")


EVERYBODY = Caller(("*",))
"""Whoever can reach a server without tokens."""


class TokenGuard:
    """Knows the callers by the tokens of a file, which is read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Watched(path)
        self._file.changed()
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
        given = _fingerprint(token.encode())
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
        if len(words) != 2:
            raise ConfigError(
                f"token_file = {str(path)!r}: line {number} must be a token and a run prefix"
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


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Return TLS credentials that follow their files: rotation needs no restart."""
    files = [Watched(path) for path in (cert, key, *([client_ca] if client_ca else []))]
    for file in files:
        file.changed()

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(files[1].data, files[0].data)],
            root_certificates=files[2].data if client_ca else None,
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            changed = [file.changed() for file in files]
            if any(changed):
                return configuration()
        except OSError as error:
            _LOG.error("certificates cannot be read, the old ones stay: %s", error)
        return None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        fetch,  # type: ignore[arg-type]  # None, for no change, is missing in the stubs.
        require_client_authentication=client_ca is not None,
    )

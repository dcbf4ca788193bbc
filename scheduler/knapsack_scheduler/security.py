"""Who may call: bearer tokens for run prefixes, and TLS whose files are read again.

A token file has a token and a run prefix per line; ``*`` is every run. Lines that are
empty or begin with ``#`` are passed over. It is read again when it changes; a file that
has become unreadable leaves the tokens as they were.
"""

from __future__ import annotations

import hmac
import logging
from pathlib import Path
from typing import Any

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


class TokenGuard:
    """Refuses calls without a token of the file that covers their run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Watched(path)
        self._file.changed()
        self._prefixes = _parse(path, self._file.data)

    def __call__(self, request: Any, context: Any) -> None:
        """Raise Unauthenticated or PermissionDenied unless the call may be made."""
        self._reload()
        metadata = dict(context.invocation_metadata() or ())
        value = str(metadata.get("authorization", ""))
        if not value.startswith(_BEARER):
            raise Unauthenticated("the call needs metadata authorization: Bearer TOKEN")
        given = value[len(_BEARER) :].encode()
        # Every token is compared, so that time tells nothing of which one is near.
        prefixes = [prefix for token, prefix in self._prefixes if hmac.compare_digest(token, given)]
        if not prefixes:
            raise Unauthenticated("the token is not known")
        run_id = str(getattr(request, "run_id", ""))
        if "*" in prefixes:
            return
        if not run_id:
            raise PermissionDenied("the call is about every run; the token is for some")
        if not any(run_id.startswith(prefix) for prefix in prefixes):
            raise PermissionDenied(f"the token does not cover run {run_id!r}")

    def _reload(self) -> None:
        try:
            if self._file.changed():
                self._prefixes = _parse(self._path, self._file.data)
                _LOG.warning("token file read again")
        except (OSError, ConfigError) as error:
            _LOG.error("token file cannot be read, the old tokens stay: %s", error)


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
        tokens.append((words[0].encode(), words[1]))
    if not tokens:
        raise ConfigError(f"token_file = {str(path)!r}: holds no token; nobody could call")
    return tokens


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

"""A certificate authority for tests, by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str, days: str = "2") -> None:
        self._folder = folder
        self.name = name
        self.cert, self.key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl("req", "-x509", *_CURVE, "-keyout", self.key, "-out", self.cert,
                      "-days", days, "-subj", f"/CN={name}")  # fmt: skip

    def _openssl(self, *words: Any) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)

    def issue(self, name: str, days: str = "2", more: str = "") -> tuple[bytes, bytes]:
        """Return key and certificate of somebody, good for localhost."""
        key, request, cert = (self._folder / f"{self.name}-{name}.{end}" for end in
                              ("key", "csr", "pem"))  # fmt: skip
        names = self._folder / "names"
        names.write_text(f"subjectAltName=DNS:localhost\n{more}")
        self._openssl("req", *_CURVE, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        self._openssl("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key,
                      "-days", days, "-extfile", names, "-out", cert)  # fmt: skip
        return key.read_bytes(), cert.read_bytes()

    def issue_to(self, cert: Path, key: Path, days: str = "2", more: str = "") -> None:
        """Write what serves as localhost to two files."""
        pair = self.issue("server", days, more)
        key.write_bytes(pair[0])
        key.chmod(0o600)
        cert.write_bytes(pair[1])

"""The audit finds what is known of a pinned version, and says when it could not ask."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# As PyPI tells of them.
BAD = {
    "id": "PYSEC-2017-94",
    "aliases": ["CVE-2013-7459"],
    "details": "Heap-based buffer overflow in the ALGnew function.",
    "fixed_in": [],
    "link": "https://osv.dev/vulnerability/PYSEC-2017-94",
    "withdrawn": None,
}
MENDED = {**BAD, "id": "PYSEC-2024-26", "aliases": ["CVE-2024-23829"], "fixed_in": ["3.9.2"]}
TAKEN_BACK = {**BAD, "id": "PYSEC-2022-1", "withdrawn": "2023-01-01T00:00:00Z"}
KNOWN = {
    "pycrypto": {"2.6.1": [BAD]},
    "aiohttp": {"3.9.1": [MENDED], "3.14.5": [TAKEN_BACK]},
    "a-b": {"1.0": []},
}


class Index(ThreadingHTTPServer):
    """A package index on loopback that tells of advisories, of all versions or of the newest."""

    def __init__(self, known: dict[str, Any], of_versions: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.known = known
        self.of_versions = of_versions

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name, *version = self.path.removeprefix("/pypi/").removesuffix("/json").split("/")
        versions = self.server.known.get(name, {})
        wanted = version[0] if version else next(reversed(versions), "")
        there = wanted in versions and (self.server.of_versions or not version)
        self.send_response(200 if there else 404)
        self.end_headers()
        if there:
            told = {"info": {"version": wanted}, "vulnerabilities": versions[wanted]}
            self.wfile.write(json.dumps(told).encode())

    def log_message(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Audit:
    """How an audit ended."""

    code: int
    said: str
    warned: str


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[Callable[..., Audit]]:
    """A function that audits some pins by an index."""
    indexes: list[Index] = []

    def run(
        pins: str, *flags: str, known: Any = KNOWN, of_versions: bool = True, url: str = ""
    ) -> Audit:
        index = Index(known, of_versions)
        indexes.append(index)
        threading.Thread(target=index.serve_forever, args=(0.01,)).start()
        lock = tmp_path / "lock.txt"
        lock.write_text(pins)
        command = [sys.executable, ROOT / ".ci/audit", *flags, "--service", url or index.url, lock]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return Audit(done.returncode, done.stdout, done.stderr)

    yield run
    for index in indexes:
        index.shutdown()
        index.server_close()


def test_a_version_with_an_advisory_is_refused(audit: Callable[..., Audit]) -> None:
    """In a lock file with hashes as in constraints; what is mended or withdrawn is not."""
    done = audit("aiohttp==3.9.1 \\\n    --hash=sha256:0\nA_b[x]==1.0 ; python_version > '3'\n")
    assert done.code == 1
    assert "aiohttp==3.9.1 (lock.txt): CVE-2024-23829 PYSEC-2024-26" in done.said
    assert "mended in 3.9.2" in done.said
    assert "2 versions audited as of 2" in done.said
    done = audit("aiohttp==3.14.5\na.b==1.0\n", "--strict")
    assert (done.code, done.warned) == (0, ""), done
    assert "2 versions audited" in done.said
    assert audit("pycrypto==2.6.1\n", of_versions=False).code == 1


def test_what_a_mirror_does_not_tell_of_is_said(audit: Callable[..., Audit]) -> None:
    """One that knows the newest version alone: an older one is not taken for a sound one."""
    done = audit("aiohttp==3.9.1\na-b==1.0\n", of_versions=False)
    assert done.code == 0
    assert "NOT AUDITED: 1 of 2 versions" in done.warned
    assert "aiohttp==3.9.1" in done.warned
    assert "1 versions audited" in done.said
    assert audit("aiohttp==3.9.1\n", "--strict", of_versions=False).code == 1


@pytest.mark.parametrize("why", ["nobody is there", "it knows no advisories"])
def test_an_audit_that_could_not_be_done_is_loud(audit: Callable[..., Audit], why: str) -> None:
    """It does not stop who has no network, unless told to; it never looks like a clean one."""
    silent = {name: {each: [] for each in versions} for name, versions in KNOWN.items()}
    url = "http://127.0.0.1:1" if why == "nobody is there" else ""
    for flags, code in (((), 0), (("--strict",), 1)):
        done = audit("aiohttp==3.9.1\n", *flags, known=silent, url=url)
        assert done.code == code
        assert "AUDIT: NOT DONE" in done.warned
        assert "nothing is known of 1 pinned versions" in done.warned
        assert done.said == ""


def test_every_pin_is_audited() -> None:
    """No line of a constraint or lock file is passed over, and no file."""
    found = [name for names in _script().pins_of(_script().lock_files()).values() for name in names]
    lines = 0
    for file in [*ROOT.glob(".ci/*.txt"), *ROOT.glob("deploy/images/**/*requirements.txt")]:
        text = file.read_text().splitlines()
        lines += len([line for line in text if line[:1].isalnum() and "==" in line])
        if file.name != "audit-accepted.txt":
            assert file.name in found
            assert not [line for line in text if line[:1].isalnum() and "==" not in line]
    assert len(found) == lines
    assert lines > 250


def _script() -> Any:
    """Return the program as a module."""
    loader = SourceFileLoader("audit", str(ROOT / ".ci/audit"))
    spec = spec_from_loader("audit", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["audit"] = module
    loader.exec_module(module)
    return module

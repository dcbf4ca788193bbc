"""A real PostgreSQL server of this machine's binaries, on a Unix socket of its own."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MISSING = (
    "PostgreSQL is not installed: apt-get install postgresql, "
    "or put its initdb and postgres on the PATH"
)


def binaries() -> Path | None:
    """Return the folder of the newest PostgreSQL there is; None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("initdb")
    if on_path:
        found.append(Path(on_path).resolve())
    return found[-1].parent if found else None


class PostgresServer:
    """A cluster in a folder of its own, which ends with this process."""

    def __init__(self, folder: Path) -> None:
        # Debian's package; a binary of another kind lies beside its libraries.
        self._bin = binaries()
        self._folder = folder
        self._user = "postgres"
        self._prefix: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._names = itertools.count()
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root.
            names = [entry.pw_name for entry in pwd.getpwall()]
            user = "postgres" if "postgres" in names else "nobody"
            entry = pwd.getpwnam(user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
            self._prefix = [
                *("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}"),
                "--clear-groups",
            ]

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [*self._prefix, str(self._bin / program), *arguments]

    def create(self) -> None:
        """Make the cluster."""
        done = subprocess.run(
            self._command(
                "initdb",
                f"-D{self._folder / 'data'}",
                "-Atrust",
                f"-U{self._user}",
                "-EUTF8",
                "--locale=C",
                "--no-sync",
            ),
            capture_output=True,
            text=True,
            cwd=self._folder,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._folder),
            # The machine does not lose power here, and many tests share its disk.
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "60",
            "shared_buffers": "32MB",
        }
        options = [f"-c{key}={value}" for key, value in settings.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", *self._command(
                    "postgres", "-D", str(self._folder / "data"), *options
                )],
                stdout=log, stderr=log, cwd=self._folder,
            )  # fmt: skip
        ready = subprocess.run(
            ["timeout", "120", "sh", "-c", f"until {self._bin}/pg_isready -q -h {self._folder}; "
             "do kill -0 $0 && sleep 0.1; done", str(self._process.pid)]
        )  # fmt: skip
        assert ready.returncode == 0, (self._folder / "log").read_text()

    def stop(self) -> None:
        """Stop it at once, as a crash does: clients lose their connections."""
        process, self._process = self._process, None
        if process is not None:
            subprocess.run(
                self._command(
                    "pg_ctl", "stop", "-s", "-m", "immediate", "-D", str(self._folder / "data")
                ),
                cwd=self._folder,
                timeout=60,
                check=True,
            )
            process.wait(60)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement and return what it prints."""
        done = subprocess.run(
            [str(self._bin / "psql"), "-qAtX", "-h", str(self._folder), "-U", self._user,
             "-v", "ON_ERROR_STOP=1", database, "-c", statement],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def new_store(self, options: str = "") -> str:
        """Return the URL of a new, empty database, made with options of CREATE DATABASE."""
        name = f"store{next(self._names)}"
        self.sql(f"CREATE DATABASE {name} {options}")
        return f"postgresql://{self._user}@/{name}?host={self._folder}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server for the whole session; skips where there is none, but not in CI."""
    if binaries() is None:
        if os.environ.get("CI"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    # Not pytest's folder: a socket's path must be short, and its owner is another user.
    folder = Path(tempfile.mkdtemp(prefix="knapsack-pg-"))
    server = PostgresServer(folder)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)

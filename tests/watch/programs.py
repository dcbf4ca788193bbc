"""The programs that watch and are watched, as processes on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from held_port import HeldPort

ROOT = Path(__file__).resolve().parents[2]


def tool(*names: str) -> str:
    """Return the first of some programs that is installed; an error says what to do if none is."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError(f"{names[0]} is not installed; .ci/packages installs it")


def wait_until(happened: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Return when something has happened; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def get_json(url: str, **query: str | Sequence[str]) -> Any:
    """Return the JSON at an address; a refusal is returned as what it says."""
    full = f"{url}?{urllib.parse.urlencode(query, doseq=True)}" if query else url
    try:
        with urllib.request.urlopen(full, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error)


class Program:
    """A process that says nothing on stdout, or one line of JSON once it serves.

    Its ports are its own until it is closed, also while it is not running.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        speaks: bool,
        ports: Sequence[HeldPort] = (),
    ) -> None:
        self.name = name
        self._ports = ports
        self._command = list(command)
        self._log = log
        self._speaks = speaks
        self.process: subprocess.Popen[str] | None = None
        self.addresses: dict[str, str] = {}

    def start(self) -> None:
        """Start it; returns once it serves where it says so."""
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE if self._speaks else log,
                stderr=log,
                text=True,
            )
        if self._speaks:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line, f"{self.name}: {self._log.read_text()[-3000:]}"
            self.addresses = json.loads(line)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it."""
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            # What was stopped has to go on to die.
            os.kill(process.pid, signal.SIGCONT)
            process.send_signal(number)
        process.wait(60)
        if process.stdout:
            process.stdout.close()

    def close(self) -> None:
        """End it for good."""
        self.end()
        for port in self._ports:
            port.close()


class Prometheus(Program):
    """A real Prometheus that scrapes and evaluates once a second.

    Args:
        folder: for its configuration and data.
        targets: host and port by job.
        rules: files of rules.
        alertmanager: host and port, or empty.
        credentials: bearer token that targets are asked with; empty for none.
        retention: of its data.
    """

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, str],
        rules: Sequence[Path] = (),
        alertmanager: str = "",
        credentials: str = "",
        retention: str = "15d",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(rule) for rule in rules],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [target]}]}
                for job, target in targets.items()
            ],
        }
        if credentials:
            for scrape in config["scrape_configs"]:
                scrape["authorization"] = {"credentials": credentials}
        if alertmanager:
            config["alerting"] = {
                "alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]
            }
        file = folder / "prometheus.json"
        file.write_text(json.dumps(config))
        port = HeldPort()
        self.url = f"http://{port.address}"
        super().__init__(
            "prometheus",
            [
                tool("prometheus"),
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--storage.tsdb.retention.time={retention}",
                "--web.cors.origin=.*",
                f"--web.listen-address={port.address}",
                "--log.level=warn",
            ],
            folder / "prometheus.log",
            speaks=False,
            ports=[port],
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        super().start()
        wait_until(self._ready, "Prometheus is ready")

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Alertmanager(Program):
    """A real Alertmanager with a configuration file of its own."""

    def __init__(self, folder: Path, config: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = HeldPort()
        self.address = port.address
        super().__init__(
            "alertmanager",
            [
                tool("prometheus-alertmanager", "alertmanager"),
                f"--config.file={config}",
                f"--storage.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
                "--cluster.listen-address=",
                "--log.level=warn",
            ],
            folder / "alertmanager.log",
            speaks=False,
            ports=[port],
        )


class Webhook:
    """Receives what Alertmanager sends: alerts by the path that they were sent to."""

    def __init__(self) -> None:
        received: list[tuple[str, dict[str, Any]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.extend((self.path, alert) for alert in json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def scheduler(name: str, folder: Path, *flags: str) -> Program:
    """Return a scheduler that keeps its ports when it is started again."""
    ports = [HeldPort() for _ in range(3)]
    listen = [
        f"--{which}={port.address}"
        for which, port in zip(("listen", "admin-listen", "health-listen"), ports, strict=True)
    ]
    command = [sys.executable, "-m", "knapsack_scheduler.cli", "serve", "--auto-create-runs"]
    store = f"--store=sqlite:///{folder / name}.db"
    log = folder / f"{name}.log"
    return Program(name, [*command, store, *listen, *flags], log, speaks=True, ports=ports)


def generator(name: str, folder: Path, *flags: str) -> Program:
    """Return a generation server on the engine without a model; see ``odd_generator.py``."""
    command = [sys.executable, str(Path(__file__).with_name("odd_generator.py")), *flags]
    return Program(name, command, folder / f"{name}.log", speaks=True)

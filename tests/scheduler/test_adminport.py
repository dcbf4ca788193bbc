"""The admin port answers whoever asks, however many others hold on to its connections."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from aiohttp import web

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import adminport
from knapsack_scheduler.adminport import CONNECTIONS, AdminPort

pytestmark = pytest.mark.faults

HANGING = 400
FIRST_LINES = b"GET /metrics HTTP/1.1\r\nHost: here\r\nX-Slow: "


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for the connections of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def asked(address: str) -> None:
    """Ask for the probes and the metrics as a cluster and Prometheus do."""
    for path, part in (("/healthz", b"ok"), ("/readyz", b"ok"), ("/metrics", b"loaded_bytes")):
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as answer:
            assert part in answer.read()


@pytest.mark.usefixtures("many_files")
def test_it_answers_beside_many_that_are_idle_or_slow(start_scheduler: Callable[..., Any]) -> None:
    """Open files and memory stay bounded, probes and scrapes are answered, and so is the API."""
    scheduler = start_scheduler("--auto-create-runs")
    process = psutil.Process(scheduler.process.pid)
    admin = scheduler.addresses["admin"]
    host, port = admin.rsplit(":", 1)
    asked(admin)
    files, memory = process.num_fds(), process.memory_info().rss
    with contextlib.ExitStack() as held:
        hanging = []
        for number in range(HANGING):
            connection = held.enter_context(socket.create_connection((host, int(port)), 60))
            if number % 2:
                connection.sendall(FIRST_LINES)
            hanging.append(connection)
            if number % 100 == 99:
                # Those that are still there send a little more of what never ends.
                for slow in hanging[-2 * CONNECTIONS :]:
                    with contextlib.suppress(OSError):
                        slow.send(b"x")
                asked(admin)
                assert process.num_fds() <= files + CONNECTIONS + 40
                assert process.memory_info().rss <= memory + 32 * 2**20
        scheduler.stub.CreateRun(pb.CreateRunRequest(run_id="run"), timeout=60)
    asked(admin)


def test_large_headers_are_refused(start_scheduler: Callable[..., Any]) -> None:
    """However they are cut: one long line, or lines without end."""
    admin = start_scheduler().addresses["admin"]
    host, port = admin.rsplit(":", 1)
    for lines in (b"X: " + b"a" * 100_000, b"".join(b"X-%d: a\r\n" % i for i in range(5000))):
        with socket.create_connection((host, int(port)), 60) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /metrics HTTP/1.1\r\n" + lines)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(12) in (b"HTTP/1.0 400", b"HTTP/1.1 400")
    asked(admin)


async def _large(_request: web.Request) -> web.Response:
    return web.Response(body=b"." * 2**24)


async def served() -> tuple[AdminPort, int]:
    """Return an open port with one page that no socket holds whole."""
    app = web.Application()
    app.router.add_get("/", _large)
    port = AdminPort(app)
    return port, await port.open("127.0.0.1", 0)


async def test_an_answer_that_is_not_taken_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is free again, whoever still holds the connection; one that is taken is whole."""
    monkeypatch.setattr(adminport, "_TAKE_SECONDS", 0.3)
    admin, port = await served()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert await reader.readexactly(8) == b"HTTP/1.1"
        async with asyncio.timeout(60):
            while admin.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        assert len(await reader.read(-1)) > 2**24
        writer.close()
    finally:
        await admin.close()


async def test_half_a_request_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that never brings a whole one ends, and so does one that brings nothing."""
    monkeypatch.setattr(adminport, "_IDLE_SECONDS", 0.2)
    admin, port = await served()
    try:
        for sent in (FIRST_LINES, b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            async with asyncio.timeout(60):
                assert await reader.read() == b""
            writer.close()
    finally:
        await admin.close()

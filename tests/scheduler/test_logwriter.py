"""Nobody waits for who reads the log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knapsack_scheduler.logwriter import LogWriter

PAGE = 4096
"""The least that a pipe holds."""


def test_a_log_that_nobody_reads_holds_up_nothing(
    start_scheduler: Callable[..., Any], calls: Any, tmp_path: Path
) -> None:
    """Its pipe is full: calls and probes are answered, and so is SIGTERM; lines are whole."""
    log = tmp_path / "scheduler-0.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PAGE)
        scheduler = start_scheduler("--auto-create-runs")
        for step in range(60):
            scheduler.stub.Report(calls.own_report(["a"], [[1.0]], step), timeout=60)
        assert scheduler.end() == 0
        taken = os.read(reader, 2 * PAGE)
    finally:
        os.close(reader)
    # The last one may be cut.
    lines = [json.loads(line) for line in taken.splitlines()[:-1]]
    assert len(taken) <= PAGE
    steps = [line["step"] for line in lines if "step" in line]
    assert steps == list(range(len(steps)))
    assert 5 < len(steps) < 59


@pytest.fixture
def pipe() -> Any:
    """The two ends of a pipe that holds one page."""
    ends = os.pipe()
    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PAGE)
    yield ends
    for end in ends:
        os.close(end)


def test_lost_lines_are_counted_where_they_are_missing(pipe: tuple[int, int]) -> None:
    """Those that came while many waited; who waits longest is written first."""
    reader, writer = pipe
    handler = LogWriter(writer, most_lines=3)
    for number in range(10):
        handler.handle(logging.makeLogRecord({"msg": f"{number} {'x' * PAGE}"}))
    read = b""
    while read.count(b"\n") < 3:
        read += os.read(reader, PAGE)
    handler.handle(logging.makeLogRecord({"msg": "last"}))
    while not read.endswith(b"last\n"):
        read += os.read(reader, PAGE)
    *kept, notice, last = read.decode().splitlines()
    assert [line.split()[0] for line in kept] == [str(n) for n in range(len(kept))]
    assert re.match(rf"{10 - len(kept)} lines of the log were lost", notice)
    assert 3 <= len(kept) <= 4
    assert last == "last"


def test_a_line_whose_words_do_not_fit_fails_nobody(pipe: tuple[int, int]) -> None:
    """It is lost, and counted as such before the next one."""
    reader, writer = pipe
    handler = LogWriter(writer)
    handler.handle(logging.makeLogRecord({"msg": "%d prompts", "args": ("no number",)}))
    handler.handle(logging.makeLogRecord({"msg": "next"}))
    read = b""
    while not read.endswith(b"next\n"):
        read += os.read(reader, PAGE)
    assert read.decode().startswith("1 lines of the log were lost")

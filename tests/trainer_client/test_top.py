"""``knapsack-rl top`` in a real terminal, and once for scripts."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from knapsack_trainer_client import BudgetClient
from knapsack_trainer_client.cli import main
from knapsack_trainer_client.terminal import cut, shortened, width

COMMAND = [sys.executable, "-m", "knapsack_trainer_client.cli", "top", "--every", "0.2"]


def train(address: str, run_id: str, step: int) -> None:
    """Spend and report the budget of a step."""
    with BudgetClient(address, run_id, timeout=30, outbox=False) as client:
        allocation = client.allocate(["a", "b\x1b[2J"], 8, step)
        client.report(allocation, [[1, 0][: i + 1] * (n // 2) for i, n in enumerate([4, 4])], step)


def test_once_prints_a_table(shared_scheduler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per run, for scripts: no control characters."""
    train(shared_scheduler.address, "top-once", 3)
    assert main(["top", "--once", "--address", shared_scheduler.address]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[3:8] == ["step", "version", "prompts", "rollouts", "rollouts/s"]
    [row] = [row.split() for row in rows if row.startswith("top-once")]
    assert row[1:8] == ["posterior", "paper", "3", "3", "2", "6", "-"]
    assert "\x1b" not in "".join(rows)


def test_without_a_terminal_it_says_what_to_do(
    shared_scheduler: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe gets one line of error and exit code 2."""
    assert main(["top", "--address", shared_scheduler.address]) == 2
    assert "--once" in capsys.readouterr().err


def test_a_terminal_is_refreshed_and_left_as_it_was(shared_scheduler: Any) -> None:
    """Progress turns up by itself; a narrow terminal is not overrun; Ctrl-C ends it."""
    address, columns = shared_scheduler.address, 60
    train(address, "top-live", 1)
    for name in ("実験" * 20, "long-" * 20 + "end", "e\u0301" * 40):
        train(address, name, 1)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, columns, 0, 0))
    # These would win over the terminal's own size.
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*COMMAND, "--address", address],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    seen = ""

    def read_until(pattern: str) -> None:
        nonlocal seen
        while not re.search(pattern, seen):
            seen += os.read(ours, 65536).decode()

    try:
        read_until(r"top-live +1 ")
        train(address, "top-live", 2)
        read_until(r"top-live +2 ")
        # One that goes away leaves what it said last, and is found again.
        shared_scheduler.kill()
        read_until(r"no answer: (?s:.)*top-live +2 ")
        seen_before, seen = seen, ""
        shared_scheduler.start()
        read_until(r"serving(?s:.)*top-live +2 ")
        seen = seen_before + seen
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        read_until(r"\x1b\[\?1049l")
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    frames = seen.split("\x1b[H\x1b[J")[1:]
    assert len(frames) >= 2
    # What came of the rollouts is there; what does not change makes room for it.
    assert re.search(r"run +step +rollouts +rollouts/s +effective", frames[0])
    for frame in frames:
        lines = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", frame).splitlines()
        assert len(lines) <= 12
        assert max(map(width, lines)) <= columns
        assert lines[0].startswith(f"scheduler {address}")


@pytest.mark.parametrize("name", ["x" * 300, "実験" * 40, "e\u0301" * 100, "short"])
def test_names_are_cut_to_columns_and_keep_their_ends(name: str) -> None:
    """East Asian characters take two columns and combining marks none."""
    for columns in (16, 17, 60):
        text = shortened(name, columns)
        assert width(text) <= columns
        assert width(text) >= min(width(name), columns - 3)
        assert text[-1] == name[-1]
        assert width(cut(name, columns)) <= columns
    assert [width(word) for word in ("実験", "e\u0301", "ab")] == [4, 1, 2]

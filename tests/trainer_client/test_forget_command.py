"""``knapsack-rl rewind`` and ``delete`` on a real scheduler, at a terminal and in scripts."""

from __future__ import annotations

import os
import pty
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_trainer_client import BudgetClient
from knapsack_trainer_client.cli import main

COMMAND = [sys.executable, "-m", "knapsack_trainer_client.cli"]


@pytest.fixture
def address(shared_scheduler: Any) -> str:
    """Of a scheduler of whose run ``exp1`` steps 0 to 2 are known, of a new prompt each."""
    with BudgetClient(shared_scheduler.address, "exp1", timeout=30, outbox=False) as client:
        client.rewind(-1)
        for step in range(3):
            given = client.allocate(["a", f"b{step}"], 4, step)
            client.report(given, [[1, 0], [1, 1]], step)
    return str(shared_scheduler.address)


def step_of(address: str, run: str = "exp1") -> int:
    """Return the last step of a run."""
    with BudgetClient(address, run, timeout=30, outbox=False) as client:
        return client.run().last_step


def test_a_rewind_says_what_is_left(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures before and now; that it forgot nothing where there was nothing to forget."""
    command = ["rewind", "--address", address, "--run", "exp1", "--step", "1", "--yes"]
    assert main(command) == 0
    title, head, *rows, end = capsys.readouterr().out.splitlines()
    assert title == "run 'exp1': rewound to step 1"
    assert head.split() == ["before", "now"]
    figures = {row[:14].strip(): row[14:].split() for row in rows}
    assert figures["last step"] == ["2", "1"]
    assert figures["known prompts"] == ["4", "3"]
    assert figures["rollouts"] == ["12", "8"]
    before, now = map(int, figures["rewinds"])
    assert now == before + 1
    assert "ignored" in end
    assert step_of(address) == 1
    assert main(command) == 0
    assert "nothing is forgotten" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["rewind", "--step", "0"], ["delete"]])
def test_without_a_terminal_nothing_is_changed(
    address: str, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Who cannot be asked says --yes."""
    assert main([*command, "--address", address, "--run", "exp1"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert step_of(address) == 2


@pytest.mark.parametrize("command", [["rewind", "--step", "0"], ["delete"]])
def test_a_person_is_asked(address: str, command: list[str]) -> None:
    """What is at stake is shown before; only a yes changes anything."""
    for answer, code, step in (("\n", 1, 2), ("\x04", 1, 2), ("y\n", 0, 0)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, *command, "--address", address, "--run", "exp1"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        )
        os.close(theirs)
        try:
            seen = ""
            while "[y/N]" not in seen:
                seen += os.read(ours, 4096).decode()
            assert "run 'exp1': step 2, 4 known prompts, 12 rollouts" in seen
            assert step_of(address) == 2
            os.write(ours, answer.encode())
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert process.returncode == code
        assert ("'exp1'" in said) == (code == 0)
        if code or command[0] == "rewind":
            assert step_of(address) == step
        else:
            stub = rpc.BudgetSchedulerStub(grpc.insecure_channel(address))  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError, match="does not exist"):
                stub.GetRun(pb.GetRunRequest(run_id="exp1"))


def test_a_damaged_run_is_shown_and_can_be_deleted(
    scheduler: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One hides no other from the list; the runbook has it deleted and imported anew."""
    for run in ("whole", "entry", "config"):
        with BudgetClient(scheduler.address, run, timeout=30, outbox=False) as client:
            client.report(client.allocate(["a"], 4, 0), [[1, 0, 1, 0]], 0)
    scheduler.kill()
    with closing(sqlite3.connect(tmp_path / "stats.db")) as store:
        store.execute("UPDATE runs SET config = x'ffffffff' WHERE run_id = 'config'")
        store.execute(
            "UPDATE entries SET payload = x'ff' WHERE run_key = "
            "(SELECT run_key FROM runs WHERE run_id = 'entry')"
        )
        store.commit()
    scheduler.start()
    there = ["--address", scheduler.address, "--timeout", "5"]
    for listed in (["runs"], ["top", "--once"]):
        assert main([*listed, *there]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        for run in ("config", "entry"):
            assert f"{run} cannot be read" in [" ".join(row.split()) for row in rows]
        assert any(row.split()[:2] == ["whole", "posterior"] for row in rows)
    for run in ("entry", "config"):
        assert main(["delete", *there, "--run", run, "--yes"]) == 0
        assert f"deleted run '{run}', which could not be read" in capsys.readouterr().out
    assert main(["runs", *there]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_change_without_an_answer_may_have_been_made(
    scripted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not said to have failed; one that the scheduler failed at is."""
    command = ["rewind", "--address", scripted.address, "--run", "r", "--step", "-1", "--yes"]
    scripted.scheduler.plan("RewindRun", grpc.StatusCode.UNAVAILABLE, threading.Event())
    assert main([*command, "--timeout", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trying again: UNAVAILABLE")
    assert "whether the rewind was made is not known" in error
    ids = {request.request_id for call, request in scripted.scheduler.calls if call == "RewindRun"}
    assert len(ids) == 1
    scripted.scheduler.plan("RewindRun", grpc.StatusCode.INTERNAL)
    assert main(command) == 2
    assert capsys.readouterr().err == "knapsack-rl: INTERNAL: injected\n"


@pytest.mark.parametrize("step", ["-2", "1.5", "x", str(2**63)])
def test_a_wrong_step_is_refused_with_what_is_allowed(
    capsys: pytest.CaptureFixture[str], step: str
) -> None:
    """Before anybody is asked."""
    with pytest.raises(SystemExit, match="2"):
        main(["rewind", "--run", "exp1", "--step", step])
    assert f"'{step}': must be a whole number, -1 or more" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_no_success(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped name is refused, with where to find the right one."""
    for command in (["rewind", "--step", "0"], ["delete"]):
        assert main([*command, "--address", address, "--run", "exp", "--yes"]) == 2
        assert "run 'exp' does not exist; knapsack-rl runs" in capsys.readouterr().err

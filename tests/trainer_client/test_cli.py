"""The command line against a real scheduler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from knapsack_trainer_client import BudgetClient
from knapsack_trainer_client.cli import main


@pytest.fixture(scope="module")
def address(shared_scheduler: Any) -> str:
    """A scheduler with two runs, one of which knows three prompts."""
    with BudgetClient(shared_scheduler.address, "exp1", timeout=30, outbox=False) as client:
        allocation = client.allocate(["easy", "hard", "mid\x1b[31m"], 6, 4)
        client.report(allocation, [[1, 1], [0, 0], [1, 0]], 0, [[9, 9], [30, 30], [20, 20]])
    with BudgetClient(shared_scheduler.address, "exp2", timeout=30, outbox=False) as client:
        client.run()
    return str(shared_scheduler.address)


def test_runs_are_listed(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per run, aligned."""
    assert main(["runs", "--address", address]) == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "policy", "objective", "step"]
    assert head.split()[6:10] == ["success", "effective", "predicted", "came"]
    # Two rollouts of a prompt never seen differ with a chance of 1/4.
    shown = ["exp1", "posterior", "paper", "4", "3", "6", "50.0%", "33.3%"]
    assert one.split()[:10] == [*shown, "25.0%", "33.3%"]
    assert two.split()[:10] == ["exp2", "posterior", "paper", "-", "0", "0", *"----"]


@pytest.mark.parametrize(
    ("sort", "first"),
    [("rate", "hard"), ("prompt", "easy"), ("successes", "easy"), ("tokens", "hard")],
)
def test_prompts_are_listed(
    address: str, capsys: pytest.CaptureFixture[str], sort: str, first: str
) -> None:
    """Prompts come in the order asked for, and no name steers the terminal."""
    assert main(["stats", "--address", address, "--run", "exp1", "--sort", sort]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["prompt", "rollouts", "successes", "rate", "step", "tokens"]
    assert rows[0].split()[0] == first
    assert len(rows) == 3
    assert "\x1b" not in "".join(rows)
    [hard] = [row.split() for row in rows if row.startswith("hard")]
    assert [*hard[1:3], *hard[4:]] == ["2", "0", "4", "30"]
    assert 0 < float(hard[3]) < 0.5


def test_limit_says_what_it_hides(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut list says so."""
    assert main(["stats", "--address", address, "--run", "exp1", "--limit", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 prompts; --limit 0 shows all"
    assert main(["stats", "--address", address, "--run", "exp2"]) == 0
    assert capsys.readouterr().out == "no outcomes yet\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "--address", "127.0.0.1:1", "--timeout", "2"], "UNAVAILABLE"),
        (["stats", "--run", "nobody"], "nobody"),
        (["runs", "--token-file", "/nonexistent"], "--token-file /nonexistent"),
        (["runs", "--tls-ca", "/nonexistent"], "/nonexistent"),
        (["runs", "--tls-cert", "/nonexistent"], "certificate and key"),
    ],
)
def test_errors_are_one_line(
    address: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """What goes wrong is said in one line, with exit code 2."""
    if "--address" not in arguments:
        arguments = [*arguments, "--address", address]
    assert main(arguments) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err.startswith("knapsack-rl: ")
    assert answer.err.count("\n") == 1
    assert said in answer.err


def test_a_wrong_tls_flag_is_one_line(shared_scheduler: Any) -> None:
    """No line of gRPC's core, which writes past Python, stands before what the command says."""
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    command = [sys.executable, "-m", "knapsack_trainer_client.cli", "runs", "--timeout", "1"]
    command += ["--address", shared_scheduler.address]
    answer = subprocess.run(
        [*command, "--tls"], capture_output=True, text=True, env=environment, check=False
    )
    assert answer.returncode == 2
    [line] = answer.stderr.splitlines()
    assert line.startswith("knapsack-rl: is a scheduler serving its API with TLS at ")


def test_help_and_usage() -> None:
    """Help is on stdout with 0, wrong usage on stderr with 2."""
    command = [str(Path(sys.executable).with_name("knapsack-rl"))]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    for name in ("runs", "stats", "demo"):
        assert name in shown.stdout
    shown = subprocess.run(
        [*command, "stats", "--help"], capture_output=True, text=True, check=True
    )
    assert "--sort" in shown.stdout
    for wrong in ([], ["stats"], ["runs", "--timeout", "0"], ["other"]):
        failed = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert failed.returncode == 2
        assert "usage: knapsack-rl" in failed.stderr


def test_demo_is_loaded_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo gets its own arguments; without its packages one line says what to install."""
    import types

    module: Any = types.ModuleType("knapsack_trainer_client.demo.main")
    seen: list[list[str]] = []
    module.run = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "knapsack_trainer_client.demo.main", module)
    assert main(["demo", "--quick", "--help"]) == 3
    assert seen == [["--quick", "--help"]]
    monkeypatch.setitem(sys.modules, "knapsack_trainer_client.demo.main", None)
    assert main(["demo"]) == 2

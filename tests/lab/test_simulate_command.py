"""``knapsack-rl simulate`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from knapsack_scheduler.lab.arms import ARMS
from knapsack_scheduler.lab.simulate_command import main

SMALL = """
name = "<b>mine</b>\\u001b[31m $x_1"
about = "two bands"
[run]
prompts = 64
prompts_per_step = 32
epochs = 2
[[band]]
share = 0.5
logit_mean = -2
completion_tokens = 900
[[band]]
share = 0.5
logit_mean = 1
[learning]
own = 2.0
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A scenario file with a hostile name, done in no time."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_the_table_says_everything_in_100_columns(
    small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every arm, three measures, intervals, a sentence each; no name steers the terminal."""
    assert main(["--scenario", small, "--seeds", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in captured.out
    head = next(line for line in lines if line.startswith("arm "))
    assert head.split() == [
        *("arm", "groups", "rollouts", "value", "vs", "uniform"),
        *("1st", "epoch", "later", "largest", "success"),
    ]
    for name in ARMS:
        [row] = [line.split() for line in lines if line.startswith(f"{name} ")]
        assert len(row) == 9
        assert name == "uniform" or "±" in row[4]
        assert name == "uniform" or sum(line.startswith(f"- {name} ") for line in lines) == 1
    assert "95% interval of the mean, paired over 3" in " ".join(lines)


def test_the_shipped_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With what they stand for, and where the files are."""
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("base")
    folder = Path(lines[-1].removeprefix("files: "))
    assert (folder / "base.toml").is_file()
    assert len(lines) == len(list(folder.glob("*.toml"))) + 2


def test_the_same_command_gives_the_same_numbers(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the same table and, but for the date, the same report and JSON."""
    outputs, files = [], [tmp_path / "one.html", tmp_path / "one.json"]
    for _ in range(2):
        command = ["--scenario", small, "--random", "1", "--random-seed", "7", "--seeds", "2"]
        command += ["--arms", "posterior", "oracle", "--objective", "variance"]
        assert main([*command, "--report", str(files[0]), "--json", str(files[1])]) == 0
        page = files[0].read_text("utf-8")
        kept = [line for line in page.splitlines() if "<dt>date" not in line]
        outputs.append((capsys.readouterr().out, kept, files[1].read_text("utf-8")))
    assert outputs[0] == outputs[1]
    out, kept, text = outputs[0]
    page = "\n".join(kept)
    assert "random-7" in out
    assert page.count("<svg") == 1 + 2 * 4
    assert "<b>mine" not in page
    assert "&lt;b&gt;mine" in page
    assert "\x1b" not in page
    data = json.loads(text)
    assert [s["scenario"]["name"] for s in data["scenarios"]][1] == "random-7"
    # Uniform always runs: differences are from it.
    assert list(data["scenarios"][0]["arms"]) == ["uniform", "posterior", "oracle"]
    measures = data["scenarios"][0]["arms"]["posterior"]["measures"]["later epochs"]
    assert len(measures["value"]["per cent against uniform"]["seeds"]) == 2
    assert measures["tokens"]["level"]["mean"] > 0

    def above(scenario: int, arm: str) -> float:
        of_arm = data["scenarios"][scenario]["arms"][arm]["measures"]["later epochs"]["value"]
        return of_arm["per cent against uniform"]["mean"]

    reached = sum(above(k, "posterior") >= above(k, "oracle") for k in range(2))
    said = f"Worth at least what the oracle is, of 2 scenarios: posterior {reached}."
    assert said in " ".join(out.split())
    assert said in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "nobody"], "scenario = 'nobody': must be one of base, "),
        (["--arms", "nobody"], "arms = 'nobody': must be some of uniform, "),
        (["--report", "/nonexistent/a.html"], "there is no folder '/nonexistent'"),
        (["--json", "/tmp"], "'/tmp': is a folder"),
        (["--scenario", "/nonexistent/a.toml"], "No such file"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 2, before anything is simulated."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("knapsack-rl simulate: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_a_report_needs_its_packages_and_a_table_does_not(small: str, tmp_path: Path) -> None:
    """Without matplotlib and Jinja2 the table is there, and --report says what to install."""
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = sys.modules['jinja2'] = sys.modules['pyarrow'] = None\n"
        "from knapsack_trainer_client.cli import main\n"
        "sys.exit(main(['simulate', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", code, "--scenario", small, "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "one seed, so no interval" in " ".join(done.stdout.split())
    command += ["--report", str(tmp_path / "a.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "pip install 'knapsack-rl[lab]'" in done.stderr
    assert done.stdout == ""


def test_help_is_the_command_s_own() -> None:
    """``knapsack-rl simulate --help`` is not that of ``knapsack-rl``."""
    command = [str(Path(sys.executable).with_name("knapsack-rl")), "simulate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "--random-seed" in done.stdout
    assert "usage: knapsack-rl simulate" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """Piped into a program that closes its end, the command says nothing and exits with 0."""
    command = [sys.executable, "-m", "knapsack_trainer_client.cli", "simulate", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(300) == 0

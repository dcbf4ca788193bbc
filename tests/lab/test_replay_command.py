"""``knapsack-rl replay`` as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knapsack_scheduler.lab.arms import ARMS
from knapsack_scheduler.lab.replay_command import main

STEPS, BATCH, PROMPTS = 24, 12, 48


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of four epochs with names that would steer a terminal, and lengths."""
    rng = np.random.default_rng(0)
    rates = rng.choice([0.0, 0.1, 0.6, 1.0], PROMPTS)
    lines = []
    for step in range(STEPS):
        first = step * BATCH % PROMPTS
        for prompt in range(first, first + BATCH):
            for reward in (rng.random(8) < rates[prompt]).astype(float):
                name = f"\x1b[31m<b>{prompt}"
                lines.append({"step": step, "uid": name, "score": reward, "num_tokens": 100})
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_it_answers_first_and_fits_a_terminal(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was wasted comes first, then every arm; nothing is wider than 100 columns."""
    assert main([str(log), "--replicates", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in captured.out
    text = " ".join(captured.out.split())
    assert "prompt = 'uid', reward = 'score', tokens = 'num_tokens'" in text
    waste = re.search(r"([\d.]+)% of your rollouts \(([\d,]+) of 2,304\)", text)
    assert waste is not None
    assert 100 * int(waste[2].replace(",", "")) / 2304 == pytest.approx(float(waste[1]), abs=0.05)
    rows = [line.split()[0] for line in lines if line.startswith(("post", "uni", "pap"))]
    assert rows[:5] == [name for name in ARMS if name != "oracle"]
    assert "cannot tell what the training would have become" in text


def test_json_and_report_hold_the_same(log: Path, tmp_path: Path) -> None:
    """The figures are in the JSON; the page has them too, whole, with plots and without scripts."""
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    options = ["--arms", "posterior-2-waves", "posterior", "--replicates", "2", "--seed", "3"]
    done = main([str(log), *options, "--report", str(page), "--json", str(data)])
    assert done == 0
    found = json.loads(data.read_text())
    assert list(found["arms"]) == ["uniform", "posterior-2-waves", "posterior"]
    assert found["settings"]["replicates"] == 2
    wasted = found["wasted"]
    assert wasted["rollouts"] == wasted["failed_rollouts"] + wasted["passed_rollouts"]
    assert wasted["token_share"] == pytest.approx(wasted["share"])
    uniform, waves = found["arms"]["uniform"], found["arms"]["posterior-2-waves"]
    assert uniform["effective_group_rate"]["measured"] == found["logged"]["effective_group_rate"]
    assert uniform["value"]["measured"] == pytest.approx(found["logged"]["value"])
    assert uniform["rollouts"] == waves["rollouts"] == 2304
    half = found["arms_with_half_the_budget"]
    assert list(half) == ["uniform", "posterior-2-waves"]
    assert half["uniform"]["rollouts"] == half["posterior-2-waves"]["rollouts"] == 1152
    assert half["uniform"]["extrapolated_share"] == 0.0
    assert half["posterior-2-waves"]["rollouts_not_logged"] < waves["rollouts_not_logged"] / 4
    assert uniform["extrapolated_share"] == 0.0 < waves["extrapolated_share"]
    assert waves["expected_tokens"] == pytest.approx(230_400)
    assert sum(waves["rollouts_by_band"].values()) == pytest.approx(2304)

    html = page.read_text()
    assert html.count("<svg") == 5
    assert "<script" not in html
    assert "<b>" not in html
    assert f"{100 * waves['effective_group_rate']['measured']:.1f}%" in html


def test_less_budget_is_all_in_the_log(log: Path, tmp_path: Path) -> None:
    """With a quarter of the budget and groups of 8 at most, everything is measured."""
    data = tmp_path / "r.json"
    options = ["--budget-share", "0.25", "--max-rollouts", "8", "--json", str(data)]
    assert main([str(log), *options, "--arms", "posterior"]) == 0
    assert json.loads(data.read_text())["settings"]["replicates"] == 8
    arm = json.loads(data.read_text())["arms"]["posterior"]

    assert arm["rollouts"] == 576
    assert arm["extrapolated_share"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no.jsonl"], "no.jsonl: there is no such file"),
        (["LOG", "--reward-column", "grade"], "no column 'grade' (--reward-column); there are"),
        (["LOG", "--report", "no/r.html"], "'no/r.html': there is no folder 'no'"),
    ],
)
def test_errors_are_one_line(
    log: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be done is said in one line on stderr, with exit code 2."""
    assert main([str(log) if one == "LOG" else one for one in options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "oracle"], "nobody knows the success rates of a log"),
        (["--arms", "best"], "must be some of uniform, paper"),
        (["--budget-share", "1.5"], "must be above 0 and at most 1"),
        (["--min-rollouts", "0"], "must be a whole number from 1"),
        (["--seed", "-1"], "must be a whole number, 0 or more"),
        (["--success-threshold", "nan"], "must be a finite number"),
    ],
)
def test_bad_options_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option out of range is refused with what is allowed."""
    with pytest.raises(SystemExit) as raised:
        main(["log.jsonl", *options])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_progress_is_shown_to_a_terminal_alone(log: Path) -> None:
    """On a terminal stderr has a line of progress that is taken away; stdout never has."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "knapsack_trainer_client.cli", "replay", str(log)]
    command += ["--arms", "posterior", "--replicates", "1"]
    shown = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        # A terminal holds little, and a slow machine makes more progress to be shown.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 65536):
                shown += part
        assert process.stdout is not None
        said = process.stdout.read()
    os.close(ours)

    assert process.returncode == 0
    assert b"rows read" in shown
    assert b"step " in shown
    assert shown.endswith(b"\r\x1b[K")
    assert said
    assert b"\x1b" not in said

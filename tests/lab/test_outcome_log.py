"""Logs of users as they are: three formats, many habits, and what is wrong named exactly."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from knapsack_scheduler.lab import log_files
from knapsack_scheduler.lab.log_columns import LogError, WantedColumns
from knapsack_scheduler.lab.outcome_log import OutcomeLog, read_log

ROWS = [
    {"step": 1, "prompt_id": "b", "reward": 1.0, "completion_tokens": 7},
    {"step": 0, "prompt_id": "a", "reward": 0.0, "completion_tokens": 5},
    {"step": 1, "prompt_id": "a", "reward": 1.0, "completion_tokens": 6},
    {"step": 0, "prompt_id": "a", "reward": 1.0, "completion_tokens": 4},
    {"step": 1, "prompt_id": "b", "reward": 0.5, "completion_tokens": 9},
]


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as Parquet."""
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "log.jsonl": write_json,
    "log.csv": write_csv,
    "log.parquet": write_parquet,
}


def read(*paths: Path, **columns: str) -> OutcomeLog:
    """Read a log."""
    return read_log(paths, WantedColumns(**columns))


def groups(log: OutcomeLog) -> list[tuple[int, str, list[float]]]:
    """Return step, prompt and rewards of every group."""
    return [
        (
            int(log.steps[step]),
            log.prompt_ids[prompt],
            log.rewards[log.group_rows[at] : log.group_rows[at + 1]].tolist(),
        )
        for at, (step, prompt) in enumerate(zip(log.group_step, log.group_prompt, strict=True))
    ]


def refusal(*paths: Path, **columns: str) -> str:
    """Return the message that a log is refused with."""
    with pytest.raises(LogError) as raised:
        read(*paths, **columns)
    return str(raised.value)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_become_groups_in_order(tmp_path: Path, name: str) -> None:
    """Every format gives the same groups: by step, then prompt, rewards as they stood."""
    log = read(WRITERS[name](tmp_path / name, ROWS))

    assert sorted(groups(log)) == [
        (0, "a", [0.0, 1.0]),
        (1, "a", [1.0]),
        (1, "b", [1.0, 0.5]),
    ]
    assert log.step_groups.tolist() == [0, 1, 3]
    assert sorted(log.group_tokens().tolist()) == [6, 9, 16]  # type: ignore[union-attr]
    assert log.successes(0.5).sum() == 3
    assert log.effective.sum() == 2


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv"])
def test_text_may_be_packed_and_odd(tmp_path: Path, name: str) -> None:
    """A byte order mark, CRLF, blank last lines and gzip change nothing."""
    plain = WRITERS[name](tmp_path / name, ROWS).read_text().replace("\r\n", "\n")
    packed = tmp_path / (name + ".gz")
    packed.write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    )

    assert groups(read(packed)) == groups(read(tmp_path / name))


@pytest.mark.parametrize("name", WRITERS)
def test_batches_are_joined(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that does not fit into one batch is read as if it did."""
    rows = [{"step": k // 64, "prompt_id": k // 8 % 8, "reward": k % 3} for k in range(3000)]
    path = WRITERS[name](tmp_path / name, rows)
    whole = groups(read(path))
    monkeypatch.setattr(log_files, "BATCH_ROWS", 100)
    monkeypatch.setattr(log_files, "_CSV_BLOCK_BYTES", 1000)

    assert groups(read(path)) == whole
    assert len(whole) == 375


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_may_be_a_group(tmp_path: Path, name: str) -> None:
    """A list of rewards is a whole group, with a list of lengths or without."""
    rows = [
        {"iteration": 3, "uid": "a", "scores": [0, 1, None], "response_length": [3, 4, 5]},
        {"iteration": 4, "uid": "b", "scores": [1], "response_length": [2]},
    ]
    if name == "log.csv":
        rows = [{**row, "scores": json.dumps(row["scores"])} for row in rows]
    log = read(WRITERS[name](tmp_path / name, rows))

    assert groups(log) == [(3, "a", [0.0, 1.0]), (4, "b", [1.0])]
    assert log.missing == 1
    assert log.tokens is not None
    assert log.tokens.tolist() == [3, 4, 2]


@pytest.mark.parametrize("absent", ["", "NaN", "null", None, float("nan")])
def test_missing_rewards_are_no_failures(tmp_path: Path, absent: object) -> None:
    """A rollout without a reward is counted apart, and in no group."""
    rows = [*ROWS, {"step": 0, "prompt_id": "a", "reward": absent, "completion_tokens": 1}]
    log = read(write_json(tmp_path / "log.jsonl", rows))

    assert log.missing == 1
    assert log.rewards.size == len(ROWS)


def test_ids_of_any_kind_are_text(tmp_path: Path) -> None:
    """7 and "7" are one prompt; messages, and texts of any length, are ids as they stand."""
    messages = [{"role": "user", "content": "2+2?"}]
    ids = [7, "7", 7.0, messages, messages, "x" * 10_000, "x" * 9_999 + "y", "é", 2**80]
    rows = [{"step": 0, "prompt": one, "reward": 1} for one in ids]
    log = read(write_json(tmp_path / "log.jsonl", rows))

    assert log.group_sizes.tolist() == [3, 2, 1, 1, 1, 1]
    assert max(len(name) for name in log.prompt_ids) < 100


def test_columns_are_guessed_or_named(tmp_path: Path) -> None:
    """Common names are found in any case; a name that is given wins."""
    rows = [{"Global_Step": 0, "uid": "a", "question": "q", "score": 1, "acc": 0}]
    path = write_json(tmp_path / "log.jsonl", rows)

    assert str(read(path).columns) == (
        "step = 'Global_Step', prompt = 'uid', reward = 'score', tokens = none"
    )
    assert groups(read(path, prompt="question", reward="acc")) == [(0, "q", [0.0])]


def test_folders_and_files_are_one_log(tmp_path: Path) -> None:
    """A folder is the logs in it, whatever else is there, each with its own columns."""
    write_json(tmp_path / "2.jsonl", ROWS[:2])
    write_csv(tmp_path / "1.csv", [{"global_step": 1, "id": "a", "acc": 1}])
    (tmp_path / "notes.txt").write_text("no log")

    assert read(tmp_path).rewards.size == 3


def test_huge_rewards_stay_finite(tmp_path: Path) -> None:
    """What is beyond the scheduler's numbers is as large as they get."""
    rows = [{"step": 0, "prompt_id": "a", "reward": 1e300}]

    assert np.isfinite(read(write_json(tmp_path / "log.jsonl", rows)).rewards).all()


ONE = {"step": 0, "prompt_id": "a", "reward": 1}
HOSTILE: list[tuple[str, str, str]] = [
    ("empty", "", "is empty"),
    ("only blank lines", "\n\n", "is empty"),
    ("not JSON", '{"step": 1,\n', "line 1: not JSON"),
    ("not an object", json.dumps(ONE) + "\n[1, 2]\n", "line 2: '[1, 2]': must be a JSON object"),
    (
        "no reward",
        '{"step": 0, "prompt_id": "a", "grade": 1}\n',
        "line 1: none of the columns 'step', 'prompt_id', 'grade' is called reward, rewards, "
        "score, scores or the like; name the one with the reward with --reward-column",
    ),
    (
        "a key is gone",
        json.dumps(ONE) + '\n{"step": 0, "reward": 1}\n',
        "line 2: no 'prompt_id', which other lines have",
    ),
    (
        "text for a number",
        json.dumps(ONE) + '\n\n{"step": 0, "prompt_id": "a", "reward": "good"}\n',
        "line 3: 'reward' = 'good': must be a finite number",
    ),
    ("inf", '{"step": 0, "prompt_id": "a", "reward": Infinity}', "'reward' = inf: must be a fin"),
    (
        "negative step",
        '{"step": -1, "prompt_id": "a", "reward": 1}',
        "'step' = -1: must be a wh",
    ),
    ("half a step", '{"step": 0.5, "prompt_id": "a", "reward": 1}', "'step' = 0.5: must be a wh"),
    ("no step", '{"step": null, "prompt_id": "a", "reward": 1}', "'step' = None: must be a w"),
    ("no prompt", '{"step": 0, "prompt_id": "", "reward": 1}', "'prompt_id' = '': must be text"),
    ("null prompt", '{"step": 0, "prompt_id": null, "reward": 1}', "'prompt_id' = None: must be"),
    ("no finished", '{"step": 0, "prompt_id": "a", "reward": null}', "no rollout has a reward"),
    (
        "fewer lengths",
        '{"step": 0, "prompt_id": "a", "reward": [1, 0], "num_tokens": [3]}',
        "line 1: 1 lengths for 2 rewards: must be one number for each reward",
    ),
    (
        "negative length",
        '{"step": 0, "prompt_id": "a", "reward": 1, "num_tokens": -3}',
        "'num_tokens' = -3: must be a number of tokens, 0 or more",
    ),
]


@pytest.mark.parametrize(("what", "text", "message"), HOSTILE, ids=[one[0] for one in HOSTILE])
def test_bad_lines_are_named(tmp_path: Path, what: str, text: str, message: str) -> None:
    """A log that cannot be read is refused with the place, the value and what is allowed."""
    path = tmp_path / "log.jsonl"
    path.write_text(text)

    said = refusal(path)
    assert message in said
    assert str(path) in said


def test_bad_rows_of_tables_are_named(tmp_path: Path) -> None:
    """CSV and Parquet name the row, also beyond the first batch."""
    rows: list[dict[str, Any]] = [{"step": 0, "prompt_id": "a", "reward": 1}] * 70_000
    rows.append({"step": 0, "prompt_id": "a", "reward": "n/k"})
    path = write_csv(tmp_path / "log.csv", rows)
    assert "log.csv, row 70001: 'reward' = 'n/k'" in refusal(path)

    steps = [{"step": 0, "prompt_id": "a", "reward": 1.0}, {"step": -4, **ROWS[0]}]
    steps[1]["step"] = -4
    assert "log.parquet, row 2: 'step' = -4" in refusal(
        write_parquet(tmp_path / "log.parquet", [{k: r[k] for k in ONE} for r in steps])
    )


def test_broken_tables_are_named(tmp_path: Path) -> None:
    """Rows of another width, a column twice, and files of another kind are refused."""
    wide, twice = tmp_path / "wide.csv", tmp_path / "twice.csv"
    wide.write_text("step,prompt_id,reward\n0,a,1\n0,a,1,9\n")
    twice.write_text("step,prompt_id,reward,reward\n0,a,1,0\n")
    fake, folder = tmp_path / "fake.parquet", tmp_path / "folder"
    fake.write_text("no")
    folder.mkdir()

    assert "wide.csv, after row" in refusal(wide)
    assert "the column 'reward' is there twice" in refusal(twice)
    assert "not a Parquet file" in refusal(fake)
    assert "no file in it ends in .jsonl" in refusal(folder)
    assert "there is no such file" in refusal(tmp_path / "gone.csv")
    (tmp_path / "log.txt").write_text("")
    assert "must end in .jsonl" in refusal(tmp_path / "log.txt")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:20])
    assert "cannot be read" in refusal(tmp_path / "cut.jsonl.gz")

"""The command line besides serving: check, migrate, export, help."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "knapsack_scheduler.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
async def store(tmp_path: Path, calls) -> str:
    """A store with one run of two steps and a rewind."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url) as service:
        for step in range(2):
            allocation = await service.allocate(calls.allocate(["a", "b"], 8, step))
            await service.report(
                calls.report(allocation.allocation_id, [[1.0, 0.0], [1.0]], policy_version=step)
            )
        await service.rewind_run(calls.rewind(0))
        await service.create_run(pb.CreateRunRequest(run_id="empty"))
    return url


def test_check_shows_settings_and_where_they_come_from(tmp_path: Path) -> None:
    """Flags win over the environment, the environment over the file, the file over defaults."""
    file = tmp_path / "settings.toml"
    file.write_text(
        'listen = "127.0.0.1:1001"\nadmin-listen = "127.0.0.1:1002"\n'
        'health_listen = "127.0.0.1:1003"\n[run_defaults]\nmin_rollouts = 4\n'
    )
    done = command(
        "check",
        f"--config={file}",
        "--listen=127.0.0.1:3001",
        KNAPSACK_SCHEDULER_LISTEN="127.0.0.1:2001",
        KNAPSACK_SCHEDULER_ADMIN_LISTEN="127.0.0.1:2002",
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["listen"] == "127.0.0.1:3001"
    assert shown["admin_listen"] == "127.0.0.1:2002"
    assert shown["health_listen"] == "127.0.0.1:1003"
    assert shown["run_defaults"]["min_rollouts"] == 4
    assert shown["drain_seconds"] == 10.0


def test_check_refuses_wrong_settings() -> None:
    """With the key, from wherever it came."""
    done = command("check", KNAPSACK_SCHEDULER_DRAIN_SECONDS="-1")
    assert done.returncode == 2
    assert "drain_seconds" in done.stderr
    done = command("check", "--store=postgresql://user:secret@host/db", "--listen=nowhere")
    assert done.returncode == 2
    assert "secret" not in done.stdout + done.stderr


def test_a_typing_error_in_the_file_is_named_with_what_was_meant(tmp_path: Path) -> None:
    """At the top and in its section; each of several."""
    file = tmp_path / "settings.yaml"
    file.write_text("listn: 127.0.0.1:1001\nrun_defaults:\n  objectiv: paper\n  zzz: 1\n")
    done = command("check", f"--config={file}")
    assert done.returncode == 2
    assert done.stderr == (
        "knapsack-scheduler: the scheduler does not start: run_defaults.objectiv: is no setting; "
        "did you mean run_defaults.objective?; run_defaults.zzz: is no setting; listn: is no "
        "setting; did you mean listen?\n"
    )


async def test_check_of_a_store_counts_it_and_finds_damage(store: str) -> None:
    """A whole store is summed up; a lost entry is a fault and exit code 1."""
    done = command("check", f"--store={store}")
    assert done.returncode == 0, done.stderr
    assert "2 runs" in done.stdout
    assert "run 'run': 5 entries, last step 0, 2 known prompts, 3 rollouts" in done.stdout
    assert done.stderr == "no fault found\n"
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM entries WHERE seq = 2")
    database.close()
    done = command("check", f"--store={store}")
    assert done.returncode == 1
    assert "run 'run': its entries are not numbered without gap" in done.stderr
    assert "no fault found" not in done.stderr


async def test_export_writes_json_lines(store: str) -> None:
    """Every recorded call in order, or every prompt's statistics."""
    done = command("export", f"--store={store}", "--run=run")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == [
        "allocate", "report", "allocate", "report", "rewind",
    ]  # fmt: skip
    assert lines[0]["request"]["prompt_ids"] == ["a", "b"]
    assert lines[1]["request"]["rewards"] == [1.0, 0.0, 1.0]
    done = command("export", f"--store={store}", "--run=run", "--what=prompts")
    assert [json.loads(line)["prompt_id"] for line in done.stdout.splitlines()] == ["a", "b"]
    done = command("export", f"--store={store}", "--run=other")
    assert done.returncode == 2
    assert done.stderr == "knapsack-scheduler: run 'other' does not exist\n"


def test_migrate_makes_the_schema_and_others_ask_for_it(tmp_path: Path) -> None:
    """A store without schema is refused by check, which changes nothing, until migrated."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    for looking in (("check",), ("export", "--run=run")):
        done = command(*looking, f"--store={url}")
        assert done.returncode == 2
        assert "there is no file" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new.db").touch()
    done = command("check", f"--store={url}")
    assert done.returncode == 2
    assert "run knapsack-scheduler migrate" in done.stderr
    assert command("migrate", f"--store={url}").returncode == 0
    assert command("migrate", f"--store={url}").returncode == 0
    assert command("check", f"--store={url}").returncode == 0


def into_head(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose reader leaves after one byte."""
    piped = f"{sys.executable} -m knapsack_scheduler.cli {' '.join(arguments)} | head -c 1"
    return subprocess.run(piped, shell=True, capture_output=True, text=True, timeout=60)


async def test_export_into_head_ends_quietly(store: str) -> None:
    """A reader that has seen enough is no error."""
    done = into_head("export", f"--store={store}", "--run=run")
    assert (done.stdout, done.stderr) == ("{", "")


def test_help_names_every_command_and_setting() -> None:
    """A person finds what there is, and its default."""
    assert "serve" in command("--help").stdout
    assert command("--version").stdout.strip() == version("knapsack-rl")
    text = command("serve", "--help").stdout
    for flag in ("--listen", "--store", "--token-file", "--auto-create-runs", "127.0.0.1:50051"):
        assert flag in text
    done = command("sevre")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_variables_of_a_kubernetes_service_are_no_settings() -> None:
    """A Service named knapsack-scheduler beside it is no reason not to start; a typo still is."""
    links = {
        "KNAPSACK_SCHEDULER_SERVICE_HOST": "10.0.0.1",
        "KNAPSACK_SCHEDULER_SERVICE_PORT": "50051",
        "KNAPSACK_SCHEDULER_SERVICE_PORT_GRPC": "50051",
        "KNAPSACK_SCHEDULER_PORT": "tcp://10.0.0.1:50051",
        "KNAPSACK_SCHEDULER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "KNAPSACK_SCHEDULER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "KNAPSACK_SCHEDULER_METRICS_PORT": "tcp://10.0.0.2:9464",
    }
    done = command("check", **links)
    assert done.returncode == 0, done.stderr
    done = command("check", **{**links, "KNAPSACK_SCHEDULER_PORT": "50051"})
    assert done.returncode == 2
    assert "KNAPSACK_SCHEDULER_PORT: is no setting" in done.stderr

"""Disks that are full, read-only or damaged: clear errors, and nothing lost that was answered."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.journal.onewriter import OneWriter
from knapsack_scheduler.journal.store import open_engine

# Root writes to files that are read-only, unless it gives that right up.
AS_A_USER = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


def served(store: Path, *prefix: str) -> subprocess.CompletedProcess[str]:
    """Run a scheduler that is to end by itself."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "knapsack_scheduler.cli", "serve",
         f"--store=sqlite:///{store}", *PORTS],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


PORTS = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]


def test_a_full_disk_refuses_reports_until_there_is_room(start_scheduler, calls) -> None:
    """No restart is needed, and what is in memory is what is in the journal, no more."""
    scheduler = start_scheduler("--auto-create-runs")
    stub = scheduler.stub
    answered = 0

    def report(number: int) -> None:
        nonlocal answered
        ids = [f"prompt-{i}" for i in range(500)]
        request = calls.own_report(ids, [[1.0, 0.0]] * 500, number, report_id=f"r-{number}")
        answered += stub.Report(request).accepted_rollouts

    for number in range(3):
        report(number)
    # No file of the scheduler's may be written beyond this, as on a disk that is full.
    _, hard = resource.prlimit(scheduler.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(scheduler.process.pid, resource.RLIMIT_FSIZE, (20_000, hard))
    for number in range(3, 9):
        with pytest.raises(grpc.RpcError) as raised:
            report(number)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the store cannot be used" in raised.value.details()
    run = stub.GetRun(pb.GetRunRequest(run_id="run"))
    assert (run.total_rollouts, run.last_step) == (answered, 2) == (3000, 2)

    resource.prlimit(scheduler.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    for number in range(9):  # Those that were answered are recognised.
        report(number)
    run = stub.GetRun(pb.GetRunRequest(run_id="run"))
    assert run.total_rollouts == 9000
    page = stub.ListPromptStats(pb.ListPromptStatsRequest(run_id="run"))

    scheduler.end(signal.SIGKILL)
    scheduler.start()
    assert stub.GetRun(pb.GetRunRequest(run_id="run"), wait_for_ready=True) == run
    assert stub.ListPromptStats(pb.ListPromptStatsRequest(run_id="run")) == page


@pytest.fixture
async def store(tmp_path: Path, calls) -> Path:
    """File of a store with a run."""
    file = tmp_path / "stats.db"
    async with open_service(f"sqlite:///{file}") as service:
        for step in range(20):
            ids = [f"prompt-{step}-{i}" for i in range(50)]
            await service.report(calls.own_report(ids, [[1.0]] * 50, step))
    return file


def test_a_file_that_cannot_be_written_is_refused_at_the_start(store: Path) -> None:
    """With its name and the reason, and nothing is served."""
    store.chmod(0o444)
    done = served(store, *AS_A_USER)
    assert (done.returncode, done.stdout) == (2, "")
    assert str(store) in done.stderr
    assert "readonly database" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(store: Path) -> None:
    """A lock cannot be taken there."""
    (store.parent / "stats.db.lock").unlink()
    store.parent.chmod(0o555)
    try:
        done = served(store, *AS_A_USER)
    finally:
        store.parent.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, "")
    assert "stats.db.lock: Permission denied" in done.stderr


def test_a_store_on_a_disk_that_is_read_only_can_be_looked_at(store: Path, tmp_path: Path) -> None:
    """As one was left that the system has mounted so after errors: checked, and copied from it."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    store.parent.chmod(0o555)
    try:
        for command in (("check",), ("backup", f"--to={elsewhere / 'copy.db'}")):
            done = subprocess.run(
                [*AS_A_USER, sys.executable, "-m", "knapsack_scheduler.cli", *command,
                 f"--store=sqlite:///{store}"],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
    finally:
        store.parent.chmod(0o755)
    assert sorted(p.name for p in tmp_path.glob("stats.db*")) == ["stats.db", "stats.db.lock"]


def test_half_a_database_is_an_error_and_not_an_empty_one(store: Path, command) -> None:
    """Cut short, as by a copy that was not finished: neither served nor called whole."""
    with store.open("r+b") as file:
        file.truncate(store.stat().st_size // 2)
    before = store.read_bytes()
    for done in (command("check", f"--store=sqlite:///{store}"), served(store)):
        assert done.returncode in (1, 2)
        assert "malformed" in done.stderr
    assert store.read_bytes() == before


def test_a_damaged_page_is_found_by_the_check(store: Path, command) -> None:
    """And a scheduler that meets it says so instead of answering from what it can read."""
    page = store.stat().st_size // 4096 - 2
    with store.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    done = command("check", f"--store=sqlite:///{store}")
    assert done.returncode == 1
    assert "fault: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("how", "which"), [("rm", ""), ("rm", "-wal"), ("mv", "")])
async def test_a_store_that_is_deleted_under_it_acknowledges_nothing_more(
    store: Path, calls, how: str, which: str
) -> None:
    """SQLite itself would go on writing to files that nobody will find again."""
    file = Path(f"{store}{which}")
    async with open_service(f"sqlite:///{store}") as service:
        await service.report(calls.own_report(["before"], [[1.0]], report_id="before"))
        if how == "rm":
            os.unlink(file)
        else:
            shutil.copy(file, f"{file}.restored")
            os.replace(f"{file}.restored", file)
        with pytest.raises(StoreUnavailable, match=f"{file} was deleted or replaced"):
            await service.report(calls.own_report(["after"], [[1.0]], report_id="after"))
        with pytest.raises(StoreUnavailable, match="started again"):
            await service.create_run(pb.CreateRunRequest(run_id="another"))


def test_a_writer_that_waits_too_long_for_another_is_refused() -> None:
    """Threads are few: those that wait for a disk that hangs are missed elsewhere."""
    one = OneWriter(open_engine("sqlite://"), 0.01)
    with one, pytest.raises(StoreUnavailable, match="those who write before"), one:
        pytest.fail("two writers at once")
    with one:
        pass
    one.close()

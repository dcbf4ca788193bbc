"""A restore that is killed, at each of the calls by which it changes what is on the disk."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.inspection import check_store
from knapsack_scheduler.journal.backup import back_up
from knapsack_scheduler.journal.restore import restore

CHANGES = "link,linkat,rename,renameat,renameat2,unlink,unlinkat,ftruncate,pwrite64,fsync,fdatasync"
PROGRAM = """
import sys
from pathlib import Path
from knapsack_scheduler.journal.restore import restore
restore(sys.argv[1], Path(sys.argv[2]))
"""
OLD, NEW = 6, 4


def url_of(folder: Path, name: str = "stats.db") -> str:
    """Return the URL of a file's store."""
    return f"sqlite:///{folder / name}"


@pytest.fixture
async def crashed(tmp_path: Path, calls) -> Path:
    """A folder with a store of OLD rollouts, some of them in its log only, and a backup of NEW."""
    folder, live = tmp_path / "crashed", tmp_path / "live"
    folder.mkdir()
    live.mkdir()
    for first, last in ((0, NEW - 1), (NEW - 1, OLD)):
        async with open_service(url_of(live)) as service:
            for number in range(first, last):
                await service.report(calls.own_report(["a"], [[1.0]], number))
                if number == NEW - 1:
                    back_up(url_of(live), folder / "copy.db")
            for name in ("stats.db", "stats.db-wal"):
                shutil.copy(live / name, folder / name)
    return folder


def same(folder: Path, to: Path) -> Path:
    """Return a copy of a folder in which two names of a file are two names of one."""
    shutil.rmtree(to, ignore_errors=True)
    subprocess.run(["cp", "-a", folder, to], check=True)
    return to


def rollouts(folder: Path, name: str = "stats.db") -> int:
    """Return how many a whole store has; what is looked at is a copy."""
    seen = same(folder, folder.with_name("seen"))
    report = check_store(url_of(seen, name))
    assert report.faults == [], sorted(file.name for file in folder.iterdir())
    return int(report.lines[-1].split()[-2])


def traced(folder: Path, *more: str) -> tuple[int, list[str]]:
    """Return how a restore in the folder ended, and its changes; with ``more`` it is killed."""
    trace = folder.with_name("trace")
    ended = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-s0", f"-etrace={CHANGES}", f"-o{trace}", *more,
         sys.executable, "-c", PROGRAM, url_of(folder), str(folder / "copy.db")],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=False,
    )  # fmt: skip
    return ended.returncode, [line for line in trace.read_text().splitlines() if "(" in line]


def kills_of_last_part(folder: Path) -> list[str]:
    """Return what kills a restore at each change from when the copy is on disk to the end.

    Without those that change nothing, or only what is in SQLite's shared memory.
    """
    code, lines = traced(same(folder, folder.with_name("whole")))
    assert code == 0
    calls = [line.split(maxsplit=1)[1].split("(")[0] for line in lines]
    written = max(at for at, line in enumerate(lines) if ".partial>" in line)
    # strace counts each kind of call by itself.
    return [
        f"-einject={calls[at]}:signal=KILL:when={calls[: at + 1].count(calls[at])}"
        for at in range(written, len(calls))
        if "-shm" not in lines[at] and lines[at].rpartition("= ")[2].isdigit()
    ]


@pytest.mark.faults
def test_a_restore_that_is_killed_leaves_one_store_or_the_other(crashed: Path) -> None:
    """Whole, with all that was in its log, and the old one set aside; the next restore does it."""
    if shutil.which("strace") is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed")
        pytest.skip("strace is not installed")
    assert (rollouts(crashed), rollouts(crashed, "copy.db")) == (OLD, NEW)
    left = []
    for kill in kills_of_last_part(crashed):
        folder = same(crashed, crashed.with_name("killed"))
        code, _ = traced(folder, kill)
        assert code == -9, kill
        left.append(rollouts(folder))
        assert left[-1] in (OLD, NEW), kill
        if left[-1] == OLD:
            restore(url_of(folder), folder / "copy.db")
            assert rollouts(folder) == NEW
        else:
            with pytest.raises(ConfigError, match="move it away"):
                restore(url_of(folder), folder / "copy.db")
        assert rollouts(folder, "stats.db.replaced") == OLD
        assert not list(folder.glob("*.partial*"))
    # It was killed before and after the one change that counts.
    assert left == sorted(left, reverse=True)
    assert set(left) == {OLD, NEW}


def test_what_is_restored_is_of_whom_the_store_was(crashed: Path) -> None:
    """Else the scheduler could not write to what root has restored."""
    file = crashed / "stats.db"
    file.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(file, 4711, 4712)
    before = file.stat()
    restore(url_of(crashed), crashed / "copy.db")
    after = file.stat()
    assert after.st_ino != before.st_ino
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(after, name) == getattr(before, name)


def test_a_damaged_store_is_set_aside_and_a_log_without_a_store_too(crashed: Path) -> None:
    """Neither can be made whole; the backup is put back all the same, and nothing is lost."""
    file, log = crashed / "stats.db", crashed / "stats.db-wal"
    words = log.read_bytes()
    file.unlink()
    assert restore(url_of(crashed), crashed / "copy.db") is None
    assert (rollouts(crashed), (crashed / "stats.db.replaced-wal").read_bytes()) == (NEW, words)
    file.write_bytes(b"no database now!" * 1000)
    with pytest.raises(ConfigError, match=r"stats\.db\.replaced-wal is there from before; move"):
        restore(url_of(crashed), crashed / "copy.db")
    (crashed / "stats.db.replaced-wal").unlink()
    aside = restore(url_of(crashed), crashed / "copy.db")
    assert aside is not None
    assert aside.read_bytes() == b"no database now!" * 1000
    assert rollouts(crashed) == NEW


def test_a_store_that_another_program_reads_is_not_replaced(crashed: Path) -> None:
    """What it reads is in the log too, which is not to be taken from under it."""
    with closing(sqlite3.connect(crashed / "stats.db")) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM entries").fetchone()
        with pytest.raises(ConfigError, match="is in use by another program"):
            restore(url_of(crashed), crashed / "copy.db")
        assert rollouts(crashed) == OLD
    restore(url_of(crashed), crashed / "copy.db")
    assert (rollouts(crashed), rollouts(crashed, "stats.db.replaced")) == (NEW, OLD)

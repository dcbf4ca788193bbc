"""A loss of power takes nothing that was answered, whatever the disk had not been told to keep."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from knapsack_scheduler.inspection import check_store

from power_loss import TRACED, TRACER, replayed

MOMENTS = int(os.environ.get("POWER_LOSSES", "60"))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_what_was_answered_survives_a_loss_of_power(tmp_path: Path) -> None:
    """At any moment: of what was not synced nothing, some, or torn sectors are on the disk."""
    if shutil.which(TRACER[0]) is None:
        if os.environ.get("CI"):
            pytest.fail("strace is not installed")
        pytest.skip("strace is not installed")
    folder, trace = tmp_path / "written", tmp_path / "trace"
    folder.mkdir()
    program = Path(__file__).with_name("power_loss.py")
    subprocess.run(
        [*TRACER, TRACED, f"-o{trace}", sys.executable, str(program), str(folder)], check=True
    )
    count = sum(1 for _ in replayed(trace, folder))
    draw = random.Random(0)
    moments = set(draw.sample(range(count), MOMENTS))
    left, seen, lost = tmp_path / "left", 0, 0
    for moment, (files, answered) in enumerate(replayed(trace, folder)):
        if moment not in moments or not answered:
            continue
        for fate in (None, draw):
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for name, file in files.items():
                (left / name).write_bytes(file.after_loss(fate))
            report = check_store(f"sqlite:///{left / 'stats.db'}")
            assert report.faults == [], moment
            with closing(sqlite3.connect(left / "stats.db")) as database:
                floor, last = database.execute("SELECT floor_seq, last_seq FROM runs").fetchone()
                there = {f"{kind} {key}" for kind, key in
                         database.execute("SELECT kind, key FROM entries")}  # fmt: skip
            assert set(answered[floor:]) <= there, moment
            assert len(answered) <= last <= len(answered) + 1, moment
            seen += 1
            lost += bool(files["stats.db-wal"].pending or files["stats.db"].pending)
    # The moments are such that there was something to lose, and that the journal was compacted.
    assert lost > seen // 2
    assert floor > 0

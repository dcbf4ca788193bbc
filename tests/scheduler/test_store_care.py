"""Looking after a store: backup while it is written, a run as one file, the check."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import StoreUnavailable
from knapsack_scheduler.journal.compaction import Retention
from knapsack_scheduler.journal.runfile import read_run, write_run
from knapsack_scheduler.service import SchedulerService

NEVER = 10**9


async def prompts(service: SchedulerService, run_id: str = "run") -> bytes:
    """Return the statistics of every prompt, bit by bit."""
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id=run_id))
    return page.SerializeToString()


@pytest.fixture
async def store(tmp_path: Path, calls) -> str:
    """URL of a store with a run that is compacted, imported into and rewound."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"

    async def earlier():
        yield pb.ImportOutcomesRequest(
            run_id="run", request_id="old", prompt_ids=["a"], num_rewards=[1], rewards=[1.0]
        )

    async with open_service(url, retention=Retention(6, NEVER, 3)) as service:
        await service.import_outcomes(earlier())
        for step in range(24):
            answer = await service.allocate(
                calls.allocate(["a", "b"], 8, step, f"allocate-{step}", wave_fraction=0.5)
            )
            await service.report(calls.report(answer.allocation_id, [[1.0], [0.0]]))
            if step % 9 == 8:
                await service.rewind_run(calls.rewind(step - 2))
            await settled(service)
    return url


async def settled(service: SchedulerService) -> None:
    """Wait until all that was answered is folded, and for the snapshot under way."""
    await service.settled()
    service._runs._snapshots._thread.submit(lambda: None).result(30)


def test_a_backup_of_a_store_in_use_is_whole(
    start_scheduler, tmp_path: Path, calls, command
) -> None:
    """Made while a scheduler writes: every report that was answered before it is in it."""
    scheduler = start_scheduler("--auto-create-runs")
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    begun, stop = threading.Event(), threading.Event()
    answered = 0

    def write() -> None:
        nonlocal answered
        while not stop.is_set():
            scheduler.stub.Report(calls.own_report(["a"], [[1.0]], answered))
            answered += 1
            if answered == 20:
                begun.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(60)
        least = answered
        copy = tmp_path / "copy.db"
        done = command("backup", "--store", store, "--to", copy)
        assert done.returncode == 0, done.stderr
        assert f"{copy}: " in done.stdout
        again = command("backup", "--store", store, "--to", copy)
        assert (again.returncode, "exists already" in again.stderr) == (2, True)
        online = command("check", "--store", store)
        assert online.returncode == 0, online.stderr
    finally:
        stop.set()
        writer.join(60)
    done = command("check", "--store", f"sqlite:///{copy}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 run\n")
    assert "1 known prompt," in done.stdout
    assert sorted(p.name for p in tmp_path.glob("copy*")) == ["copy.db"]
    restored = start_scheduler(store="copy.db")
    counted = restored.stub.GetRun(pb.GetRunRequest(run_id="run")).total_rollouts
    assert least <= counted <= answered


def test_a_backup_that_cannot_be_made_leaves_nothing(tmp_path: Path, postgres, command) -> None:
    """No file, another database, or a damaged one."""
    (tmp_path / "text.db").write_text("This is not a database." * 1000)
    for store, why in (
        (f"sqlite:///{tmp_path / 'none.db'}", "there is no file"),
        (f"sqlite:///{tmp_path / 'text.db'}", "cannot be copied"),
        (postgres.new_store(), "pg_dump"),
    ):
        done = command("backup", "--store", store, "--to", tmp_path / "copy.db")
        assert done.returncode == 2
        assert why in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["text.db"]


def test_a_backup_is_put_back_without_the_log_of_what_it_replaces(
    start_scheduler, tmp_path: Path, calls, command
) -> None:
    """After a kill that log is beside the file, and SQLite would play it into the backup."""
    scheduler = start_scheduler("--auto-create-runs")
    store, copy = f"sqlite:///{tmp_path / 'stats.db'}", tmp_path / "copy.db"

    def write(first: int, last: int) -> None:
        for number in range(first, last):
            ids = [f"{number}-{k}" for k in range(300)]
            scheduler.stub.Report(calls.own_report(ids, [[1.0]] * 300, number))

    def restore(source: Path) -> tuple[int, str]:
        done = command("restore", "--store", store, "--from", source)
        return done.returncode, done.stdout + done.stderr

    write(0, 3)
    assert command("backup", "--store", store, "--to", copy).returncode == 0
    write(3, 130)  # Beyond the thousand pages after which SQLite begins its log anew.
    assert "in use by another scheduler" in restore(copy)[1]
    scheduler.end(signal.SIGKILL)
    assert (tmp_path / "stats.db-wal").stat().st_size > 2**20
    before = {p.name: p.read_bytes() for p in tmp_path.glob("stats.db*")}
    (tmp_path / "half.db").write_bytes(copy.read_bytes()[:9000])
    for wrong, why in (("half.db", "half.db"), ("none.db", "no such file")):
        code, said = restore(tmp_path / wrong)
        assert (code, why in said) == (2, True)
    assert before.keys() == {p.name for p in tmp_path.glob("stats.db*")}
    assert before["stats.db-wal"] == (tmp_path / "stats.db-wal").read_bytes()
    code, said = restore(copy)
    assert (code, f"{tmp_path / 'stats.db.replaced'}" in said) == (0, True)
    for name, rollouts in (("stats.db", 900), ("stats.db.replaced", 39_000)):
        done = command("check", "--store", f"sqlite:///{tmp_path / name}")
        assert (done.returncode, f"{rollouts} rollouts" in done.stdout) == (0, True), done.stderr
    code, said = restore(copy)
    assert (code, "move it away" in said) == (2, True)


async def test_a_run_goes_through_a_file_to_the_bit(
    store: str, tmp_path: Path, postgres, command
) -> None:
    """Statistics, next allocations and their names, repeats and rewinds; on PostgreSQL too."""
    file = tmp_path / "run.knapsack"
    done = command("export", "--store", store, "--run", "run", "--to", file)
    assert done.returncode == 0, done.stderr
    assert command("export", "--store", store, "--run", "run", "--to", file).returncode == 2
    other = f"sqlite:///{tmp_path / 'other.db'}"
    shared = postgres.new_store()
    for url in (other, shared):
        done = command("import", "--store", url, "--from", file)
        assert done.stdout.startswith("run 'run': imported up to entry"), done.stderr
    done = command("import", "--store", other, "--from", file)
    assert (done.returncode, "exists; give another name" in done.stderr) == (2, True)
    assert command("import", "--store", other, "--from", file, "--run", "two").returncode == 0

    seen = []
    for url, run_id in ((store, "run"), (other, "run"), (shared, "run"), (other, "two")):
        async with open_service(url) as service:
            answers = [await prompts(service, run_id)]
            # A repeated call is known by its content, of which the run's name is a part.
            repeated = [(23, "allocate-23")] if run_id == "run" else []
            for step, request_id in (*repeated, (24, "next")):
                answer = await service.allocate(
                    pb.AllocateRequest(
                        run_id=run_id, step=step, request_id=request_id, prompt_ids=["a", "b"],
                        total_rollouts=8, wave_fraction=0.5,
                    )
                )  # fmt: skip
                answer.run_id = ""
                answers.append(answer.SerializeToString())
            run = await service.rewind_run(pb.RewindRunRequest(run_id=run_id, step=20))
            run.run_id = ""
            answers += [run.SerializeToString(), await prompts(service, run_id)]
        seen.append(answers)
    assert seen[0] == seen[1] == seen[2]
    assert seen[3] == [seen[0][0], *seen[0][2:]]


def test_a_damaged_file_is_refused_whole(store: str, tmp_path: Path, command) -> None:
    """Any byte of it changed, or its end missing."""
    file = tmp_path / "run.knapsack"
    assert command("export", "--store", store, "--run", "run", "--to", file).returncode == 0
    data = file.read_bytes()
    other = f"sqlite:///{tmp_path / 'other.db'}"
    damaged = [data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
               for at in (3, 9, 30, len(data) // 3, len(data) // 2, len(data) - 1)]  # fmt: skip
    # Of its frames the last alone, with the checksum that it must have.
    head = data[:10]
    digest = hashlib.blake2b(head, digest_size=32).digest()
    end = head + data[-len(digest) - 9 : -len(digest)] + digest
    for wrong in (*damaged, data[: len(data) * 2 // 3], data + b"more", b"", end):
        file.write_bytes(wrong)
        done = command("import", "--store", other, "--from", file)
        assert done.returncode == 2
        assert "the file is" in done.stderr
    assert command("check", "--store", other).stdout == "0 runs\n"


async def test_a_run_that_was_put_back_is_not_listed_as_what_it_was(tmp_path: Path, calls) -> None:
    """It has the identity of the one that was deleted, and as many entries before long."""
    async with open_service(f"sqlite:///{tmp_path / 'stats.db'}") as service:
        journal, file = service._journal, io.BytesIO()

        async def listed() -> int:
            return (await service.list_runs(pb.ListRunsRequest())).runs[0].total_rollouts

        await service.report(calls.own_report(["a"], [[1.0]], report_id="kept"))
        with journal.reading("run") as reading:
            write_run(reading, file)
        await service.report(calls.own_report(["a"], [[1.0]], report_id="lost"))
        assert await listed() == 2
        await service.delete_run(pb.DeleteRunRequest(run_id="run"))
        file.seek(0)
        read_run(journal, file)
        await service.report(calls.own_report(["a"], [[1.0, 0.0, 1.0]], report_id="new"))
        assert await listed() == 4


def test_an_export_that_is_killed_leaves_no_file_of_its_name(
    store: str, tmp_path: Path, command
) -> None:
    """What there is of it is in the way of no other export."""
    file = tmp_path / "run.knapsack"
    arguments = ["export", "--store", store, "--run", "run", "--to", str(file)]
    killed = subprocess.run(
        ["strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=fsync",
         "-e", "inject=fsync:signal=SIGKILL", sys.executable, "-m", "knapsack_scheduler.cli",
         *arguments],
        check=False,
    )  # fmt: skip
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert [path.name for path in tmp_path.glob("run.*")] == ["run.knapsack.partial"]
    assert command(*arguments).returncode == 0
    assert [path.name for path in tmp_path.glob("run.*")] == ["run.knapsack"]


async def test_of_a_malformed_file_the_whole_runs_are_named_and_exported(
    tmp_path: Path, command, calls
) -> None:
    """One page is lost, and with it one run; the others move to a new store."""
    file = tmp_path / "stats.db"
    async with open_service(f"sqlite:///{file}") as service:
        for calls.run_id in ("broken", "whole"):
            await service.create_run(pb.CreateRunRequest(run_id=calls.run_id))
            for step in range(20):
                ids = [f"{calls.run_id}-{step}-{position}" for position in range(100)]
                await service.allocate(calls.allocate(ids, 400, step, f"{step}"))
    data, page = bytearray(file.read_bytes()), 4096
    at = data.index(b"broken-10-50") // page * page
    data[at : at + page] = b"U" * page
    file.write_bytes(data)
    store, other = f"sqlite:///{file}", f"sqlite:///{tmp_path / 'new.db'}"
    done = command("check", "--store", store)
    assert done.returncode == 1
    assert "run 'broken': the store cannot be used" in done.stderr
    assert "run 'whole': 20 entries" in done.stdout
    saved = tmp_path / "whole.run"
    assert command("export", "--store", store, "--run", "broken", "--to", saved).returncode == 2
    assert command("export", "--store", store, "--run", "whole", "--to", saved).returncode == 0
    assert command("import", "--store", other, "--from", saved).returncode == 0
    assert command("check", "--store", other).returncode == 0


@pytest.mark.parametrize("column", ["key", "step", "digest", "payload", "answer"])
async def test_a_changed_byte_of_an_entry_is_found(store: str, column: str, command, calls) -> None:
    """SQLite notices nothing. Neither the check nor a scheduler takes it for what was written."""
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        (last,) = database.execute("SELECT max(seq) FROM entries").fetchone()
        (value,) = database.execute(f"SELECT {column} FROM entries WHERE seq = {last}").fetchone()
        changed: object = value[:-1] + bytes([value[-1] ^ 1]) if isinstance(value, bytes) else 7
        database.execute("DELETE FROM snapshots WHERE seq > ?", (last - 1,))
        database.execute(f"UPDATE entries SET {column} = ? WHERE seq = {last}", (changed,))
    database.close()
    done = command("check", "--store", store)
    assert done.returncode == 1
    assert f"run 'run': entry {last} is damaged" in done.stderr
    async with open_service(store) as service:
        with pytest.raises(StoreUnavailable, match=f"entry {last} is damaged"):
            await service.allocate(calls.allocate())


@pytest.mark.parametrize("column", ["run_id", "config", "create_time", "identity"])
async def test_a_changed_byte_of_a_run_is_found(store: str, column: str, command, calls) -> None:
    """Other settings would divide another way. The run is refused, in a file for another store
    too, where its checksum would be made anew, and all else is served."""
    async with open_service(store) as service:
        calls.run_id = "other"
        await service.report(calls.own_report(["a"], [[1.0]]))
        calls.run_id = "run"
        config = pb.RunConfig(policy="uniform")
        await service.create_run(pb.CreateRunRequest(run_id="set", config=config))
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        (value,) = database.execute(f"SELECT {column} FROM runs WHERE run_id = 'run'").fetchone()
        (other,) = database.execute("SELECT config FROM runs WHERE run_id = 'set'").fetchone()
        assert other != value
        changed = {"run_id": "Run", "config": other}.get(column) or value ^ 4096
        database.execute(f"UPDATE runs SET {column} = ? WHERE run_id = 'run'", (changed,))
    database.close()
    name = "Run" if column == "run_id" else "run"
    done = command("check", "--store", store)
    assert done.returncode == 1
    assert f"run '{name}': its row is damaged" in done.stderr
    assert "run 'other': 1 entry" in done.stdout
    async with open_service(store) as service:
        calls.run_id = name
        with pytest.raises(StoreUnavailable, match="its row is damaged"):
            await service.allocate(calls.allocate())
        with (
            service._journal.reading(name) as reading,
            pytest.raises(StoreUnavailable, match="its row is damaged"),
        ):
            write_run(reading, io.BytesIO())
        calls.run_id = "other"
        await service.allocate(calls.allocate())


def test_the_check_finds_what_is_missing(store: str, command) -> None:
    """A part of a snapshot, the snapshot that the journal begins with, or a rewind."""
    file = Path(store.removeprefix("sqlite:///"))
    whole = file.read_bytes()
    for damage, found in (
        ("DELETE FROM snapshot_parts WHERE part = 1", "is damaged"),
        ("DELETE FROM snapshots WHERE seq = (SELECT floor_seq FROM runs)", "there is no snapshot"),
        ("DELETE FROM entries WHERE kind = 'rewind' AND seq < (SELECT floor_seq FROM runs)",
         "its number of rewinds is not that of its entries"),
        ("PRAGMA foreign_keys=OFF; UPDATE entries SET run_key = 9 WHERE kind = 'import'",
         "is of no run"),
    ):  # fmt: skip
        with sqlite3.connect(file) as database:
            database.executescript(damage)
        database.close()
        done = command("check", "--store", store)
        assert (done.returncode, found in done.stderr) == (1, True), (damage, done.stderr)
        file.write_bytes(whole)
    assert command("check", "--store", store).returncode == 0


def test_the_check_finds_a_damaged_and_a_false_snapshot(store: str, command) -> None:
    """By its checksum, or because the entries come to something else."""
    assert command("check", "--store", store).returncode == 0
    file = store.removeprefix("sqlite:///")
    with sqlite3.connect(file) as database:
        (first,) = database.execute("SELECT min(seq) FROM snapshots").fetchone()
        (later,) = database.execute(
            "SELECT min(seq) FROM entries WHERE kind='report' AND seq > ?", (first,)
        ).fetchone()
        payload = database.execute(
            "SELECT payload FROM entries WHERE seq = ?", (later,)
        ).fetchone()[0]
        request = pb.ReportRequest.FromString(payload)
        request.rewards[0] = 0.0
        database.execute(
            "UPDATE entries SET payload = ?, checksum = NULL WHERE seq = ?",
            (request.SerializeToString(), later),
        )
    database.close()
    done = command("check", "--store", store)
    assert done.returncode == 1
    assert "its newest snapshot is not what its entries come to" in done.stderr
    with sqlite3.connect(file) as database:
        database.execute("UPDATE snapshots SET checksum = x'00' WHERE seq = ?", (first,))
    database.close()
    done = command("check", "--store", store)
    assert done.returncode == 1
    assert f"its snapshot at entry {first} is damaged" in done.stderr


async def test_the_check_finds_nothing_where_an_old_call_was_made_again(
    tmp_path: Path, calls, command
) -> None:
    """Its id is not recognised any more, and its allocation has the name of a compacted one."""
    url = f"sqlite:///{tmp_path / 'stats.db'}"
    async with open_service(url, retention=Retention(4, NEVER, 3)) as service:
        for step in (*range(16), *range(9), *range(16, 19)):
            answer = await service.allocate(calls.allocate(["a", "b"], 8, step, f"step-{step}"))
            await service.report(calls.report(answer.allocation_id, [[1.0], [0.0]]))
            await settled(service)
    done = command("check", "--store", url)
    assert done.returncode == 0, done.stderr

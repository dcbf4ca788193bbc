"""The promises of the journal, on every database there is."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knapsack_scheduler.errors import AlreadyExists, ConfigError, NotFound, StoreUnavailable
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry


@pytest.fixture(params=["sqlite file", "sqlite memory", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store of each kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").new_store()
    return "sqlite://" if request.param == "sqlite memory" else f"sqlite:///{tmp_path / 's.db'}"


@pytest.fixture
def journal(store: str) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal(store)
    opened.open()
    yield opened
    opened.close()


def entry(key: str = "k", kind: str = "report", step: int = 0, payload: bytes = b"p") -> Entry:
    """Return an entry to append."""
    return Entry(0, kind, key, 0, step, b"d" * 16, payload, b"answer")


def append(journal: Journal, *new: Entry) -> None:
    """Append entries to the run "run" in one transaction."""
    with journal.writing("run") as writing:
        for each in new:
            writing.append(each)


def keys(journal: Journal, after: int = 0) -> list[str]:
    """Return the keys of the run's entries."""
    with journal.writing("run") as writing:
        return [e.key for e in writing.tail(after)]


def test_entries_are_numbered_in_order_and_found_again(journal: Journal) -> None:
    """The tail begins where the reader stopped, and an entry comes back as it went in."""
    journal.create_run("run", b"config", 7)
    append(journal, entry("a"), entry("b", step=3, payload=bytes(range(256))))
    append(journal, entry("c"))
    with journal.writing("run") as writing:
        found = list(writing.tail(1))
        assert [e.seq for e in found] == [2, 3]
        assert found[0] == writing.entry(2)
        assert (found[0].step, found[0].payload) == (3, bytes(range(256)))
        assert [(e.seq, e.kind, e.step) for e in writing.outline()] == [
            (1, "report", 0),
            (2, "report", 3),
            (3, "report", 0),
        ]
        assert (writing.run.last_seq, writing.run.config, writing.run.create_time) == (
            3, b"config", 7,
        )  # fmt: skip


def test_a_block_that_raises_leaves_nothing(journal: Journal) -> None:
    """Neither its entries nor their numbers."""
    journal.create_run("run", b"", 0)
    append(journal, entry("kept"))

    def fail() -> None:
        with journal.writing("run") as writing:
            writing.append(entry("lost"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    append(journal, entry("next"))
    assert keys(journal) == ["kept", "next"]


def test_no_call_is_recorded_twice_in_a_branch(journal: Journal) -> None:
    """(kind, key) is unique until a rewind begins the next branch."""
    journal.create_run("run", b"", 0)
    append(journal, entry("a"), entry("a", kind="allocate"))
    with pytest.raises(Exception, match=r"UNIQUE|unique"), journal.writing("run") as writing:
        writing.append(entry("a"))
    append(journal, entry("back", kind="rewind"))
    append(journal, entry("a"))
    with journal.writing("run") as writing:
        assert [e.branch for e in writing.tail(0)] == [0, 0, 0, 1]
        assert writing.run.branch == 1


def test_an_entry_is_appended_to_a_run_as_it_was_read(journal: Journal) -> None:
    """It is stored as in a transaction of one's own, and the run is what is said of it."""
    run = journal.create_run("run", b"config", 7)
    for number, now in enumerate((10, 12, 11), 1):
        given = entry(f"k{number}", step=number, payload=bytes([number]))
        stored = journal.append(run, given, now)
        assert stored == run.numbered(given)
        run = run.after(stored, now)
        assert journal.find_run("run") == run
    assert (run.last_seq, run.update_time) == (3, 12)
    append(journal, entry("back", kind="rewind", step=2))
    run = journal.find_run("run")
    assert run is not None
    assert journal.append(run, entry("k1"), 13) == run.numbered(entry("k1"))
    with journal.writing("run") as writing:
        found = list(writing.tail(0))
        assert [(e.seq, e.key, e.branch) for e in found] == [
            (1, "k1", 0), (2, "k2", 0), (3, "k3", 0), (4, "back", 0), (5, "k1", 1),
        ]  # fmt: skip
        assert [e.payload for e in found[:3]] == [b"\1", b"\2", b"\3"]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE runs SET snapshot_seq = 1",
        "UPDATE runs SET floor_seq = 1",
        "UPDATE runs SET floor_step = 0",
        "UPDATE runs SET closed_step = 0",
        "UPDATE runs SET branch = 1",
        "UPDATE runs SET identity = identity + 1",
    ],
)
def test_nothing_is_appended_to_a_run_that_has_changed(journal: Journal, change: str) -> None:
    """By another call, a snapshot, a compaction, a rewind, or as another run of its name."""
    run = journal.create_run("run", b"", 0)
    first = journal.append(run, entry("first"), 1)
    assert first is not None
    assert journal.append(run, entry("of what it was before"), 2) is None
    run = run.after(first, 1)
    with journal.transaction() as connection:
        connection.exec_driver_sql(change)
    assert journal.append(run, entry("lost"), 3) is None
    there = journal.find_run("run")
    assert there is not None
    assert (there.last_seq, there.update_time) == (1, 1)
    with journal.reading("run") as reading:
        assert reading.entry(1).key == "first"
        assert len(list(reading.tail(1))) == 0
    assert journal.append(there, entry("next"), 4) is not None


def test_nothing_is_appended_to_a_run_that_was_deleted(journal: Journal) -> None:
    """Nor to the one that has its place in the database now."""
    run = journal.create_run("run", b"", 0)
    journal.delete_run("run")
    assert journal.append(run, entry("lost"), 1) is None
    journal.create_run("run", b"", 0)
    assert journal.append(run, entry("lost"), 1) is None
    assert keys(journal) == []


def test_no_call_is_appended_twice(journal: Journal) -> None:
    """The second one leaves nothing, neither its entry nor a number."""
    run = journal.create_run("run", b"", 0)
    first = journal.append(run, entry("a"), 1)
    assert first is not None
    run = run.after(first, 1)
    with pytest.raises(Exception, match=r"UNIQUE|unique"):
        journal.append(run, entry("a"), 2)
    assert journal.find_run("run") == run


def test_a_journal_is_not_closed_under_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that they do next is stored, and the file is not another's to open meanwhile."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    journal = Journal(url)
    journal.open()
    run = journal.create_run("run", b"", 0)
    assert journal._writer is not None
    monkeypatch.setattr(journal._writer, "_patience", 0.01)
    append_entry = journal._statements.append

    def closed_before(*arguments: Any) -> None:
        journal.close()
        with pytest.raises(ConfigError, match="in use"):
            Journal(url).open()
        append_entry(*arguments)

    monkeypatch.setattr(journal._statements, "append", closed_before)
    with pytest.raises(StoreUnavailable, match="is closed"):
        journal.append(run, entry("lost"), 1)
    journal.close()
    again = Journal(url)
    again.open()
    assert again.find_run("run") == run
    assert keys(again) == []
    again.close()


def test_one_of_two_who_append_to_a_run_at_once_does(journal: Journal) -> None:
    """Each of them has read it as it is."""
    run = journal.create_run("run", b"", 0)
    begin = threading.Barrier(2)
    done: list[bool] = []

    def work(name: str) -> None:
        begin.wait(30)
        done.append(journal.append(run, entry(name), 1) is not None)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == [False, True]
    assert len(keys(journal)) == 1


def test_runs_are_apart_and_named_once(journal: Journal) -> None:
    """A name is taken until its run is deleted, and then nothing of it is left."""
    first = journal.create_run("run", b"one", 0)
    with pytest.raises(AlreadyExists):
        journal.create_run("run", b"two", 0)
    journal.create_run("other", b"", 0)
    append(journal, entry("a"))
    assert journal.find_run("run") == first or journal.find_run("run").last_seq == 1
    assert [run.run_id for run in journal.list_runs("", 10)] == ["other", "run"]
    assert [run.run_id for run in journal.list_runs("other", 10)] == ["run"]
    journal.delete_run("run")
    assert journal.find_run("run") is None
    for call in (lambda: journal.delete_run("run"), lambda: keys(journal)):
        with pytest.raises(NotFound):
            call()
    again = journal.create_run("run", b"", 0)
    assert again.run_key != first.run_key
    assert keys(journal) == []


def test_a_run_that_is_looked_at_is_not_held(journal: Journal) -> None:
    """A reader sees one moment, to its end, whatever is appended meanwhile."""
    journal.create_run("run", b"", 0)
    append(journal, entry("a"))
    with journal.reading("run") as reading:
        assert [e.key for e in reading.tail(0)] == ["a"]
    append(journal, entry("b"))
    with journal.reading("run") as reading:
        assert (reading.run.last_seq, [e.key for e in reading.tail(0)]) == (2, ["a", "b"])
    with pytest.raises(NotFound), journal.reading("other"):
        pass


def test_a_long_tail_comes_in_order_and_whole(journal: Journal) -> None:
    """However many batches it is fetched in."""
    journal.create_run("run", b"", 0)
    append(journal, *[entry(f"{i}") for i in range(450)])
    assert keys(journal) == [f"{i}" for i in range(450)]
    assert keys(journal, after=250) == [f"{i}" for i in range(250, 450)]


def test_a_run_made_anew_is_another_one(journal: Journal) -> None:
    """Deleted only if nothing was recorded in it, where that is asked for."""
    first = journal.create_run("run", b"", 0)
    journal.delete_run("run", only_new=first.identity + 1)
    assert journal.find_run("run") == first
    append(journal, entry("a"))
    journal.delete_run("run", only_new=first.identity)
    assert keys(journal) == ["a"]
    journal.delete_run("run")
    second = journal.create_run("run", b"", 0)
    assert second.identity != first.identity
    journal.delete_run("run", only_new=second.identity)
    assert journal.find_run("run") is None


def test_writers_of_one_run_wait_for_each_other(journal: Journal) -> None:
    """Threads that append at once get numbers without gap, each as large as it saw."""
    journal.create_run("run", b"", 0)
    wrong: list[object] = []

    def write(worker: int) -> None:
        for number in range(20):
            with journal.writing("run") as writing:
                seen = len(list(writing.tail(0)))
                writing.append(entry(f"{worker}-{number}"))
                if writing.run_after.last_seq != seen + 1:
                    wrong.append((seen, writing.run_after))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert len(set(keys(journal))) == 80


def test_a_file_is_found_as_it_was_left(tmp_path: Path) -> None:
    """Another process, later, reads all that was committed."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    for number in range(3):
        journal = Journal(url)
        journal.open()
        if number == 0:
            journal.create_run("run", b"", 0)
        assert len(keys(journal)) == number
        append(journal, entry(str(number)))
        journal.close()


def test_a_commit_is_on_disk_before_it_is_answered(tmp_path: Path) -> None:
    """SQLite runs in WAL mode and syncs on every commit."""
    journal = Journal(f"sqlite:///{tmp_path / 's.db'}")
    journal.open()
    with journal._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    journal.close()


def broken(path: Path) -> None:
    """Overwrite the second half of a file, where the entries are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b"\xff" * (len(data) - len(data) // 2)
    path.write_bytes(data)


def not_a_database(path: Path) -> None:
    """Make it a text."""
    path.write_text("This is not a database, whatever its name says." * 100)


def from_the_future(path: Path) -> None:
    """Give it a schema that this program does not know."""
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    database.close()


@pytest.mark.parametrize("damage", [not_a_database, from_the_future])
def test_a_store_that_cannot_be_read_is_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """With its name and the reason, and the file is left as it is."""
    path = tmp_path / "s.db"
    journal = Journal(f"sqlite:///{path}")
    journal.open()
    journal.close()
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"s\.db"):
        Journal(f"sqlite:///{path}").open()
    assert path.read_bytes() == before


def test_damage_within_is_an_error_and_not_an_answer(tmp_path: Path) -> None:
    """A page that cannot be read raises StoreUnavailable, and the check finds it."""
    path = tmp_path / "s.db"
    journal = Journal(f"sqlite:///{path}")
    journal.open()
    journal.create_run("run", b"", 0)
    append(journal, *[entry(f"{i}", payload=b"x" * 500) for i in range(100)])
    journal.close()
    broken(path)
    journal = Journal(f"sqlite:///{path}")
    journal.open()
    assert journal.integrity()
    with pytest.raises(StoreUnavailable):
        keys(journal)
    journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second journal on the same file, by whatever name, is refused until the first lets go."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    first = Journal(url)
    first.open()
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link.db").symlink_to(tmp_path / "s.db")
    for name in ("s.db", "link.db", "folder/s.db"):
        with pytest.raises(ConfigError, match="in use by another scheduler"):
            Journal(f"sqlite:///{tmp_path / name}").open()
    first.close()
    second = Journal(url)
    second.open()
    second.close()

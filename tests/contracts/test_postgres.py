"""What several schedulers on one PostgreSQL database rely on."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from knapsack_scheduler.errors import ConfigError, StoreInterrupted, StoreUnavailable
from knapsack_scheduler.journal.compaction import Retention, compact
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry
from knapsack_scheduler.journal.snapshots import Abandoned, is_whole, write_snapshot


def entry(key: str) -> Entry:
    """Return an entry to append."""
    return Entry(0, "report", key, 0, 0, b"d" * 16, b"payload", b"answer")


@pytest.fixture
def store(postgres) -> str:
    """URL of a new database."""
    return postgres.new_store()


@pytest.fixture
def journals(store: str) -> Iterator[list[Journal]]:
    """Three journals on one database, as three processes have them."""
    opened = [Journal(store) for _ in range(3)]
    for journal in opened:
        journal.open()
    yield opened
    for journal in opened:
        journal.close()


def test_a_reader_never_misses_a_row_that_commits_late(journals: list[Journal]) -> None:
    """While a writer has not committed, nobody gets a later number, nor sees one."""
    slow, fast, tailing = journals
    slow.create_run("run", b"", 0)
    appended, go_on = threading.Event(), threading.Event()
    seen: list[list[int]] = []

    def write_slowly() -> None:
        with slow.writing("run") as writing:
            writing.append(entry("late"))
            appended.set()
            assert go_on.wait(60)

    def write_fast() -> None:
        with fast.writing("run") as writing:
            writing.append(entry("fast"))

    def look() -> None:
        with tailing.reading("run") as reading:
            seen.append([e.seq for e in reading.tail(0)])

    first, second = threading.Thread(target=write_slowly), threading.Thread(target=write_fast)
    first.start()
    assert appended.wait(60)
    second.start()
    # The second writer waits in the database for the first one.
    while not _waiting(journals[2]):
        assert second.is_alive()
        look()
    look()
    assert seen[-1] == []
    go_on.set()
    first.join(60)
    second.join(60)
    look()
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in seen)
    with tailing.reading("run") as reading:
        assert [e.key for e in reading.tail(0)] == ["late", "fast"]


def _waiting(journal: Journal) -> bool:
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with journal.transaction() as connection:
        return bool(connection.exec_driver_sql(query).scalar_one())


def test_replicas_that_start_at_once_make_one_schema(store: str) -> None:
    """One migrates, the others wait and find it done."""
    wrong: list[BaseException] = []
    journals = [Journal(store) for _ in range(4)]

    def start(journal: Journal) -> None:
        try:
            journal.open()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=start, args=(journal,)) for journal in journals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    journals[0].create_run("run", b"", 0)
    assert [journal.find_run("run") is not None for journal in journals] == [True] * 4
    for journal in journals:
        journal.close()


def test_a_server_that_restarts_is_used_again(postgres, journals: list[Journal]) -> None:
    """A transaction cut off leaves nothing and says that it may be begun anew."""
    journal = journals[0]
    journal.create_run("run", b"", 0)

    def cut_off() -> None:
        with journal.writing("run") as writing:
            writing.append(entry("lost"))
            postgres.stop()

    try:
        with pytest.raises(StoreInterrupted):
            cut_off()
        with pytest.raises(StoreUnavailable):
            journal.ping()
    finally:
        postgres.start()
    with journal.writing("run") as writing:
        assert list(writing.tail(0)) == []
        writing.append(entry("kept"))
    for other in journals:
        with other.reading("run") as reading:
            assert [e.key for e in reading.tail(0)] == ["kept"]


def test_a_commit_is_on_disk_even_where_the_server_is_set_up_otherwise(postgres) -> None:
    """A database that answers before it has written is told to write first."""
    store = postgres.new_store()
    name = store.split("/")[3].split("?")[0]
    postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    journal = Journal(store)
    with journal.transaction() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
    journal.close()


def test_a_database_that_cannot_hold_every_name_is_refused(postgres) -> None:
    """One without conversion holds the bytes, whatever they mean; others say what is wrong."""
    for encoding, holds in (("LATIN1", False), ("SQL_ASCII", True)):
        store = postgres.new_store(f"ENCODING '{encoding}' TEMPLATE template0")
        journal = Journal(store)
        if holds:
            journal.open()
            assert journal.create_run("l\u00e4uf-\U0001f600", b"", 0) == journal.list_runs("", 1)[0]
        else:
            with pytest.raises(ConfigError, match="has the encoding LATIN1"):
                journal.open()
        journal.close()


def test_a_claim_is_one_journals_until_it_ends(journals: list[Journal]) -> None:
    """Whoever comes second is told so."""
    with journals[0].claim(7) as mine, journals[1].claim(7) as too, journals[1].claim(8) as other:
        assert (mine, too, other) == (True, False, True)
    with journals[1].claim(7) as mine:
        assert mine


def test_a_snapshot_that_lost_its_claim_is_not_taken_for_a_whole_one(
    journals: list[Journal],
) -> None:
    """Another process, which took its parts for left-overs, has deleted some of them."""
    first, other, _ = journals
    run = first.create_run("run", b"", 0)
    with first.writing("run") as writing:
        for number in range(4):
            writing.append(entry(f"{number}"))
    columns = {"noise": np.random.default_rng(0).integers(0, 2**62, 2**20)}
    asked = itertools.count(1)

    def meanwhile() -> bool:
        if next(asked) == 2:
            compact(other, "run", Retention())
        return False

    with pytest.raises(Abandoned, match="another process"):
        write_snapshot(first, run, 4, 0, columns, meanwhile)
    mark = write_snapshot(other, run, 4, 0, columns)
    with first.reading("run") as reading:
        assert reading.snapshots() == [mark]
        assert is_whole(reading, mark)


def test_a_server_that_cannot_be_reached_is_named_without_its_password(tmp_path) -> None:
    """The message says which store and why."""
    journal = Journal(f"postgresql://me:secret@/db?host={tmp_path}")
    with pytest.raises(ConfigError, match="cannot be opened") as raised:
        journal.open()
    assert "secret" not in str(raised.value)
    assert "db" in str(raised.value)

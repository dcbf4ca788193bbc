"""Where undelivered reports wait: one suite for memory and disk, then the disk alone."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from knapsack_trainer_client.outbox import (
    LEASE_SECONDS,
    DiskOutbox,
    Limits,
    MemoryOutbox,
    Outbox,
    OutboxUnusable,
    WaitingRewind,
    default_path,
)
from knapsack_trainer_client.wire import Parcel


class Clock:
    """A clock that stands still until it is moved."""

    now = 1_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


def report(name: str, step: int = 0, size: int = 10) -> Parcel:
    """Return a report of so many bytes."""
    return Parcel(name, "run", step, 3, b"b" * size, b"o" * size)


@pytest.fixture
def clock() -> Clock:
    """A clock in the hands of the test."""
    return Clock()


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Callable[..., Outbox]:
    """Return a function that makes an outbox of either kind."""

    def build(limits: Limits | None = None) -> Outbox:
        limits = limits or Limits()
        if request.param == "memory":
            return MemoryOutbox(limits, clock)
        return DiskOutbox(tmp_path / "deep" / "down.outbox", "run", limits, clock)

    return build


def test_empty_outbox_has_nothing(make: Callable[..., Outbox]) -> None:
    """Every question about nothing has an answer."""
    box = make()
    box.remove(["x"])
    box.postpone(["x"], 1.0)
    box.bury("x", "why")
    box.make_due()
    box.remove_rewind("x")
    assert (box.count(), box.claim(5), box.rewind(), box.drop_after(-1)) == (0, [], None, 0)
    box.close()


def test_reports_come_back_whole_and_in_order(make: Callable[..., Outbox]) -> None:
    """What is put is claimed as it was, oldest first, and once."""
    box = make()
    parcels = [report(f"r{i}", step=i) for i in range(5)]
    for parcel in parcels:
        assert box.put(parcel) == 0
    assert box.put(parcels[0]) == 0
    assert box.count() == 5

    assert box.claim(3) == parcels[:3]
    assert box.claim(3) == parcels[3:]
    assert box.claim(3) == []
    box.remove(["r0", "r3"])
    assert box.count() == 3
    box.close()


def test_lease_ends_by_itself(make: Callable[..., Outbox], clock: Clock) -> None:
    """A taker that says nothing loses its reports to the next after the lease."""
    box = make()
    box.put(report("r"))
    assert box.claim(1)
    clock.now += LEASE_SECONDS - 0.1
    assert not box.claim(1)
    clock.now += 0.2
    assert box.claim(1)
    box.close()


def test_postponed_report_stands_back(make: Callable[..., Outbox], clock: Clock) -> None:
    """A postponed report is not due before its time, unless all are made due."""
    box = make()
    for name in ("a", "b"):
        box.put(report(name))
    box.claim(2)
    box.postpone(["a"], 60.0)
    box.postpone(["b"], 0.0)
    assert [p.report_id for p in box.claim(2)] == ["b"]
    box.make_due()
    assert [p.report_id for p in box.claim(2)] == ["a"]
    box.close()


def test_oldest_are_dropped_at_the_bound(make: Callable[..., Outbox]) -> None:
    """The bound on reports and that on bytes hold, and the newest report stays."""
    box = make(Limits(reports=3, bytes=100))
    assert [box.put(report(f"r{i}")) for i in range(5)] == [0, 0, 0, 1, 1]
    assert [p.report_id for p in box.claim(9)] == ["r2", "r3", "r4"]
    assert box.put(report("big", size=40)) == 2
    assert box.put(report("huge", size=400)) == 2
    assert box.count() == 1
    box.close()


def test_refused_report_is_buried(make: Callable[..., Outbox]) -> None:
    """A buried report is out of the way of the others."""
    box = make()
    box.put(report("bad"))
    box.put(report("good"))
    box.bury("bad", "INVALID_ARGUMENT")
    assert [p.report_id for p in box.claim(9)] == ["good"]
    box.close()


def test_rewind_drops_later_steps(make: Callable[..., Outbox]) -> None:
    """Reports of later steps go, those up to the step stay."""
    box = make()
    for step in range(5):
        box.put(report(f"r{step}", step))
    assert box.drop_after(2) == 2
    assert [p.step for p in box.claim(9)] == [0, 1, 2]
    box.close()


def test_lowest_rewind_waits(make: Callable[..., Outbox]) -> None:
    """Of several rewinds the one to the earliest step counts, until it is removed."""
    box = make()
    for step, name in [(7, "a"), (3, "b"), (5, "c")]:
        box.put_rewind(WaitingRewind(step, name))
    assert box.rewind() == WaitingRewind(3, "b")
    box.remove_rewind("a")
    assert box.rewind() == WaitingRewind(3, "b")
    box.remove_rewind("b")
    assert box.rewind() is None
    box.close()


def test_file_survives_and_is_shared_by_runs(tmp_path: Path, clock: Clock) -> None:
    """A second outbox of the run finds the reports; one of another run does not."""
    path = tmp_path / "box"
    first = DiskOutbox(path, "run", Limits(), clock)
    first.put(report("r", 3))
    first.put_rewind(WaitingRewind(2, "w"))

    second = DiskOutbox(path, "run", Limits(), clock)
    other = DiskOutbox(path, "other", Limits(), clock)
    other.put(Parcel("r", "other", 0, 1, b"", b""))

    assert second.count() == 1
    assert second.claim(9) == [report("r", 3)]
    assert first.claim(9) == []
    assert second.rewind() == WaitingRewind(2, "w")
    assert other.rewind() is None
    assert other.count() == 1
    for box in (first, second, other):
        box.close()


def test_nothing_waiting_makes_no_file(tmp_path: Path) -> None:
    """Looking into an outbox does not make a file."""
    box = DiskOutbox(tmp_path / "box", "run", Limits())
    assert box.count() == 0
    assert not box.claim(1)
    assert os.listdir(tmp_path) == []


def test_clock_set_back_does_not_hide_reports(tmp_path: Path, clock: Clock) -> None:
    """A due time far ahead is taken as due now."""
    box = DiskOutbox(tmp_path / "box", "run", Limits(), clock)
    box.put(report("r"))
    box.claim(1)
    clock.now -= 500_000.0
    assert box.claim(1)
    box.close()


def test_dead_letters_keep_report_and_reason(tmp_path: Path) -> None:
    """A person can look up what was refused, and why."""
    path = tmp_path / "box"
    box = DiskOutbox(path, "run", Limits())
    box.put(report("bad", 4))
    box.bury("bad", "rewards: too many")
    box.close()
    with sqlite3.connect(path) as sql:
        rows = sql.execute("SELECT report_id, step, body, reason FROM dead_letters").fetchall()
    sql.close()
    assert rows == [("bad", 4, b"b" * 10, "rewards: too many")]


@pytest.mark.parametrize("trouble", ["corrupt", "folder", "newer"])
def test_unusable_file_is_said_to_be(tmp_path: Path, trouble: str) -> None:
    """A file that is none of ours is refused and left as it is."""
    path = tmp_path / "box"
    if trouble == "corrupt":
        path.write_bytes(b"this is not a database" * 100)
    elif trouble == "folder":
        path.mkdir()
    else:
        with sqlite3.connect(path) as sql:
            sql.execute("PRAGMA user_version = 99")
        sql.close()
    box = DiskOutbox(path, "run", Limits())
    with pytest.raises(OutboxUnusable):
        box.put(report("r"))
    with pytest.raises(OutboxUnusable):
        box.count()
    box.close()


def _fill(path: str, name: str) -> None:
    box = DiskOutbox(Path(path), "run", Limits())
    for i in range(20):
        box.put(report(f"{name}-{i}"))
    box.close()


def test_processes_share_a_new_file(tmp_path: Path) -> None:
    """Processes that meet at a file that does not exist yet lose nothing."""
    context = multiprocessing.get_context("spawn")
    path = str(tmp_path / "box")
    processes = [context.Process(target=_fill, args=(path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    box = DiskOutbox(Path(path), "run", Limits())
    assert box.count() == 80
    box.close()


def test_default_path_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is ours if named, else the user's state folder; one file per target and run."""
    monkeypatch.setenv("KNAPSACK_RL_OUTBOX", "/x")
    assert default_path("h:1", "run").parent == Path("/x")
    monkeypatch.delenv("KNAPSACK_RL_OUTBOX")
    monkeypatch.setenv("XDG_STATE_HOME", "/y")
    assert default_path("h:1", "run").parent == Path("/y/knapsack-rl")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/z")
    assert default_path("h:1", "run").parent == Path("/z/.local/state/knapsack-rl")
    names = {default_path(t, r).name for t in ("h:1", "h:2") for r in ("run", "ner")}
    assert len(names) == 4

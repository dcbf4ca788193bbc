"""A look into a store from the command line: is it whole, and what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.errors import ConfigError, NotFound, SchedulerError, StoreUnavailable
from knapsack_scheduler.journal.backup import sync
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.runfile import read_run, write_run
from knapsack_scheduler.journal.snapshots import is_whole, limits_after, usable
from knapsack_scheduler.journal.transaction import Reading
from knapsack_scheduler.loaded import LoadedRun


@dataclass(slots=True)
class StoreReport:
    """What a check of a store found.

    Attributes:
        lines: a summary, a line per run.
        faults: what is wrong; empty if nothing.
    """

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def check_store(url: str) -> StoreReport:
    """Return what a check of the whole store finds: the file, the schema, every run.

    Raises:
        ConfigError: the store cannot be opened at all.
    """
    report = StoreReport()
    journal = Journal(url, read_only=True)
    journal.open()
    try:
        try:
            report.faults += journal.integrity()
        except SchedulerError as error:
            # Runs that lie elsewhere in the file may be whole: they can be exported.
            report.faults.append(str(error))
        runs = journal.list_runs("", 10**9)
        report.lines.append(_counted(len(runs), "run"))
        for row in runs:
            check_run(journal, row.run_id, report)
    except SchedulerError as error:
        report.faults.append(str(error))
    finally:
        journal.close()
    return report


def check_run(journal: Journal, run_id: str, report: StoreReport) -> None:
    """Add to a report what is found of one run; nothing if it is deleted meanwhile."""
    try:
        with journal.reading(run_id) as reading:
            reading.check_run()
            faults = _entry_faults(reading) or _snapshot_faults(reading)
            report.faults += [f"run {run_id!r}: {fault}" for fault in faults]
            state = LoadedRun.load(reading).state
            report.lines.append(
                f"run {run_id!r}: {_counted(reading.run.last_seq, 'entry', 'entries')}, "
                f"last step {state.last_step}, {_counted(state.known_prompts, 'known prompt')}, "
                f"{_counted(state.total_rollouts, 'rollout')}"
            )
    except NotFound:
        return
    except SchedulerError as error:
        named = f"run {run_id!r}: "
        report.faults.append(named + str(error).removeprefix(named))
    except Exception as error:
        report.faults.append(f"run {run_id!r}: cannot be folded: {type(error).__name__}: {error}")


def _counted(count: int, noun: str, many: str = "") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {many or noun + 's'}"


def _entry_faults(reading: Reading) -> list[str]:
    """Return what is wrong with the entries: their numbers, and each that is damaged."""
    run, outline, faults = reading.run, reading.outline(), []
    numbers = [entry.seq for entry in outline if entry.seq > run.floor_seq]
    if numbers != list(range(run.floor_seq + 1, run.last_seq + 1)):
        faults.append("its entries are not numbered without gap")
    rewinds = 0
    for entry in outline:
        if entry.branch != rewinds:
            faults.append(f"entry {entry.seq} is not of the branch that the rewinds before it say")
        rewinds += entry.kind == "rewind"
        try:
            reading.entry(entry.seq)
        except StoreUnavailable:
            faults.append(f"entry {entry.seq} is damaged: its checksum is wrong")
    if run.branch != rewinds:
        faults.append("its number of rewinds is not that of its entries")
    return faults


def _snapshot_faults(reading: Reading) -> list[str]:
    """Return what is wrong with the snapshots: damaged, missing, or other than the entries say."""
    marks, floor_seq = reading.snapshots(), reading.run.floor_seq
    faults = [
        f"its snapshot at entry {mark.seq} is damaged; an older one is used instead"
        for mark in marks
        if not is_whole(reading, mark)
    ]
    # Where all began anew since, nothing is folded from there any more.
    outline = reading.outline()
    needed = floor_seq and limits_after(outline, None)(floor_seq) >= 0
    if needed and floor_seq not in [mark.seq for mark in usable(marks, reading.run, outline)]:
        faults.append(f"its journal begins after entry {floor_seq}, of which there is no snapshot")
    if faults or not marks:
        return faults
    newest = LoadedRun.load(reading).state.columns()
    folded = LoadedRun.load(reading, from_oldest=True).state.columns()
    wrong = [
        name
        for name in newest
        # The first two say the same however much more they remember; what was predicted is not
        # in the journal, and another version of the scheduler may predict otherwise.
        if not name.startswith(("visited.", "revisited.", "calibration.", "allocation.chance"))
        and newest[name].tobytes() != folded[name].tobytes()
    ]
    if wrong:
        faults.append(f"its newest snapshot is not what its entries come to: {', '.join(wrong)}")
    return faults


def write_run_file(url: str, run_id: str, to: Path) -> int:
    """Write a run to a new file; returns its bytes.

    Raises:
        ConfigError: the store cannot be opened, or the file exists or cannot be written.
        NotFound: no run of that name.
    """
    partial = to.with_name(f"{to.name}.partial")
    journal = Journal(url, read_only=True)
    journal.open()
    try:
        if to.exists():
            raise ConfigError(f"to = {str(to)!r}: exists already")
        with journal.reading(run_id) as reading, partial.open("wb") as file:
            write_run(reading, file)
            file.flush()
            os.fsync(file.fileno())
        # Whole, or not there under its name.
        os.rename(partial, to)
        sync(to.parent)
    except OSError as error:
        raise ConfigError(f"to = {str(to)!r}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
        journal.close()
    return to.stat().st_size


def read_run_file(url: str, file: Path, run_id: str | None) -> RunRow:
    """Store the run of a file; returns its row.

    Raises:
        ConfigError: the store cannot be opened, or the file is not a whole run.
        AlreadyExists: there is a run of that name.
    """
    journal = Journal(url)
    journal.open()
    try:
        with file.open("rb") as opened:
            return read_run(journal, opened, run_id)
    except OSError as error:
        raise ConfigError(f"from = {str(file)!r}: cannot be read: {error.strerror}") from error
    finally:
        journal.close()


def export_run(url: str, run_id: str, what: str) -> Iterator[dict[str, Any]]:
    """Yield a run's recorded calls, or its prompts' statistics, as plain objects.

    Raises:
        ConfigError: the store cannot be opened.
        NotFound: no run of that name.
    """
    journal = Journal(url, read_only=True)
    journal.open()
    try:
        if journal.find_run(run_id) is None:
            raise NotFound(f"run {run_id!r} does not exist")
        with journal.reading(run_id) as reading:
            if what == "journal":
                for outline in reading.outline():
                    yield _plain(reading.entry(outline.seq))
                return
            run = LoadedRun.load(reading)
            state = run.state
            rows = state.prompts_after("", state.known_prompts)
            ids = [state.prompt_ids[row] for row in rows.tolist()]
            message = wire.stats_message(ids, state.stats_of(rows))
            for at, prompt_id in enumerate(message.prompt_ids):
                yield {
                    "prompt_id": prompt_id,
                    "total_rollouts": message.total_rollouts[at],
                    "total_successes": message.total_successes[at],
                    "last_step": message.last_step[at],
                    "last_policy_version": message.last_policy_version[at],
                    "posterior_alpha": message.posterior_alpha[at],
                    "posterior_beta": message.posterior_beta[at],
                    "mean_completion_tokens": message.mean_completion_tokens[at],
                }
    finally:
        journal.close()


_MESSAGES: dict[str, tuple[Any, Any]] = {
    "allocate": (pb.AllocateRequest, pb.Allocation),
    "extend": (pb.ExtendRequest, pb.Allocation),
    "report": (pb.ReportRequest, pb.ReportResponse),
    "rewind": (pb.RewindRunRequest, pb.Run),
}


def _plain(entry: Entry) -> dict[str, Any]:
    line: dict[str, Any] = {"seq": entry.seq, "kind": entry.kind}
    if entry.kind == "import":
        # A stream, not a message; and what it brought are outcomes, not decisions.
        answer = pb.ImportOutcomesResponse.FromString(entry.answer)
        line["rollouts"], line["prompts"] = answer.imported_rollouts, answer.imported_prompts
        return line
    pair = zip(
        ("request", "answer"), _MESSAGES[entry.kind], (entry.payload, entry.answer), strict=True
    )
    for name, kind, data in pair:
        line[name] = MessageToDict(kind.FromString(data), preserving_proto_field_name=True)
    return line

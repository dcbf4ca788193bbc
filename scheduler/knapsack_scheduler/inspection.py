"""A look into a store from the command line: is it whole, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.errors import NotFound, SchedulerError
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.limits import Limits
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
        report.faults += journal.integrity()
        runs = journal.list_runs("", 10**9)
        report.lines.append(f"{len(runs)} runs")
        for row in runs:
            _check_run(journal, row, report)
    except SchedulerError as error:
        report.faults.append(str(error))
    finally:
        journal.close()
    return report


def _check_run(journal: Journal, row: RunRow, report: StoreReport) -> None:
    try:
        with journal.reading(row.run_id) as reading:
            row = reading.run
            numbers = [entry.seq for entry in reading.outline() if entry.seq > row.floor_seq]
            if numbers != list(range(row.floor_seq + 1, row.last_seq + 1)):
                report.faults.append(
                    f"run {row.run_id!r}: its entries are not numbered without gap"
                )
            state = LoadedRun.load(reading).state
            report.lines.append(
                f"run {row.run_id!r}: {row.last_seq} entries, last step {state.last_step}, "
                f"{state.known_prompts} known prompts, {state.total_rollouts} rollouts"
            )
    except SchedulerError:
        raise
    except Exception as error:
        report.faults.append(
            f"run {row.run_id!r}: cannot be folded: {type(error).__name__}: {error}"
        )


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
                for entry in reading.tail(0):
                    yield _plain(entry)
                return
            run = LoadedRun.load(reading)
            known = run.state.sorted_prompts()
            rows = np.fromiter((row for _, row in known), np.int64, len(known))
            columns = run.state.stats_of(rows)
            message = wire.stats_message([p for p, _ in known], columns)
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
        parts = wire.imported_of(entry.payload, Limits()).parts
        line["rollouts"] = sum(part.rewards.rewards.size for part in parts)
        line["prompts"] = sum(len(part.prompt_ids) for part in parts)
        return line
    request, answer = _MESSAGES[entry.kind]
    for name, kind, data in (("request", request, entry.payload), ("answer", answer, entry.answer)):
        line[name] = MessageToDict(kind.FromString(data), preserving_proto_field_name=True)
    return line

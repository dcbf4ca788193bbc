"""One run in memory: its state, and the calls it can still recognise.

Made of the newest snapshot that can be used and the entries after it; the same, to the
bit, as a fold of everything that was ever recorded. It holds what the journal holds:
when the journal is compacted, allocations and ids of compacted calls go from here too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import wire
from knapsack_scheduler.allocations import Counted, OpenAllocation
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    StoreUnavailable,
)
from knapsack_scheduler.facts import ALWAYS, AllocationMade, Fact
from knapsack_scheduler.journal.columns import ColumnsDamaged
from knapsack_scheduler.journal.records import ALWAYS_KEPT, Entry, Outline, RunRow
from knapsack_scheduler.journal.snapshots import limits_after, read_snapshot, usable
from knapsack_scheduler.journal.transaction import Reading
from knapsack_scheduler.state import RunState

_LOG = logging.getLogger(__name__)

_LONG_TAIL = 500
"""Entries more than these are folded without holding the run."""

_RUN_BYTES, _PROMPT_BYTES, _CALL_BYTES, _POSITION_BYTES = 50_000, 530, 400, 40
"""What a run, a known prompt, a recognised call and a prompt of an allocation take."""


class LoadedRun:
    """One run's state and how far it has read the journal.

    Attributes:
        row: the run as it was read last.
        state: the fold of its entries.
        seq: number of the newest entry in the state.
        intact: false while the state is being changed: if that fails, it is no state.
        snapshot_seq: number of the newest entry in the newest snapshot that can be used.
        tail_bytes: of the entries folded after it.
    """

    def __init__(self, row: RunRow) -> None:
        self.row = row
        self.state = RunState(wire.parse_config(pb.RunConfig.FromString(row.config)))
        self.seq = 0
        self.intact = True
        self.snapshot_seq = 0
        self.tail_bytes = 0
        self._seen_snapshot = row.snapshot_seq
        # The id of every call: number, digest, and branch.
        self._calls: dict[tuple[str, str], tuple[int, bytes, int]] = {}
        # What rewinds forgot: reports by id and digest, allocations by name.
        self._forgotten: dict[tuple[str, bytes], int] = {}
        self._abandoned: dict[str, int] = {}
        self._floor = row.floor_seq
        self._positions = 0

    @classmethod
    def load(
        cls, reading: Reading, rewound_to: int | None = None, *, from_oldest: bool = False
    ) -> LoadedRun:
        """Return a run level with what is read, without what its rewinds forget.

        Args:
            reading: of the run.
            rewound_to: step of a rewind that is about to be appended.
            from_oldest: fold as much as there is, to compare it with the newest snapshot.

        Raises:
            FailedPrecondition: the journal does not go back to ``rewound_to``.
            StoreUnavailable: what is needed cannot be read.
        """
        reading.check_run()
        run = cls(reading.run)
        outline = reading.outline()
        kept = _kept(outline, rewound_to)
        run._restore(reading, outline, rewound_to, from_oldest)
        for each in outline:
            if each.seq > max(run.seq, run.row.floor_seq):
                break
            run._take_id(each, kept[each.seq])
        if run.seq == 0:
            # No snapshot, or a rewind to before all steps: what it leaves are imports.
            for each in outline:
                if each.kind == "import" and each.seq <= run.row.floor_seq:
                    run.applied(reading.entry(each.seq))
        for entry in reading.tail(run.seq):
            if entry.kind == "rewind" or kept[entry.seq]:
                run.applied(entry)
            else:
                run._take_id(entry, False)
                run.seq = entry.seq
        # Not before: entries of the tail may be of an allocation that is compacted since.
        run._drop_compacted_allocations()
        return run

    def _restore(
        self, reading: Reading, outline: list[Outline], rewound_to: int | None, from_oldest: bool
    ) -> None:
        marks = usable(reading.snapshots(), self.row, outline, rewound_to)
        if from_oldest:
            marks = marks[:1] if self.row.floor_seq else []
        for mark in reversed(marks):
            try:
                columns = read_snapshot(reading, mark)
                self.state = RunState.from_columns(self.state.config, columns)
            except (ColumnsDamaged, ValueError, KeyError, TypeError) as error:
                _LOG.error(
                    "run %r: snapshot %d cannot be used, an older one is: %s: %s",
                    self.row.run_id,
                    mark.seq,
                    type(error).__name__,
                    error,
                )
                continue
            self.seq = self.snapshot_seq = mark.seq
            return
        if self.row.floor_seq == 0 or limits_after(outline, rewound_to)(self.row.floor_seq) < 0:
            return
        if rewound_to is not None:
            raise FailedPrecondition(
                f"step = {rewound_to}: run {self.row.run_id!r} can be rewound to step "
                f"{max(self.row.floor_step, 0)} or a later one, or to -1, which begins anew; "
                "the steps before are compacted"
            )
        raise StoreUnavailable(
            f"run {self.row.run_id!r}: none of its snapshots can be read, and its journal begins "
            f"at entry {self.row.floor_seq + 1}; bring the store back from a backup"
        )

    def stands_at(self, row: RunRow) -> bool:
        """Return whether the run is still what it is here, by its row as it is read now.

        False after any call or rewind, after a compaction, and for another run of the name.
        """
        here = (self.row.run_key, self.row.identity, self.seq, self._floor)
        return self.intact and here == (row.run_key, row.identity, row.last_seq, row.floor_seq)

    def catch_up(self, reading: Reading) -> bool:
        """Fold what was appended since; false if that takes a fold of the whole anew."""
        before, self.row = self.row, reading.run
        same = (before.run_key, before.identity) == (self.row.run_key, self.row.identity)
        if not same or self.row.last_seq < self.seq:
            # Deleted and made anew, or the store was brought back from a backup.
            self.intact = False
            return False
        if self.row.snapshot_seq > self._seen_snapshot:
            # Another process made one.
            self.snapshot_made(self.row.snapshot_seq)
        if self.row.floor_seq > self.seq or self.row.last_seq - self.seq > _LONG_TAIL:
            return False
        if self.seq != reading.run.last_seq:
            tail = list(reading.tail(self.seq))
            if any(entry.kind == "rewind" for entry in tail):
                return False
            for entry in tail:
                self.applied(entry)
        self.forget_compacted()
        return True

    def catch_up_rewound(self, reading: Reading, step: int) -> bool:
        """Fold what was appended since, without what a rewind to ``step`` forgets.

        Of a run that was loaded for this rewind, which is about to be appended. False if it
        has to be loaded for it anew: after another rewind, after many calls, or when the
        journal was compacted meanwhile and may not go back as far any more.
        """
        before, row = self.row, reading.run
        same = (before.run_key, before.identity, before.branch, before.floor_seq)
        if same != (row.run_key, row.identity, row.branch, row.floor_seq):
            return False
        if not 0 <= row.last_seq - self.seq <= _LONG_TAIL:
            return False
        tail = list(reading.tail(self.seq))
        kept = _kept(tail, step)
        for entry in tail:
            if kept[entry.seq]:
                self.applied(entry)
            else:
                self._take_id(entry, False)
                self.seq = entry.seq
        self.row = row
        return True

    def snapshot_made(self, seq: int) -> None:
        """Take note of a snapshot up to an entry, made or begun."""
        self._seen_snapshot = max(seq, self._seen_snapshot)
        self.snapshot_seq = max(seq, self.snapshot_seq)
        self.tail_bytes = 0

    def applied(self, entry: Entry, fact: Fact | None = None) -> Counted:
        """Take in an entry that is committed; returns what it changed.

        Args:
            entry: the next one of the run.
            fact: what it says, where that is known.
        """
        self.intact = False
        counted = Counted()
        if entry.kind != "rewind":
            fact = fact or wire.fact_of(entry, self.state)
            counted = self.state.fold(fact)
            if isinstance(fact, AllocationMade):
                self._positions += len(fact.prompt_ids)
        self._take_id(entry, True)
        self.seq = entry.seq
        self.tail_bytes += len(entry.payload) + len(entry.answer)
        self.intact = True
        return counted

    def forget_compacted(self) -> None:
        """Let go of the calls that the journal does not hold any more."""
        floor = self.row.floor_seq
        if floor <= self._floor:
            return
        self._floor = floor
        self._drop_compacted_allocations()
        self._calls = {
            call: known
            for call, known in self._calls.items()
            if known[0] > floor or call[0] in ALWAYS_KEPT
        }
        self._forgotten = {each: seq for each, seq in self._forgotten.items() if seq > floor}
        self._abandoned = {each: seq for each, seq in self._abandoned.items() if seq > floor}

    def _drop_compacted_allocations(self) -> None:
        held = {
            self._allocation_name(branch, key)
            for (kind, key), (seq, _, branch) in self._calls.items()
            if kind == "allocate" and seq > self.row.floor_seq
        }
        allocations = self.state.allocations
        for name in [name for name in allocations if name not in held]:
            del allocations[name]
        self._positions = sum(each.rows.size for each in allocations.values())

    def _allocation_name(self, branch: int, request_id: str) -> str:
        return wire.allocation_id(self.row.identity, branch, request_id)

    def _take_id(self, entry: Entry | Outline, kept: bool) -> None:
        if kept or entry.kind == "rewind":
            self._calls[entry.kind, entry.key] = (entry.seq, entry.digest, entry.branch)
        elif entry.kind == "allocate":
            self._abandoned[self._allocation_name(entry.branch, entry.key)] = entry.seq
        elif entry.kind == "report":
            self._forgotten[entry.key, entry.digest] = entry.seq

    def is_abandoned(self, allocation_id: str) -> bool:
        """Return whether a rewind forgot the allocation."""
        return allocation_id in self._abandoned

    def has_forgotten(self, report_id: str, digest: bytes) -> bool:
        """Return whether a report is one that a rewind forgot, arriving once more."""
        return (report_id, digest) in self._forgotten

    def holds(self, kind: str, key: str, digest: bytes) -> bool:
        """Return whether a call of this id was made before, with the same content."""
        known = self._calls.get((kind, key))
        return known is not None and known[1] == digest

    def recorded(self, kind: str, key: str, digest: bytes) -> int | None:
        """Return the number of the entry of a call made before, or None.

        Raises:
            AlreadyExists: the id was used with other content.
        """
        known = self._calls.get((kind, key))
        if known is None:
            return None
        seq, before, _ = known
        if before != digest:
            field = "report_id" if kind == "report" else "request_id"
            raise AlreadyExists(
                f"{field} = {key!r}: was used before in run {self.row.run_id!r} with other "
                "content; make a new id for a new call"
            )
        return seq

    def allocation(self, name: str) -> OpenAllocation:
        """Return an allocation that reports may still arrive for.

        Raises:
            NotFound: there is none of that name; says why.
        """
        allocation = self.state.allocations.get(name)
        if allocation is not None:
            return allocation
        reason = "does not exist"
        if self.is_abandoned(name):
            reason = "was forgotten by a rewind"
        elif self.row.floor_seq:
            reason = (
                f"does not exist or is of step {self.row.floor_step} or before, long since closed,"
            )
        raise NotFound(f"allocation_id = {name!r}: {reason} in run {self.row.run_id!r}")

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        return (
            _RUN_BYTES
            + _PROMPT_BYTES * len(self.state.prompt_ids)
            + _CALL_BYTES * self.recognised
            + _POSITION_BYTES * self._positions
        )

    @property
    def recognised(self) -> int:
        """Calls whose repetition is recognised."""
        return len(self._calls) + len(self._forgotten) + len(self._abandoned)


def _kept(outline: Sequence[Outline | Entry], rewound_to: int | None) -> dict[int, bool]:
    """Return, per entry number, whether no later rewind forgets it."""
    limit = 2**63 if rewound_to is None else rewound_to
    kept = {}
    for entry in reversed(outline):
        if entry.step == ALWAYS:
            # Where all begins anew, so does the count of ignored rollouts.
            kept[entry.seq] = entry.kind == "import" or limit >= 0
        else:
            kept[entry.seq] = entry.step <= limit
        if entry.kind == "rewind":
            limit = min(limit, entry.step)
    return kept

"""What the journal stores: runs, their entries, and marks of their snapshots."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run as stored.

    Attributes:
        run_key: where its rows are in this database.
        run_id: its name.
        config: serialised RunConfig.
        create_time: nanoseconds since 1970.
        last_seq: number of its newest entry; 0 if it has none.
        branch: rewinds so far.
        identity: tells it from every other run, one of the same name included; the same
            in every database that the run is imported into.
        update_time: of its newest entry, nanoseconds since 1970.
        snapshot_seq: of its newest snapshot; 0 if it has none.
        snapshot_size: bytes of that snapshot.
        floor_seq: entries up to this number have been compacted into snapshots. Only
            imports and rewinds are left of them, and no rewind that names a step forgets
            what they did.
        floor_step: oldest step that a rewind may still name, -1 apart, which begins anew.
        closed_step: reports of rollouts that the scheduler did not allocate are refused
            up to this step, because a repeated one could not be told any more.
    """

    run_key: int
    run_id: str
    config: bytes
    create_time: int
    last_seq: int = 0
    branch: int = 0
    identity: int = 0
    update_time: int = 0
    snapshot_seq: int = 0
    snapshot_size: int = 0
    floor_seq: int = 0
    floor_step: int = -1
    closed_step: int = -1

    @property
    def checksum(self) -> bytes:
        """8-byte BLAKE2b of name, config, creation and identity, which no call changes."""
        text = f"{self.create_time}/{self.identity}/{len(self.config)}/{self.run_id}"
        return hashlib.blake2b(text.encode() + self.config, digest_size=8).digest()

    def numbered(self, entry: Entry) -> Entry:
        """Return an entry as the run's next one, in its present branch."""
        return Entry(
            self.last_seq + 1,
            entry.kind,
            entry.key,
            self.branch,
            entry.step,
            entry.digest,
            entry.payload,
            entry.answer,
        )

    def after(self, entry: Entry, now: int) -> RunRow:
        """Return the run after its next entry, appended ``now``, in nanoseconds since 1970.

        A rewind begins the next branch, in which ids may be used again.
        """
        rewound = entry.kind == "rewind"
        return replace(
            self,
            last_seq=entry.seq,
            branch=self.branch + int(rewound),
            closed_step=min(self.closed_step, entry.step) if rewound else self.closed_step,
            update_time=max(now, self.update_time),
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One call as recorded.

    Attributes:
        seq: its number in the run; 0 before it is appended.
        kind: what was called: allocate, extend, report, import or rewind.
        key: the call's request or report id; where that must stay free, or there is none, one
            that begins with a control character.
        branch: rewinds of the run before it.
        step: the trainer's step it belongs to.
        digest: hash of the request, to tell a repetition from another call.
        payload: serialised request.
        answer: serialised answer.
    """

    seq: int
    kind: str
    key: str
    branch: int
    step: int
    digest: bytes
    payload: bytes
    answer: bytes

    @property
    def checksum(self) -> bytes:
        """8-byte BLAKE2b of all there is to it: databases do not notice a byte that changed."""
        head = f"{self.seq}/{self.branch}/{self.step}/{len(self.payload)}/{self.kind}/{self.key}"
        digest = hashlib.blake2b(head.encode(), digest_size=8)
        for data in (self.digest, self.payload, self.answer):
            digest.update(data)
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Outline:
    """An entry without its payload and answer; attributes as of ``Entry``."""

    seq: int
    kind: str
    key: str
    branch: int
    step: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class SnapshotMark:
    """A complete snapshot: the state of a run after an entry.

    Attributes:
        seq: number of the newest entry in it.
        step: highest step of the entries in it, settled ones included
            (``recordedsteps.py``); -1 if none has one.
        parts: stored pieces.
        size: their bytes.
        checksum: 16-byte BLAKE2b over run identity, seq, step and the parts in order.
    """

    seq: int
    step: int
    parts: int
    size: int
    checksum: bytes


ALWAYS_KEPT = ("import", "rewind")
"""Kinds of entries that compaction leaves: no rewind forgets what they did."""

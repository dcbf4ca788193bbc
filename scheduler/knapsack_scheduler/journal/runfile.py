"""One run as one file: everything the journal holds of it, for any other store.

A magic number, a version, then frames of a kind and a length: the run (R), its snapshots
(S, each followed by its parts, P), its entries (E), and in the end (Z) the BLAKE2b of all
before. A file that is cut short or changed is refused whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import IO, Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from knapsack_scheduler.errors import AlreadyExists, ConfigError
from knapsack_scheduler.journal.journal import Journal, insert_run
from knapsack_scheduler.journal.records import Entry, RunRow, SnapshotMark
from knapsack_scheduler.journal.schema import entries, snapshot_parts
from knapsack_scheduler.journal.snapshots import insert_mark
from knapsack_scheduler.journal.transaction import Reading, columns_of

_MAGIC = b"KNAPRUN\n"
_VERSION = 1
_FRAME = struct.Struct("<cQ")
_ENTRY = struct.Struct("<IQ")
_LONGEST = 2**31
"""Bytes of a frame; a longer one is no frame of ours."""


def write_run(reading: Reading, file: IO[bytes]) -> None:
    """Write the run as it is read to a file; StoreUnavailable if a part of it is damaged."""
    # Stored anew it would get a checksum that is right.
    reading.check_run()
    digest = hashlib.blake2b(digest_size=32)

    def put(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    def frame(kind: bytes, data: bytes) -> None:
        put(_FRAME.pack(kind, len(data)))
        put(data)

    put(_MAGIC + struct.pack("<H", _VERSION))
    frame(b"R", _json(asdict(reading.run)))
    for mark in reading.snapshots():
        frame(b"S", _json(asdict(mark)))
        for part in reading.snapshot_parts(mark):
            frame(b"P", part)
    for outline in reading.outline():
        if outline.seq <= reading.run.floor_seq:
            frame(b"E", _packed(reading.entry(outline.seq)))
    for entry in reading.tail(0):
        frame(b"E", _packed(entry))
    file.write(_FRAME.pack(b"Z", digest.digest_size) + digest.digest())


def read_run(journal: Journal, file: IO[bytes], run_id: str | None = None) -> RunRow:
    """Store the run of a file, whole or not at all; returns its row.

    Args:
        journal: to store it in.
        file: that ``write_run`` made.
        run_id: another name for it; None keeps its own.

    Raises:
        ConfigError: the file is no run, or damaged.
        AlreadyExists: there is a run of that name.
        StoreUnavailable: it could not be stored.
    """
    try:
        with journal.transaction() as connection:
            return _store(connection, _frames(file), run_id)
    except IntegrityError as error:
        raise ConfigError(f"the file is not a run: {error.orig}") from error
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise ConfigError(f"the file is not a run: {type(error).__name__}: {error}") from error


def _store(
    connection: sa.Connection, frames: Iterator[tuple[bytes, bytes]], run_id: str | None
) -> RunRow:
    kind, data = next(frames, (b"", b""))
    if kind != b"R":
        raise ConfigError("the file is not a run: it does not begin with one")
    run = RunRow(**_from_json(data))
    run = replace(run, run_id=run_id or run.run_id)
    try:
        with connection.begin_nested():
            run = insert_run(connection, run)
    except IntegrityError:
        raise AlreadyExists(f"run {run.run_id!r} exists; give another name with --run") from None
    mark: SnapshotMark | None = None
    part = 0
    for kind, data in frames:
        if kind == b"P" and mark is not None:
            values = {"run_key": run.run_key, "seq": mark.seq, "part": part, "data": data}
            connection.execute(sa.insert(snapshot_parts), values)
            part += 1
        elif kind == b"S":
            mark, part = SnapshotMark(**_from_json(data)), 0
            insert_mark(connection, run.run_key, mark)
        elif kind == b"E":
            entry = _unpacked(data)
            values = {"run_key": run.run_key, **columns_of(entry), "checksum": entry.checksum}
            connection.execute(sa.insert(entries), values)
        else:
            raise ConfigError(f"the file is not a run: a frame of kind {kind!r}")
    return run


def _frames(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and data of every frame; ConfigError at the end if the sum is wrong."""
    digest = hashlib.blake2b(digest_size=32)

    def take(size: int) -> bytes:
        data = file.read(size) if size <= _LONGEST else b""
        if len(data) != size:
            raise ConfigError("the file is not a whole run: it was cut short or changed")
        return data

    head = take(len(_MAGIC) + 2)
    if head[: len(_MAGIC)] != _MAGIC:
        raise ConfigError("the file is not a run that this program exported")
    (version,) = struct.unpack("<H", head[len(_MAGIC) :])
    if version != _VERSION:
        raise ConfigError(f"the file is of version {version}; this program reads {_VERSION}")
    digest.update(head)
    while True:
        header = take(_FRAME.size)
        kind, size = _FRAME.unpack(header)
        data = take(size)
        if kind == b"Z":
            if data != digest.digest() or file.read(1):
                raise ConfigError("the file is damaged: its checksum is wrong")
            return
        digest.update(header)
        digest.update(data)
        yield kind, data


def _packed(entry: Entry) -> bytes:
    values = asdict(entry)
    payload, answer = values.pop("payload"), values.pop("answer")
    head = _json(values)
    return b"".join((_ENTRY.pack(len(head), len(payload)), head, payload, answer))


def _unpacked(data: bytes) -> Entry:
    head, payload = _ENTRY.unpack_from(data)
    at = _ENTRY.size
    values = _from_json(data[at : at + head])
    at += head
    return Entry(**values, payload=data[at : at + payload], answer=data[at + payload :])


def _json(values: dict[str, Any]) -> bytes:
    coded = {
        name: {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in values.items()
    }
    return json.dumps(coded).encode()


def _from_json(data: bytes) -> dict[str, Any]:
    return {
        name: base64.b64decode(value["bytes"]) if isinstance(value, dict) else value
        for name, value in json.loads(data).items()
    }

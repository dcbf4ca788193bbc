"""Named NumPy columns as bytes, and back: the format of a snapshot.

A header names every column with its type and shape; the columns follow in its order as
one zlib stream, cut into parts. Integers are stored in the narrowest type that holds
them, little-endian. Nothing in it can run code, and every length is checked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[Any]]

PART_BYTES = 2**22
"""About how large a part is: one commit, in which nobody else can write to SQLite."""

TEXTS_AT_ONCE = 16_384
"""Texts handled by one call of Python's own code, during which no other thread runs: with
millions of them the event loop would stand still for seconds."""

_MAGIC = b"KNAPCOLS"
_VERSION = 1
_HEAD = struct.Struct("<8sHI")
_SLICE = 2**20
_KINDS = ("i", "u", "f", "b")


class ColumnsDamaged(Exception):
    """The bytes are not what ``encode`` made."""


@dataclass(frozen=True, slots=True)
class _Layout:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    stored: np.dtype[Any]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.stored.itemsize


def encode(columns: Columns) -> Iterator[bytes]:
    """Yield the parts of the columns; they must not change meanwhile."""
    layouts = [
        _Layout(name, _little(column.dtype), column.shape, _narrowest(column))
        for name, column in columns.items()
    ]
    described = json.dumps(
        [[each.name, each.dtype.str, each.shape, each.stored.str] for each in layouts]
    ).encode()
    yield _HEAD.pack(_MAGIC, _VERSION, len(described)) + described
    squeeze = zlib.compressobj(1)
    part = bytearray()
    for layout, column in zip(layouts, columns.values(), strict=True):
        flat = np.ascontiguousarray(column).reshape(-1)
        for start in range(0, flat.size, _SLICE):
            part += squeeze.compress(flat[start : start + _SLICE].astype(layout.stored).tobytes())
            if len(part) >= PART_BYTES:
                yield bytes(part)
                part.clear()
    part += squeeze.flush()
    yield bytes(part)


def decode(parts: Iterable[bytes]) -> dict[str, npt.NDArray[Any]]:
    """Return the columns; ColumnsDamaged if these are not the parts of any."""
    try:
        return _decode(iter(parts))
    except (zlib.error, struct.error, ValueError, TypeError, KeyError) as error:
        raise ColumnsDamaged(f"{type(error).__name__}: {error}") from error


def _decode(parts: Iterator[bytes]) -> dict[str, npt.NDArray[Any]]:
    head = next(parts, b"")
    magic, version, length = _HEAD.unpack_from(head)
    if magic != _MAGIC or version != _VERSION or len(head) != _HEAD.size + length:
        raise ColumnsDamaged(f"not columns of version {_VERSION}")
    layouts = [
        _Layout(name, np.dtype(dtype), tuple(shape), np.dtype(stored))
        for name, dtype, shape, stored in json.loads(head[_HEAD.size :])
    ]
    if any(each.dtype.kind not in _KINDS or each.stored.kind not in _KINDS for each in layouts):
        raise ColumnsDamaged("a column is of a kind that is never stored")
    swell = zlib.decompressobj()
    data = bytearray()
    columns: dict[str, npt.NDArray[Any]] = {}
    waiting = iter(layouts)
    layout = next(waiting, None)
    for part in parts:
        data += swell.decompress(part)
        while layout is not None and len(data) >= layout.size:
            flat = np.frombuffer(bytes(data[: layout.size]), layout.stored)
            columns[layout.name] = flat.astype(layout.dtype).reshape(layout.shape)
            del data[: layout.size]
            layout = next(waiting, None)
    if layout is not None or data or not swell.eof or swell.unused_data:
        raise ColumnsDamaged("the columns end before or after their header says")
    return columns


def encode_text(texts: list[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return texts as two columns: their UTF-8 bytes, and their lengths in characters."""
    slices = [texts[start : start + TEXTS_AT_ONCE] for start in _starts(len(texts))]
    data = np.frombuffer(b"".join(["".join(each).encode() for each in slices]), np.uint8)
    lengths = [np.fromiter(map(len, each), np.int64, len(each)) for each in slices]
    return data, np.concatenate([np.zeros(0, np.int64), *lengths])


def decode_text(data: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]) -> list[str]:
    """Return the texts of ``encode_text``."""
    whole = data.tobytes().decode()
    ends = np.cumsum(lengths)
    texts, start = [], 0
    for first in _starts(ends.size):
        for end in ends[first : first + TEXTS_AT_ONCE].tolist():
            texts.append(whole[start:end])
            start = end
    return texts


def _starts(size: int) -> range:
    return range(0, size, TEXTS_AT_ONCE)


def _narrowest(column: npt.NDArray[Any]) -> np.dtype[Any]:
    dtype = _little(column.dtype)
    if dtype.kind != "i" or column.size == 0:
        return dtype
    low, high = int(column.min()), int(column.max())
    for name in ("<i1", "<i2", "<i4"):
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max and np.dtype(name).itemsize < dtype.itemsize:
            return np.dtype(name)
    return dtype


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


def text_column(text: str) -> npt.NDArray[np.uint8]:
    """Return a text as one column of its UTF-8 bytes."""
    return np.frombuffer(text.encode(), np.uint8)

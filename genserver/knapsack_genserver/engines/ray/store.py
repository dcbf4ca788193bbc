"""Weights through Ray's object store, for nodes that share no disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knapsack_genserver.errors import FailedPrecondition

_PIECE = 256 * 2**20
_SMALL = (".json", ".txt", ".model", ".jinja")

Files = list[tuple[str, list[Any]]]
"""Names of files, each with references to the pieces of its content."""


@dataclass(eq=False, slots=True)
class _Held:
    """A version's files, once they have been read."""

    path: Path
    version: int
    files: Files | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)


class WeightStore:
    """Holds the weights that serve and those of an update, each file in pieces.

    Those that serve stay until others do, so that a replica that joins later gets what the
    others have, whatever has become of the folder.

    Args:
        put: takes a piece and returns a reference to it.
    """

    def __init__(self, put: Callable[[bytes], Any]) -> None:
        self._put = put
        self._served: _Held | None = None
        self._candidate: _Held | None = None
        self._updating = asyncio.Lock()

    @asynccontextmanager
    async def update(self, path: Path, version: int) -> AsyncIterator[None]:
        """Offer a folder's weights, read anew; they serve if the block ends without error."""
        async with self._updating:
            self._candidate = _Held(path, version)
            try:
                yield
                self._served = self._candidate
            finally:
                self._candidate = None

    async def files(self, path: Path, version: int) -> Files:
        """Return the names of a folder's files with references to their pieces.

        Raises:
            FailedPrecondition: the folder cannot be read.
        """
        for held in (self._candidate, self._served):
            if held is not None and (held.path, held.version) == (path, version):
                async with held.reading:
                    if held.files is None:
                        held.files = await self._read(path)
                    return held.files
        # Others have come to serve since it was asked for.
        return await self._read(path)

    async def _read(self, path: Path) -> Files:
        try:
            return await asyncio.to_thread(self._put_all, path)
        except OSError as error:
            raise FailedPrecondition(
                f"path = {str(path)!r}: cannot be read: {error.strerror}"
            ) from error

    def _put_all(self, path: Path) -> Files:
        found: Files = []
        for file in sorted(path.iterdir()):
            if file.suffix not in (".safetensors", *_SMALL) or not file.is_file():
                continue
            pieces = []
            with file.open("rb") as content:
                while data := content.read(_PIECE):
                    pieces.append(self._put(data))
            found.append((file.name, pieces))
        return found

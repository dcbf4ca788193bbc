"""Weights through Ray's object store, for nodes that share no disk."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray

from knapsack_genserver.errors import FailedPrecondition

_PIECE = 256 * 2**20
_SMALL = (".json", ".txt", ".model", ".jinja")


class WeightStore:
    """Holds the weights of the last version asked for, each file in pieces.

    They stay until another version is asked for, so that a replica that joins later gets
    what the others have, whatever has become of the folder.
    """

    def __init__(self) -> None:
        self._key: tuple[Path, int] | None = None
        self._files: list[tuple[str, list[Any]]] = []
        self._reading = asyncio.Lock()

    async def files(self, path: Path, version: int) -> list[tuple[str, list[Any]]]:
        """Return the names of a folder's files with references to their pieces.

        Raises:
            FailedPrecondition: the folder cannot be read.
        """
        async with self._reading:
            if self._key != (path, version):
                self._key = None
                try:
                    self._files = await asyncio.to_thread(_put, path)
                except OSError as error:
                    raise FailedPrecondition(
                        f"path = {str(path)!r}: cannot be read: {error.strerror}"
                    ) from error
                self._key = (path, version)
            return self._files


def _put(path: Path) -> list[tuple[str, list[Any]]]:
    found: list[tuple[str, list[Any]]] = []
    for file in sorted(path.iterdir()):
        if file.suffix not in (".safetensors", *_SMALL) or not file.is_file():
            continue
        pieces = []
        with file.open("rb") as content:
            while data := content.read(_PIECE):
                pieces.append(ray.put(data))
        found.append((file.name, pieces))
    return found

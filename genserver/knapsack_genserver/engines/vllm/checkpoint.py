"""A folder of safetensors that is checked before anything is made of it, and held open.

Files are held by descriptor, so that weights can be read again after the trainer has
deleted or replaced the folder. What cannot be held is a file that is overwritten in
place; that is noticed by its size and time of change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

_SAMPLE = 65_536
"""Elements of a tensor that enter the fingerprint one by one, besides the sum of all."""


class CheckpointError(Exception):
    """A folder that cannot be served, or no longer read; says what of it and why."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    descriptor: int
    size: int
    changed: int

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"


class Checkpoint:
    """The tensors of a folder's safetensors files, open until closed.

    Attributes:
        folder: where they are.
        shapes: of every tensor, by name.

    Args:
        folder: follows ``model.safetensors.index.json`` where there is one.

    Raises:
        CheckpointError: no such folder, no weights in it, or a file that is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: list[_File] = []
        self._where: dict[str, _File] = {}
        self._closing = ExitStack()
        try:
            for path in _files_of(folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._closing.callback(os.close, descriptor)
            stat = os.fstat(descriptor)
            file = _File(path.name, descriptor, stat.st_size, stat.st_mtime_ns)
            self._files.append(file)
            with safe_open(file.path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._where[name] = file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def close(self) -> None:
        """Let go of the files."""
        self._closing.close()
        self._files.clear()
        self._where.clear()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every (name, tensor), file by file.

        Raises:
            CheckpointError: a file has changed since it was opened, or cannot be read.
        """
        for file in self._files:
            stat = os.fstat(file.descriptor)
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.changed):
                raise CheckpointError(
                    f"{self.folder / file.name}: has been written to since it was opened"
                )
            try:
                with safe_open(file.path, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        if self._where[name] is file:
                            yield name, tensors.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{self.folder / file.name}: cannot be read: {error}"
                ) from error

    def require(self, shapes: Mapping[str, tuple[int, ...]], tied: frozenset[str]) -> None:
        """Refuse a folder of another model.

        Args:
            shapes: of the model's tensors, by name.
            tied: names that may be there or not, since another tensor stands for them.

        Raises:
            CheckpointError: names the first tensor that is missing, unknown, or of
                another shape.
        """
        for name in sorted(set(self.shapes) - set(shapes) - tied):
            raise CheckpointError(f"{name}: the model has no tensor of that name")
        for name in sorted(set(shapes) - set(self.shapes) - tied):
            raise CheckpointError(f"{name}: is missing in {str(self.folder)!r}")
        for name, shape in shapes.items():
            given = self.shapes.get(name, shape)
            if given != shape:
                raise CheckpointError(f"{name}: has shape {given}, the model's is {shape}")

    def require_finite(self, part: int = 0, parts: int = 1) -> None:
        """Refuse numbers that are not finite, in every ``parts``-th tensor from ``part``.

        Raises:
            CheckpointError: names the tensor.
        """
        for at, (name, tensor) in enumerate(self.tensors()):
            if at % parts != part or not tensor.is_floating_point():
                continue
            # The least and the greatest need no mask of the tensor's size.
            if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor.float()))):
                raise CheckpointError(f"{name}: holds numbers that are not finite")

    def fingerprint(self) -> str:
        """Return a hash, 32 hexadecimal digits, equal for equal tensors of equal names.

        Of a large tensor it takes the sum of all bits and an even sample of elements.
        """
        digest = hashlib.blake2b(digest_size=16)
        # By name, so that the same tensors in other files have the same fingerprint.
        parts = {name: _digest_of(tensor) for name, tensor in self.tensors()}
        for name in sorted(parts):
            digest.update(f"{name} {self.shapes[name]} ".encode() + parts[name])
        return digest.hexdigest()


def _digest_of(tensor: torch.Tensor) -> bytes:
    digest = hashlib.blake2b(str(tensor.dtype).encode(), digest_size=16)
    if tensor.numel():
        data = tensor.contiguous().view(-1)
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            data.element_size()
        ]
        bits = data.view(width)
        digest.update(str(int(bits.sum(dtype=torch.int64))).encode())
        step = max(1, bits.numel() // _SAMPLE)
        digest.update(bits[::step].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"path = {str(folder)!r}: is not a folder on the server's disk")
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        else:
            files = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: cannot be read: {error}") from error
    if not files:
        raise CheckpointError(f"path = {str(folder)!r}: holds no *.safetensors")
    return files

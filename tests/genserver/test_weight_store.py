"""Weights for replicas that share no disk: what serves is kept, what failed is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from knapsack_genserver.engines.ray.store import Files, WeightStore
from knapsack_genserver.errors import FailedPrecondition

FILE = "model.safetensors"


def folder(parent: Path, name: str, content: bytes) -> Path:
    """Write a folder of weights."""
    made = parent / name
    made.mkdir(exist_ok=True)
    (made / FILE).write_bytes(content)
    return made


def held(content: bytes) -> Files:
    """Return what the store has of such a folder, with pieces for their references."""
    return [(FILE, [content])]


async def test_an_update_that_failed_is_read_anew(tmp_path: Path) -> None:
    """Also under the same path and version; and what serves outlives both and its folder."""
    store = WeightStore(bytes)
    old = folder(tmp_path, "7", b"seven")
    async with store.update(old, 7):
        assert await store.files(old, 7) == held(b"seven")
    (old / FILE).unlink()
    new = folder(tmp_path, "8", b"trunc")

    async def refused() -> None:
        async with store.update(new, 8):
            assert await store.files(new, 8) == held(b"trunc")
            assert await store.files(old, 7) == held(b"seven")
            raise FailedPrecondition("nobody took it")

    with pytest.raises(FailedPrecondition, match="nobody took it"):
        await refused()
    assert await store.files(old, 7) == held(b"seven")
    folder(tmp_path, "8", b"eight, whole")
    async with store.update(new, 8):
        assert await store.files(new, 8) == held(b"eight, whole")
    folder(tmp_path, "8", b"something else")
    assert await store.files(new, 8) == held(b"eight, whole")


async def test_an_update_to_what_serves_is_read_anew(tmp_path: Path) -> None:
    """The folder may hold something else under the version that it had."""
    store = WeightStore(bytes)
    path = folder(tmp_path, "7", b"seven")
    async with store.update(path, 7):
        await store.files(path, 7)
    folder(tmp_path, "7", b"another seven")
    async with store.update(path, 7):
        assert await store.files(path, 7) == held(b"another seven")
    assert await store.files(path, 7) == held(b"another seven")


async def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """As a refusal of the update."""
    store = WeightStore(bytes)
    with pytest.raises(FailedPrecondition, match=r"path = .*none.*cannot be read"):
        async with store.update(tmp_path / "none", 1):
            await store.files(tmp_path / "none", 1)

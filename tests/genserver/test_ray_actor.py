"""The part of a Ray replica that knows nothing of Ray: when it is at its end, what it leaves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from knapsack_genserver.engine import LoadedWeights
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.engines.ray.actor import Refusal, Replica
from knapsack_genserver.engines.ray.copies import Copy, remove_abandoned
from knapsack_genserver.errors import FailedPrecondition

from small_engines import group


class Torn(FakeEngine):
    """An engine whose next update fails and takes the old weights with it."""

    broken = ""

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Fail."""
        self.broken = "no weights serve"
        raise FailedPrecondition("refused")


async def test_an_engine_that_holds_no_weights_is_at_its_end() -> None:
    """The update and every check after it say so, so that the pool starts another."""
    replica = Replica([])
    replica._engine = Torn()
    await replica._engine.start()
    assert not isinstance(await replica.check(), Refusal)
    ended = Refusal("EngineDied", "EngineDied: no weights serve")
    assert await replica.load_weights("/", 1) == ended
    assert await replica.check() == ended
    assert await replica.load_files([], 1) == ended


async def test_the_stream_of_a_group_ends() -> None:
    """Also if its last rollouts come together with its end, as they do here."""
    replica = Replica([])
    replica._engine = FakeEngine()
    async with asyncio.timeout(20):
        batches = [batch async for batch in replica.generate(1, group(num_rollouts=4))]
    assert [c.index for batch in batches if isinstance(batch, list) for c in batch] == [0, 1, 2, 3]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(folder: Path) -> set[str]:
    """Return what there is in a folder."""
    return {path.name for path in folder.iterdir()}


_KILLED = """
import os, signal
from knapsack_genserver.engines.ray.copies import Copy
(Copy().folder / "model.safetensors").write_bytes(b"weights")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_weights_of_a_killed_replica_are_removed(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a living one are not, nor is anything else."""
    monkeypatch.setenv("TMPDIR", str(temporary))
    subprocess.run([sys.executable, "-c", _KILLED], check=False)
    (left,) = temporary.iterdir()
    used = Copy()
    (temporary / "knapsack-weights-file").write_text("")
    (temporary / "other").mkdir()
    remove_abandoned()
    assert not left.exists()
    assert names(temporary) == {used.folder.name, "knapsack-weights-file", "other"}
    used.remove()
    assert not used.folder.exists()


async def test_a_replica_that_starts_clears_what_others_left(temporary: Path) -> None:
    """Also when it cannot start then."""
    left = temporary / "knapsack-weights-left"
    left.mkdir()
    await Replica(["serve", "--engine", "transformers", "--model", str(temporary)]).start()
    assert not left.exists()


async def test_weights_that_came_in_pieces_are_kept_while_they_serve(temporary: Path) -> None:
    """One folder at a time; none after the replica has closed."""
    replica = Replica([])
    replica._engine = FakeEngine()
    await replica._engine.start()
    for version in (1, 2):
        loaded = await replica.load_files([("model.safetensors", [])], version)
        assert isinstance(loaded, LoadedWeights)
        (name,) = names(temporary)
        assert name.startswith("knapsack-weights-")
        remove_abandoned()
        assert names(temporary) == {name}
    await replica.close()
    assert not names(temporary)

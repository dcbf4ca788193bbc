"""Small models on disk, engines, and a generation server as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knapsack_genserver.engine import Engine
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool

from small_engines import small_model


@pytest.fixture(scope="session")
def model() -> Any:
    """The model that the engines and servers hold."""
    return small_model()


@pytest.fixture(scope="session")
def model_folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["fake", "transformers", "pool of fake", "pool of transformers"])
async def engine(request: pytest.FixtureRequest, model_folder: Path) -> AsyncIterator[Engine]:
    """A started engine of every kind there is."""

    def make() -> Engine:
        if kind == "fake":
            return FakeEngine()
        return TransformersEngine(TransformersOptions(model_folder, max_batch_rollouts=16))

    *pool, kind = request.param.split(" of ")
    made = make()
    if pool:
        made = ReplicaPool(kind, [make(), make()], PoolOptions(8, 24))
    await made.start()
    yield made
    await made.close()


class Generator:
    """A real ``knapsack-genserver serve`` on free ports."""

    def __init__(self, log: Path, *flags: str) -> None:
        self._log = log
        with log.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "knapsack_genserver.cli", "serve"]
                + [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
                + list(flags),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.addresses: dict[str, str] = json.loads(line)

    def log(self) -> str:
        """Return what it has written to stderr so far."""
        return self._log.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def start_generator(tmp_path: Path) -> Iterator[Callable[..., Generator]]:
    """A function that starts servers with some flags."""
    started: list[Generator] = []

    def start(*flags: str) -> Generator:
        started.append(Generator(tmp_path / "genserver.log", *flags))
        return started[-1]

    yield start
    for generator in started:
        generator.end(signal.SIGKILL)

"""A real scheduler process, and outboxes apart for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_scheduler import SchedulerProcess

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[SchedulerProcess]:
    """A real scheduler that serves."""
    process = SchedulerProcess(tmp_path / "stats.db")
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def shared_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerProcess]:
    """A real scheduler for all tests of a module, each with runs of its own."""
    process = SchedulerProcess(tmp_path_factory.mktemp("shared") / "stats.db")
    process.start()
    yield process
    process.stop()


@pytest.fixture(autouse=True)
def outbox_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep default outboxes apart for every test."""
    monkeypatch.setenv("KNAPSACK_RL_OUTBOX", str(tmp_path / "outboxes"))

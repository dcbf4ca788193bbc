from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy_tools import DEPLOY
from podman import SCHEDULER, Podman, own_podman


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was measured."""
    for report in terminalreporter.getreports("passed"):
        for what, found in report.user_properties:
            terminalreporter.write_line(f"{what}: {found}")


IMAGES = DEPLOY / "images"


@dataclass(frozen=True)
class Built:
    """An image, built twice from nothing."""

    podman: Podman
    wheels: Path
    contents: tuple[str, str]


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """A podman with the base image and nothing else."""
    with own_podman() as podman:
        podman.import_base()
        yield podman


@pytest.fixture(scope="session")
def built(podman: Podman) -> Built:
    """The scheduler's image, of our Dockerfile as it is."""
    wheels = podman.wheelhouse(
        IMAGES / "build-requirements.txt", IMAGES / "scheduler/requirements.txt"
    )
    dockerfile = IMAGES / "scheduler/Dockerfile"
    first = podman.build(dockerfile, f"{SCHEDULER}-again", wheels)
    return Built(podman, wheels, (first, podman.build(dockerfile, SCHEDULER, wheels)))

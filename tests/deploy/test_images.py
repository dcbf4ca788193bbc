"""The Dockerfiles and what they pin, without building them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy_tools import DEPLOY, ROOT, run

IMAGES = DEPLOY / "images"
DOCKERFILES = sorted(IMAGES.glob("*/Dockerfile"))
LOCKS = sorted(IMAGES.rglob("*requirements.txt"))


def pins_of(text: str) -> dict[str, str]:
    """Return versions by normalised name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def hadolint(file: Path) -> str:
    """Return what hadolint has to say."""
    done = run("hadolint", "--no-color", file)
    return done.stdout + done.stderr


def test_there_is_one_per_component() -> None:
    """The scheduler and the generation server have images, and pins beside them."""
    assert {file.parent.name for file in DOCKERFILES} == {"scheduler", "genserver"}
    assert LOCKS


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    """The best practices that hadolint knows are kept."""
    assert hadolint(file) == ""


def test_hadolint_finds_a_mistake(tmp_path: Path) -> None:
    """A base without a tag and an entrypoint in shell form are found."""
    text = (IMAGES / "scheduler/Dockerfile").read_text()
    bad = tmp_path / "Dockerfile"
    bad.write_text(
        text.replace("FROM ${PYTHON_IMAGE} AS build", "FROM docker.io/library/python AS build")
        + "ENTRYPOINT knapsack-scheduler\n"
    )
    said = hadolint(bad)
    assert "DL3006" in said
    assert "DL3025" in said


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_images_are_without_root_and_take_signals(file: Path) -> None:
    """The user is a number, so that Kubernetes can check it, and no shell eats SIGTERM."""
    final = re.split(r"(?m)^FROM ", file.read_text())[-1]
    assert re.search(r"(?m)^USER 10001:10001$", final)
    kept_until_handled = r'"/usr/bin/env", "--block-signal=TERM"'
    program = r'"/opt/knapsack-rl/bin/knapsack-\w+"'
    assert re.search(rf"(?m)^ENTRYPOINT \[{kept_until_handled}, {program}\]$", final)
    assert "HEALTHCHECK" in final


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_bases_are_pinned(file: Path) -> None:
    """Every base has a version or a digest."""
    for image in re.findall(r"(?m)^ARG \w+_IMAGE=(\S+)$", file.read_text()):
        assert re.search(r"(:v?\d[\w.-]+|@sha256:[0-9a-f]{64})$", image), image


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: str(file.relative_to(IMAGES)))
def test_pins_are_those_of_the_tests(file: Path) -> None:
    """What goes into an image is what the tests run with, each package with its hashes."""
    text = file.read_text()
    pins = pins_of(text)
    tested = pins_of((ROOT / ".ci/constraints.txt").read_text())
    assert {name: tested.get(name, version) for name, version in pins.items()} == pins
    assert len(re.findall(r"(?m)^\S+==.*\\\n    --hash=sha256:", text)) == len(pins)


def test_the_schedulers_image_holds_no_torch() -> None:
    """It is slim: nothing of models in it."""
    pins = pins_of((IMAGES / "scheduler/requirements.txt").read_text())
    assert not {"torch", "transformers", "vllm", "ray", "matplotlib"} & pins.keys()
    assert {"grpcio", "numpy", "sqlalchemy", "psycopg"} <= pins.keys()


def test_only_what_is_built_from_is_sent() -> None:
    """The context is a list of what goes in, so that nothing slips in that was forgotten."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert "*" in lines
    for line in lines:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line

"""The scheduler's image, built from the Dockerfile without a registry."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from deploy_tools import DEPLOY, VERSION
from podman import BASE, SCHEDULER, until

# Two builds of an image, on a busy machine; the first test of all also makes the base.
pytestmark = pytest.mark.timeout(1800)

CONFINED = ("--rm", "--network=none", "--read-only", "--cap-drop=ALL", "--memory=256m")


def test_the_same_inputs_make_the_same_image(built) -> None:
    """Two builds without a cache have the same layers, which are hashes of every file in them."""
    first, second = built.contents
    assert "sha256:" in first
    assert first == second


def test_it_is_slim(built, record_property) -> None:
    """What it adds to its base is below 200 MB; the README of the deployment says how much."""
    sizes = [
        int(built.podman("image", "inspect", "--format", "{{.Size}}", image))
        for image in (SCHEDULER, BASE)
    ]
    added = (sizes[0] - sizes[1]) / 1e6
    record_property(
        "measured", f"the image adds {added:.0f} MB to its base of {sizes[1] / 1e6:.0f} MB"
    )
    assert added < 200


def test_it_says_what_it_is(built) -> None:
    """User, entrypoint in exec form and health check are in the image."""
    image = json.loads(built.podman("image", "inspect", SCHEDULER))[0]
    config = image["Config"]
    assert config["User"] == "10001:10001"
    program = "/opt/knapsack-rl/bin/knapsack-scheduler"
    assert config["Entrypoint"] == ["/usr/bin/env", "--block-signal=TERM", program]
    assert image["Healthcheck"]["Test"][0] == "CMD"


def test_it_runs_without_rights_and_without_writing(built) -> None:
    """Its version is the project's, and its settings are right as they stand."""
    said = built.podman("run", *CONFINED, SCHEDULER, "--version")
    assert said.strip() == VERSION
    settings = json.loads(built.podman("run", *CONFINED, SCHEDULER, "check"))
    assert settings["store"] == "sqlite:////var/lib/knapsack-rl/stats.db"


@pytest.mark.parametrize("library", ["python3", "pydantic_core", "cygrpc"])
def test_sigterm_amid_its_start_ends_it(built, library: str) -> None:
    """The first process of a container, which no signal ends by itself, ends while it is loaded."""
    podman = built.podman
    podman("run", "--detach", "--name=hasty", *CONFINED[1:], "--tmpfs=/tmp",
           SCHEDULER, "serve", "--store=sqlite:////tmp/stats.db")  # fmt: skip
    try:
        pid = podman.inspect("hasty")["State"]["Pid"]
        loaded = Path(f"/proc/{pid}/maps")
        until(f"{library} is loaded", lambda: library in loaded.read_text())
        os.kill(pid, signal.SIGTERM)
        # Where the signal is lost, it serves, and this times out.
        assert int(podman("wait", "hasty", timeout=60)) in (0, 128 + signal.SIGTERM)
    finally:
        podman("rm", "--force", "--time=0", "hasty")


def test_it_carries_no_more_than_it_needs(built) -> None:
    """No torch and no pip; the wheel is there, for images of trainers to install."""
    python = "/opt/knapsack-rl/bin/python"
    script = (
        "import importlib.util, json, pathlib, sys;"
        "print(json.dumps([[m for m in ('torch', 'transformers', 'pip', 'psycopg', 'grpc')"
        " if importlib.util.find_spec(m)],"
        " [p.name for p in pathlib.Path('/opt/knapsack-rl/dist').iterdir()]]))"
    )
    said = built.podman("run", *CONFINED, "--entrypoint", python, SCHEDULER, "-c", script)
    modules, wheels = json.loads(said)
    assert modules == ["psycopg", "grpc"]
    assert wheels == [f"knapsack_rl-{VERSION}-py3-none-any.whl"]


def test_a_trainers_image_takes_the_client_from_it(built, tmp_path: Path) -> None:
    """As the README says: the wheel is copied out of the scheduler's image and installed."""
    readme = (DEPLOY / "README.md").read_text()
    [recipe] = re.findall(r"```dockerfile\n(.*?)```", readme, re.DOTALL)
    recipe = recipe.replace("REGISTRY/", "")
    assert f"COPY --from={SCHEDULER}" in recipe
    file = tmp_path / "Dockerfile"
    # The base here has no pip outside of an environment.
    file.write_text(
        f"FROM {BASE}\nRUN python3 -m venv /venv\nENV PATH=/venv/bin:$PATH\n"
        "ARG PIP_NO_INDEX\nARG PIP_FIND_LINKS\n" + recipe.partition("\n")[2]
    )
    tag = "localhost/trainer:test"
    built.podman.build(file, tag, built.wheels)
    script = "from knapsack_trainer_client import BudgetClient; print(BudgetClient.__name__)"
    said = built.podman("run", *CONFINED, "--entrypoint", "/venv/bin/python", tag, "-c", script)
    assert said.strip() == "BudgetClient"

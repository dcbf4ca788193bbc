"""Flags and settings that manifests give exist in the programs."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

import pytest
import yaml

from knapsack_scheduler.config import ENVIRONMENT, Settings

from deploy_tools import (
    DEPLOY,
    SCENARIOS,
    containers_of,
    kustomized,
    pod_of,
    ray_pods_of,
)
from manifest_rules import flags_of

PROGRAMS = {
    "scheduler": ["-m", "knapsack_scheduler.cli", "serve", "--help"],
    "genserver": ["-m", "knapsack_genserver.cli", "serve", "--help"],
    "trainer": [str(DEPLOY / "images/scheduler/play_trainer.py"), "--help"],
}


@cache
def known_flags(program: str) -> frozenset[str]:
    """Return the flags that a program's help names."""
    done = subprocess.run(
        [sys.executable, *PROGRAMS[program]], capture_output=True, text=True, timeout=60, check=True
    )
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_flags_exist(scenario: str) -> None:
    """No container is started with a flag that its program would refuse."""
    things = kustomized(scenario)
    pods = [pod for thing in things if (pod := pod_of(thing))]
    pods += [pod for thing in things for pod in ray_pods_of(thing)]
    for pod in pods:
        for container in containers_of(pod):
            flags = flags_of(container).keys()
            if not flags:
                continue
            unknown = flags - known_flags(container["name"])
            assert not unknown, f"{container['name']}: {unknown}"
            for variable in container.get("env", []):
                name = variable["name"]
                if name.startswith(ENVIRONMENT):
                    assert name.removeprefix(ENVIRONMENT).lower() in Settings.model_fields


def test_flags_of_compose_exist() -> None:
    """Nor in deploy/compose.yaml."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for program in ("scheduler", "genserver"):
        given = {c.partition("=")[0] for c in services[program]["command"] if c.startswith("--")}
        assert given <= known_flags(program)


def test_flags_of_the_readme_exist() -> None:
    """Nor in the README of the deployment."""
    text = "".join((DEPLOY / name).read_text() for name in ("README.md", "REFERENCE.md"))
    given = {
        flag
        for words in re.findall(r"knapsack-scheduler (?:serve|backup|check|migrate)([^`\n]*)", text)
        for flag in re.findall(r"--[a-z-]+", words)
    }
    assert given <= known_flags("scheduler") | {"--to"}

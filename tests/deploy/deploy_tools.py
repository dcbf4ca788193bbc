"""Where things of the deployment are, and the programs that read them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = DEPLOY / "kubernetes/overlays"
CHART = DEPLOY / "helm/knapsack-rl"
RELEASE = "knapsack"
SCENARIOS = ("sidecar", "sidecar-pvc", "service", "genserver", "genserver-ray", "monitored")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

Object = dict[str, Any]


def tool(name: str) -> str:
    """Return the path of a program; without it, fail in CI and skip elsewhere."""
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if found is None:
        message = f"{name} is not installed; see the Makefile and .ci/packages"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever comes of it."""
    return subprocess.run(
        [tool(name), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def objects_of(text: str) -> list[Object]:
    """Return the objects of a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


@cache
def _kustomized(folder: Path) -> str:
    done = run("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomized(scenario: str) -> list[Object]:
    """Return what an overlay comes to."""
    return kustomized_folder(OVERLAYS / scenario)


def kustomized_folder(folder: Path) -> list[Object]:
    """Return what a folder with a kustomization comes to."""
    return objects_of(_kustomized(folder))


@cache
def _templated(scenario: str, *arguments: str) -> str:
    done = helm_template(scenario, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def helm_template(
    scenario: str, *arguments: str, chart: Path = CHART
) -> subprocess.CompletedProcess[str]:
    """Run ``helm template`` with the values of a scenario."""
    values = CHART / "ci" / f"{scenario}-values.yaml"
    return run("helm", "template", RELEASE, chart, "--values", values, *arguments)


def templated(scenario: str, *arguments: str) -> list[Object]:
    """Return what the chart comes to with the values of a scenario."""
    return objects_of(_templated(scenario, *arguments))


def name_of(thing: Object) -> str:
    """Return kind and name, for messages."""
    return f"{thing['kind']}/{thing['metadata']['name']}"


def pod_of(thing: Object) -> Object | None:
    """Return the pod template of a Job or Deployment, or a pod itself; None of others."""
    if thing["kind"] == "Pod":
        return thing
    if thing["kind"] in ("Job", "Deployment"):
        template: Object = thing["spec"]["template"]
        return template
    return None


def ray_pods_of(thing: Object) -> list[Object]:
    """Return the pod templates of a RayCluster, with the labels that KubeRay gives its pods."""
    if thing["kind"] != "RayCluster":
        return []
    name, spec = thing["metadata"]["name"], thing["spec"]
    groups = [("head", spec["headGroupSpec"]), *(("worker", g) for g in spec["workerGroupSpecs"])]
    pods = []
    for kind, group in groups:
        metadata = group["template"].get("metadata", {})
        given = {"ray.io/cluster": name, "ray.io/node-type": kind}
        labels = {**metadata.get("labels", {}), **given}
        pods.append({"metadata": {**metadata, "labels": labels}, "spec": group["template"]["spec"]})
    return pods


def containers_of(pod: Object) -> list[Object]:
    """Return all containers of a pod, sidecars among them."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]

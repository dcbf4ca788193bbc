"""What the README of the deployment shows works as it stands there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from deploy_tools import (
    CHART,
    DEPLOY,
    RELEASE,
    ROOT,
    VERSION,
    containers_of,
    kustomized_folder,
    objects_of,
    pod_of,
    run,
)

README = (DEPLOY / "README.md").read_text()
SIDECAR = f"REGISTRY/knapsack-rl/scheduler:{VERSION}"


def blocks(language: str) -> list[str]:
    """Return the README's blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_values_of_helm_give_the_users_trainer_a_sidecar(tmp_path: Path) -> None:
    """The chart takes them, and both containers have the images that they name."""
    values = tmp_path / "mine.yaml"
    values.write_text(blocks("yaml")[0].replace("REGISTRY", "registry.example:5000"))
    done = run("helm", "template", RELEASE, CHART, "--values", values)
    assert done.returncode == 0, done.stderr
    [job] = [thing for thing in objects_of(done.stdout) if thing["kind"] == "Job"]
    sidecar, trainer = containers_of(job["spec"]["template"])
    assert sidecar["image"] == SIDECAR.replace("REGISTRY", "registry.example:5000")
    assert trainer["image"] == "registry.example:5000/my-trainer:1.0.0"
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_the_kustomization_puts_the_sidecar_into_a_job_of_ones_own(tmp_path: Path) -> None:
    """A Job with the label gets it, whatever else is in it; one without the label does not."""
    shutil.copytree(DEPLOY / "kubernetes/components", tmp_path / "deploy/kubernetes/components")
    mine = tmp_path / "mine"
    mine.mkdir()
    text = blocks("yaml")[1].replace("../knapsack-rl/deploy", "../deploy")
    (mine / "kustomization.yaml").write_text(text)
    jobs = [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "template": {
                    "spec": {
                        "restartPolicy": "Never",
                        "initContainers": [{"name": "fetch", "image": "fetch:1.0.0"}],
                        "containers": [{"name": "main", "image": "mine:1.0.0"}],
                        "volumes": [{"name": "data", "emptyDir": {}}],
                    }
                }
            },
        }
        for name, labels in (("with", {"knapsack-rl/scheduler": "sidecar"}), ("without", {}))
    ]
    (mine / "job.yaml").write_text(yaml.safe_dump_all(jobs))
    found = {t["metadata"]["name"]: t for t in kustomized_folder(mine) if t["kind"] == "Job"}
    spec = pod_of(found["with"])["spec"]
    assert [c["name"] for c in spec["initContainers"]] == ["scheduler", "fetch"]
    assert spec["initContainers"][0]["image"] == SIDECAR
    assert [v["name"] for v in spec["volumes"]] == ["knapsack-store", "knapsack-tmp", "data"]
    assert found["without"] == jobs[1]


def test_paths_exist() -> None:
    """Files and folders that it names are there."""
    for path in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", README):
        assert (DEPLOY / path).exists(), path
    for path in re.findall(r"deploy/[\w./-]+", README):
        assert (ROOT / path.rstrip("./")).exists(), path


def test_its_secrets_are_those_of_the_manifest() -> None:
    """Names and keys that it creates are those that the Deployment and the PodMonitor read."""
    made = dict(re.findall(r"kubectl -n rl create secret \w+ (\S+) (?:\\\n\s+)?--(\S+)", README))
    assert made.keys() == {f"knapsack-scheduler-{kind}" for kind in ("store", "tls", "tokens")}
    for key in ("--from-literal=url=", "--from-literal=admin-token=", "--from-literal=tokens="):
        assert key in README

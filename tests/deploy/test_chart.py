"""The Helm chart by itself: lint, its values, and what a user may change."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from deploy_tools import CHART, SCENARIOS, VERSION, containers_of, helm_template, run, templated
from manifest_rules import faults


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_chart_has_no_lint(scenario: str) -> None:
    """Helm itself finds nothing to warn of."""
    done = run("helm", "lint", "--strict", CHART, "--values", CHART / f"ci/{scenario}-values.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_version_is_the_projects() -> None:
    """Chart, application and project have one version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (VERSION, VERSION)


def test_a_package_carries_rules_and_dashboards(tmp_path: Path) -> None:
    """The files that are links in the repository are files in a package."""
    done = run("helm", "package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"knapsack-rl-{VERSION}.tgz") as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
    assert "knapsack-rl/files/rules/knapsack-rl.yaml" in files
    assert {
        f"knapsack-rl/files/dashboards/{name}.json" for name in ("run", "service", "generation")
    } <= files
    assert not any(name.startswith("knapsack-rl/ci/") for name in files)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("scheduler.replicas=two", "/scheduler/replicas"),
        ("scheduler.replicas=-1", "/scheduler/replicas"),
        ("scheduler.replica=3", "replica"),
        ("images.pullPolicy=Sometimes", "/images/pullPolicy"),
        ("images.scheduler.tag=latest", "/images/scheduler/tag"),
        ("images.scheduler.digest=sha256:abc", "/images/scheduler/digest"),
        ("sidecar.resources.limits.memory=lots", "/sidecar/resources/limits/memory"),
        ("trainer.image=mine", "/trainer/image"),
        ("genserver.weights.model=../model", "/genserver/weights/model"),
        ("sidecer.store.persistent=true", "sidecer"),
    ],
)
def test_a_wrong_value_is_refused(value: str, message: str) -> None:
    """A value that is misspelt, of the wrong type or out of range names itself."""
    done = helm_template("service", "--set", value)
    assert done.returncode != 0
    assert message in done.stderr


def _pod(scenario: str, *arguments: str) -> dict:
    things = templated(scenario, *arguments)
    assert faults(things) == []
    return next(t for t in things if t["kind"] in ("Job", "Deployment"))["spec"]["template"]


def test_a_trainer_of_ones_own() -> None:
    """Image, command, volumes and rights are the user's; the sidecar keeps its own rights."""
    pod = _pod(
        "sidecar",
        "--set", "trainer.image=registry.example/grpo:1.2.3",
        "--set-json", 'trainer.command=["python","train.py"]',
        "--set-json", "trainer.args=[]",
        "--set", r"trainer.resources.limits.nvidia\.com/gpu=8",
        "--set-json", 'trainer.volumes=[{"name":"data","emptyDir":{}}]',
        "--set-json", 'trainer.volumeMounts=[{"name":"data","mountPath":"/data"}]',
    )  # fmt: skip
    sidecar, trainer = containers_of(pod)
    assert trainer["image"] == "registry.example/grpo:1.2.3"
    assert trainer["command"] == ["python", "train.py"]
    assert "args" not in trainer
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert [m["name"] for m in trainer["volumeMounts"]] == ["outbox", "data"]
    assert sidecar["image"] == f"knapsack-rl/scheduler:{VERSION}"
    assert sidecar["securityContext"]["runAsUser"] == 10001


def test_a_registry_and_a_digest() -> None:
    """A digest wins over a tag, and credentials of the registry are the pod's."""
    digest = "sha256:" + "0" * 64
    pod = _pod(
        "service",
        "--set", "images.scheduler.repository=registry.example:5000/knapsack/scheduler",
        "--set", f"images.scheduler.digest={digest}",
        "--set-json", 'images.pullSecrets=["pull"]',
    )  # fmt: skip
    assert containers_of(pod)[0]["image"] == f"registry.example:5000/knapsack/scheduler@{digest}"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_client_certificates() -> None:
    """Mutual TLS is one value."""
    pod = _pod("service", "--set", "scheduler.tls.clientCa=true")
    assert "--tls-client-ca=/etc/knapsack-rl/tls/ca.crt" in containers_of(pod)[0]["args"]


def test_a_claim_of_ones_own() -> None:
    """An existing claim is mounted and none is made."""
    done = helm_template("sidecar-pvc", "--set", "sidecar.store.existingClaim=mine")
    assert "claimName: mine" in done.stdout
    assert "kind: PersistentVolumeClaim" not in done.stdout


def test_a_group_of_the_trainers_own_is_kept() -> None:
    """A pod with an fsGroup keeps it, once."""
    pod = _pod("sidecar-pvc", "--set", "trainer.podSecurityContext.fsGroup=2000")
    assert pod["spec"]["securityContext"]["fsGroup"] == 2000


def test_two_releases_in_one_namespace() -> None:
    """No object of one release has the name of another's."""

    def names(release: str) -> set[str]:
        done: subprocess.CompletedProcess[str] = run(
            "helm", "template", release, CHART, "--values", CHART / "ci/monitored-values.yaml"
        )
        assert done.returncode == 0, done.stderr
        return {
            f"{d['kind']}/{d['metadata']['name']}" for d in yaml.safe_load_all(done.stdout) if d
        }

    assert not names("one") & names("two")

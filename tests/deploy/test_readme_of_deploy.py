"""What the README of the deployment shows works as it stands there."""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
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
    tool,
)
from manifest_rules import settings_of

README = (DEPLOY / "README.md").read_text()
TEXTS = README + (DEPLOY / "REFERENCE.md").read_text()
SIDECAR = f"REGISTRY/knapsack-rl/scheduler:{VERSION}"


def blocks(language: str) -> list[str]:
    """Return the README's blocks of a language, in order."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for named, text in every if named == language]


def commands() -> list[str]:
    """Return the README's commands, in order, each on one line."""
    lines = "\n".join(blocks("")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("docker ", "helm ", "kubectl ", "sed "))]


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


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("helm ")])
def test_releases_are_installed_as_it_says(command: str) -> None:
    """The chart takes the values of each, and the images come from the user's registry."""
    words = shlex.split(command)
    if "install" not in words:
        assert words == ["helm", "uninstall", RELEASE]
        return
    words[words.index("install")] = "template"
    done = run(*words)
    assert done.returncode == 0, done.stderr
    pods = [pod for thing in objects_of(done.stdout) if (pod := pod_of(thing))]
    assert {c["image"] for pod in pods for c in containers_of(pod)} == {SIDECAR}


def test_a_pod_holds_the_claims_that_it_says() -> None:
    """The commands name the claim and the image in the manifest."""
    claims = []
    for command in commands():
        if command.startswith("sed "):
            shown, _, applied = command.partition(" | ")
            assert applied == "kubectl apply -f -"
            done = subprocess.run(shown, shell=True, capture_output=True, text=True, cwd=ROOT)
            [pod] = objects_of(done.stdout)
            assert [c["image"] for c in containers_of(pod)] == [SIDECAR]
            claims += [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod["spec"]["volumes"]
                if "persistentVolumeClaim" in volume
            ]
    assert claims == ["knapsack-sidecar-store", "knapsack-weights"]
    made = [objects_of(path.read_text()) for path in (DEPLOY / "kubernetes").rglob("claim.yaml")]
    assert set(claims) == {claim["metadata"]["name"] for [claim] in made}


def test_a_job_of_ones_own_is_watched(tmp_path: Path) -> None:
    """Its kustomization has the scheduler's metrics where its PodMonitor looks for them."""
    shutil.copytree(DEPLOY, tmp_path / "deploy", ignore=shutil.ignore_patterns("helm"))
    mine = tmp_path / "mine"
    mine.mkdir()
    text = blocks("yaml")[2].replace("../knapsack-rl/deploy", "../deploy")
    (mine / "kustomization.yaml").write_text(text)
    shutil.copy(DEPLOY / "kubernetes/overlays/sidecar/job.yaml", mine)
    things = kustomized_folder(mine)
    kinds = [thing["kind"] for thing in things]
    assert {"PrometheusRule", "ConfigMap"} <= set(kinds)
    pod = pod_of(things[kinds.index("Job")])
    monitor = things[kinds.index("PodMonitor")]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    [scheduler] = [c for c in containers_of(pod) if c["name"] == "scheduler"]
    ports = {port["name"]: port["containerPort"] for port in scheduler["ports"]}
    assert ports[monitor["podMetricsEndpoints"][0]["port"]] == 9464
    assert settings_of(scheduler)["--admin-listen"] == "0.0.0.0:9464"


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
    for path in re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", TEXTS):
        assert (DEPLOY / path).exists(), path
    for path in re.findall(r"deploy/[\w./-]+", TEXTS):
        assert (ROOT / path.rstrip("./")).exists(), path


def test_its_commands_are_whole() -> None:
    """kubectl takes every one of them as far as the server, which is not there."""
    asked = [c for c in commands() if c.startswith("kubectl ") and " create secret " not in c]
    assert len(asked) >= 10
    for command in asked:
        words = shlex.split(command.partition("  #")[0].partition(" > ")[0])
        if words[1] == "cp":
            assert words[3].startswith("knapsack-claim:/var/lib/knapsack-rl/")
            continue
        done = run("kubectl", "--server=http://127.0.0.1:1", *words[1:])
        assert "The connection to the server 127.0.0.1:1 was refused" in done.stderr, command


_WITHOUT_A_CLUSTER = """
helm() { :; }
kubectl() {
    case " $* " in *" create "*)
        command kubectl "$@" --dry-run=client --output yaml
        echo ---
    esac
}
"""


def test_its_secrets_hold_what_the_manifest_reads(tmp_path: Path) -> None:
    """The block is run as it stands: names, keys, a certificate, a token of each kind."""
    [block] = [text for text in blocks("") if "create secret" in text]
    folders = {str(Path(tool(name)).parent) for name in ("kubectl", "openssl", "bash")}
    done = subprocess.run(
        ["bash", "-euc", _WITHOUT_A_CLUSTER + block],
        cwd=tmp_path, env={"PATH": ":".join(folders)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {
        thing["metadata"]["name"]: {
            key: base64.b64decode(text).decode() for key, text in thing["data"].items()
        }
        for thing in objects_of(done.stdout)
        if thing["kind"] == "Secret"
    }
    team = found.pop("knapsack-team-a")
    assert found.keys() == {f"knapsack-scheduler-{kind}" for kind in ("store", "tls", "tokens")}
    assert found["knapsack-scheduler-store"]["url"].startswith("postgresql://")
    pair = found["knapsack-scheduler-tls"]
    assert team["ca.crt"] == pair["tls.crt"]
    assert "PRIVATE KEY" in pair["tls.key"]
    tokens = found["knapsack-scheduler-tokens"]
    assert tokens["tokens"] == f"{tokens['admin-token']} *\n{team['token']} team-a/"
    assert tokens["admin-token"] != team["token"]

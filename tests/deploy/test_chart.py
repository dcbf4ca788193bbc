"""The Helm chart by itself: lint, its values, and what a user may change."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml

from deploy_tools import (
    CHART,
    SCENARIOS,
    VERSION,
    Object,
    containers_of,
    helm_template,
    name_of,
    objects_of,
    pod_of,
    run,
    templated,
)
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
        ("trainer.labels.knapsack-rl/client=no", "/trainer/labels"),
        ("trainer.podSpec.restartPolicy=Never", "/trainer/podSpec"),
        ("sidecar.env[0].value=x", "/sidecar/env/0"),
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


def test_where_the_trainer_runs_is_the_users() -> None:
    """Labels, annotations, placement and further fields of the pod are taken as they are."""
    things = templated(
        "sidecar",
        "--set-json", 'trainer.labels={"kueue.x-k8s.io/queue-name":"team-a"}',
        "--set-json", 'trainer.annotations={"sidecar.istio.io/inject":"false"}',
        "--set-json", 'trainer.nodeSelector={"gpu":"h100"}',
        "--set-json", 'trainer.tolerations=[{"key":"nvidia.com/gpu","operator":"Exists"}]',
        "--set-json", 'trainer.affinity={"podAntiAffinity":{"x":[]}}',
        "--set-json", 'trainer.podSpec={"priorityClassName":"train","runtimeClassName":"nvidia"}',
    )  # fmt: skip
    assert faults(things) == []
    [job] = [thing for thing in things if thing["kind"] == "Job"]
    pod = job["spec"]["template"]
    for labels in (job["metadata"]["labels"], pod["metadata"]["labels"]):
        assert labels["kueue.x-k8s.io/queue-name"] == "team-a"
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    spec = pod["spec"]
    assert spec["nodeSelector"] == {"gpu": "h100"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert spec["affinity"] == {"podAntiAffinity": {"x": []}}
    assert (spec["priorityClassName"], spec["runtimeClassName"]) == ("train", "nvidia")


@pytest.mark.parametrize("component", ["sidecar", "scheduler", "genserver"])
def test_variables_of_ones_own(component: str) -> None:
    """Each program takes variables, beside those that the chart gives it."""
    variable = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel:4317"}
    things = templated("monitored", "--set-json", f"{component}.env=[{json.dumps(variable)}]")
    assert faults(things) == []
    pods = [pod for thing in things if (pod := pod_of(thing))]
    [container] = [c for pod in pods for c in containers_of(pod) if variable in c["env"]]
    assert container["name"] in (component, "scheduler")
    assert len(container["env"]) > 1


def test_further_ways_out() -> None:
    """The policies let out what the user names, and the scheduler's names and database as well."""
    rule = {"ports": [{"protocol": "TCP", "port": 4317}]}
    given = ["--set-json", f"scheduler.extraEgress=[{json.dumps(rule)}]"]
    given += ["--set-json", f"genserver.extraEgress=[{json.dumps(rule)}]"]
    things = {name_of(thing): thing for thing in templated("monitored", *given)}
    assert things["NetworkPolicy/knapsack-genserver"]["spec"]["egress"] == [rule]
    out = things["NetworkPolicy/knapsack-scheduler"]["spec"]["egress"]
    assert out[-1] == rule
    assert {p["port"] for each in out for p in each["ports"]} == {53, 5353, 5432, 4317}


def test_a_pod_can_be_of_the_class_guaranteed() -> None:
    """With limits as requests of cpu and memory in both containers, which both can be given."""
    same = '{"requests":{"cpu":"2","memory":"2Gi"},"limits":{"cpu":"2","memory":"2Gi"}}'
    pod = _pod(
        "sidecar",
        "--set-json", f"sidecar.resources={same}", "--set-json", f"trainer.resources={same}",
    )  # fmt: skip
    for container in containers_of(pod):
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_figures_are_shown_to_others_only_when_asked() -> None:
    """By default the sidecar's metrics are on the pod's loopback; monitoring exposes them."""

    def exposed(*arguments: str) -> bool:
        return "metrics" in [port["name"] for port in containers_of(_pod(*arguments))[0]["ports"]]

    assert not exposed("sidecar")
    assert exposed("sidecar", "--set", "sidecar.exposeMetrics=true")
    assert exposed("sidecar", "--set", "monitoring.enabled=true")


def _release(name: str, *arguments: str) -> list[Object]:
    values = CHART / "ci/monitored-values.yaml"
    done = run("helm", "template", name, CHART, "--values", values, *arguments)
    assert done.returncode == 0, done.stderr
    return objects_of(done.stdout)


def test_two_releases_in_one_namespace() -> None:
    """No object has the name of the other's, and no selector chooses pods of the other."""
    one, two = _release("one"), _release("two")
    assert not set(map(name_of, one)) & set(map(name_of, two))
    pods = [pod for thing in two if (pod := pod_of(thing))]
    for thing in one:
        if thing["kind"] not in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Service"):
            continue
        selector = thing["spec"].get("podSelector", thing["spec"].get("selector"))
        labels = selector.get("matchLabels", selector)
        for pod in pods:
            assert not labels.items() <= pod["metadata"]["labels"].items(), name_of(thing)


def test_rules_and_dashboards_are_there_once() -> None:
    """A second release can leave them out and is scraped all the same."""
    less = ["--set", "monitoring.rules=false", "--set", "monitoring.dashboards=false"]
    kinds = {thing["kind"] for thing in _release("two", *less)}
    assert "PodMonitor" in kinds
    assert not {"PrometheusRule", "ConfigMap"} & kinds

"""The objects of both ways to deploy, against schemas and against each other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from deploy_tools import (
    DEPLOY,
    SCENARIOS,
    VERSION,
    Object,
    containers_of,
    kustomized,
    kustomized_folder,
    name_of,
    objects_of,
    pod_of,
    ray_pods_of,
    templated,
)
from manifest_rules import faults, settings_of

# From the first with native sidecars on by default to the newest that the validator knows.
KUBERNETES = ("1.29", "1.31", "1.33", "1.35", "1.37")
RENDERERS = {"kustomize": kustomized, "helm": templated}
CRDS = Path(__file__).parent / "crds"

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
both_ways = pytest.mark.parametrize("way", RENDERERS)


def check_schema(thing: Object, version: str) -> None:
    """Raise if an object has a field that its kind does not know, or a value that it refuses."""
    own = CRDS / f"{thing['kind']}.json"
    if own.exists():
        # The validator has no schemas of these, and would pass them with a warning.
        jsonschema.Draft202012Validator(json.loads(own.read_text())).validate(thing)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


@every_scenario
@both_ways
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_fits_its_schema(scenario: str, way: str, version: str) -> None:
    """No field is misspelt and no value is of the wrong type, in any version of Kubernetes."""
    for thing in RENDERERS[way](scenario):
        check_schema(thing, version)
        # Of a Ray cluster KubeRay's own fields are checked, and its pod templates as pods.
        for pod in ray_pods_of(thing):
            check_schema({"apiVersion": "v1", "kind": "Pod", **pod}, version)


@every_scenario
@both_ways
def test_the_objects_fit_each_other(scenario: str, way: str) -> None:
    """Selectors, ports, mounts, probes and claims name what is there; nothing runs as root."""
    assert faults(RENDERERS[way](scenario)) == []


def test_the_ray_cluster_is_scraped() -> None:
    """By the PodMonitor of the generation server."""
    monitor = kustomized_folder(DEPLOY / "kubernetes/monitoring/genserver")
    assert faults([*kustomized("genserver-ray"), *monitor]) == []


@every_scenario
def test_chart_and_kustomize_come_to_the_same(scenario: str) -> None:
    """Both ways give the same objects, the labels apart that say who manages them."""

    def plain(things: list[Object]) -> dict[str, Object]:
        found = {}
        for thing in copy.deepcopy(things):
            labels = thing["metadata"]["labels"]
            for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
                labels.pop(label, None)
            # Helm's own, of what `helm uninstall` leaves.
            if "helm.sh/resource-policy" in thing["metadata"].get("annotations", {}):
                assert thing["kind"] == "PersistentVolumeClaim"
                assert thing["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
            found[name_of(thing)] = thing
            # Trailing newlines of embedded files.
            for key, value in thing.get("data", {}).items():
                thing["data"][key] = value.rstrip("\n")
        return found

    assert plain(templated(scenario)) == plain(kustomized(scenario))


def test_the_scenarios_hold_every_kind() -> None:
    """What the chart can make, the scenarios make, so that the tests above have seen it."""
    kinds = {thing["kind"] for scenario in SCENARIOS for thing in kustomized(scenario)}
    assert kinds == {
        "ConfigMap",
        "Deployment",
        "Job",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "PodMonitor",
        "PrometheusRule",
        "RayCluster",
        "Service",
    }


def test_the_pod_that_holds_a_claim() -> None:
    """It fits its schemas, and with a claim in the name's place the rules."""
    text = (DEPLOY / "kubernetes/claim-pod.yaml").read_text()
    [pod] = objects_of(text.replace("CLAIM", "knapsack-sidecar-store"))
    for version in KUBERNETES:
        check_schema(pod, version)
    claims = [t for t in kustomized("sidecar-pvc") if t["kind"] == "PersistentVolumeClaim"]
    assert faults([pod, *claims]) == []


@both_ways
def test_images_are_of_this_version(way: str) -> None:
    """Tags follow the version of the project."""
    pods = [pod for thing in RENDERERS[way]("monitored") if (pod := pod_of(thing))]
    images = {container["image"] for pod in pods for container in containers_of(pod)}
    assert images == {f"knapsack-rl/scheduler:{VERSION}", f"knapsack-rl/genserver:{VERSION}"}
    for thing in RENDERERS[way]("monitored"):
        assert thing["metadata"]["labels"]["app.kubernetes.io/version"] == VERSION


@both_ways
def test_the_sidecar_is_a_sidecar(way: str) -> None:
    """It serves the pod's loopback alone, starts before the trainer and ends after it."""
    job = next(thing for thing in RENDERERS[way]("sidecar") if thing["kind"] == "Job")
    [sidecar] = job["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert "--listen=127.0.0.1:50051" in sidecar["args"]
    # Nobody reads the figures of runs from elsewhere, unless asked: its default is the loopback.
    assert "--admin-listen" not in settings_of(sidecar)
    assert "--insecure" not in settings_of(sidecar)
    assert "service" not in sidecar["startupProbe"]["grpc"]


MISTAKES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a probe at another port": (
        "Job/knapsack-trainer",
        lambda o: o["spec"]["template"]["spec"]["initContainers"][0]["readinessProbe"][
            "grpc"
        ].update(port=50051),
        "readinessProbe asks port 50051",
    ),
    "a mount without a volume": (
        "Job/knapsack-trainer",
        lambda o: o["spec"]["template"]["spec"]["volumes"].pop(0),
        "which is no volume",
    ),
    "a health port that only the pod reaches": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["args"].__setitem__(
            2, "--health-listen=127.0.0.1:50052"
        ),
        "neither kubelet nor Prometheus",
    ),
    "a selector of other pods": (
        "Service/knapsack-scheduler",
        lambda o: o["spec"]["selector"].update({"app.kubernetes.io/component": "scheduller"}),
        "chooses no pod",
    ),
    "a latest image": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"]["containers"][0].update(
            image="knapsack-rl/scheduler:latest"
        ),
        "is not pinned",
    ),
    "a root that can be written": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["securityContext"].pop(
            "readOnlyRootFilesystem"
        ),
        "may write its root",
    ),
    "no tokens": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["args"].remove(
            "--token-file=/etc/knapsack-rl/tokens/tokens"
        ),
        "without TLS and tokens",
    ),
    "metrics on the loopback that are scraped": (
        "Job/knapsack-trainer",
        lambda o: o["spec"]["template"]["spec"]["initContainers"][0]["env"].pop(0),
        "--admin-listen is not given, which neither kubelet nor Prometheus reaches",
    ),
    "metrics for others that nobody said were for them": (
        "Job/knapsack-trainer",
        lambda o: o["spec"]["template"]["spec"]["initContainers"][0]["env"].pop(1),
        "without a token, which it would refuse to",
    ),
    "an init container that never ends": (
        "Job/knapsack-trainer",
        lambda o: o["spec"]["template"]["spec"]["initContainers"][0].pop("restartPolicy"),
        "is no sidecar",
    ),
    "metrics for everybody": (
        "NetworkPolicy/knapsack-scheduler",
        lambda o: o["spec"]["ingress"][1].pop("from"),
        "opens the metrics to everybody",
    ),
    "a scrape of a port that is not there": (
        "PodMonitor/knapsack-scheduler",
        lambda o: o["spec"]["podMetricsEndpoints"][0].update(port="metric"),
        "which its pods do not have",
    ),
    "more runs in memory than there is": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["args"].remove(
            "--max-loaded-bytes=536870912"
        ),
        "bytes of runs beside its calls",
    ),
    "no time to drain": (
        "Deployment/knapsack-scheduler",
        lambda o: o["spec"]["template"]["spec"].update(terminationGracePeriodSeconds=10),
        "is killed after 10 s",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    """Each rule finds the mistake that it is for."""
    name, make, message = MISTAKES[mistake]
    things = copy.deepcopy(kustomized("monitored"))
    make(next(thing for thing in things if name_of(thing) == name))
    assert any(message in fault for fault in faults(things)), faults(things)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Job", lambda o: o["spec"].update(backofLimit=3)),
        ("Deployment", lambda o: o["spec"].update(replicas="2")),
        ("PodMonitor", lambda o: o["spec"]["podMetricsEndpoints"][0].update(intervall="15s")),
        ("PrometheusRule", lambda o: o["spec"]["groups"][0]["rules"][0].update(expresion="1")),
    ],
)
def test_a_misspelt_field_is_found(kind: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A field that nobody knows is refused, in kinds of Kubernetes and of the operator."""
    thing = copy.deepcopy(next(t for t in kustomized("monitored") if t["kind"] == kind))
    check_schema(thing, KUBERNETES[-1])
    change(thing)
    with pytest.raises(jsonschema.ValidationError):
        check_schema(thing, KUBERNETES[-1])

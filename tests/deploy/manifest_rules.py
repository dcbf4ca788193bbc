"""What must hold between the objects of a deployment, which no schema says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from deploy_tools import Object, containers_of, name_of, pod_of, ray_pods_of

# Secrets and claims that a user makes; everything else that is named must be there.
MADE_BY_USERS = {
    "knapsack-scheduler-store",
    "knapsack-scheduler-tls",
    "knapsack-scheduler-tokens",
}
# The autoscaler beside Ray's head calls the API server, and Ray writes where it likes.
RAY_MAY = ("mounts a service account's token", "may write its root")
# Bytes that calls take at most with the flags of the manifests; see scheduler/OPERATIONS.md.
CALLS = int(1.2 * 2**30)
_PINNED = re.compile(r".+(:\d+\.\d+\.\d+([-.+]\w+)*|@sha256:[0-9a-f]{64})")


def faults(objects: Iterable[Object]) -> list[str]:
    """Return a sentence for each rule that the objects break; empty if they are right."""
    things = list(objects)
    found: list[str] = []
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in things]
    found += [
        f"{kind}/{name}: is there twice"
        for kind, name in set(names)
        if names.count((kind, name)) > 1
    ]
    for thing in things:
        where = name_of(thing)
        found += [f"{where}: {fault}" for fault in _faults_of(thing, things)]
    return found


def _faults_of(thing: Object, things: list[Object]) -> Iterator[str]:
    pod = pod_of(thing)
    if pod is not None:
        yield from _pod_faults(pod, things)
    for pod_of_ray in ray_pods_of(thing):
        apart = not pod_of_ray["spec"].get("shareProcessNamespace")
        if apart and any("--engine=ray" in c.get("args", []) for c in containers_of(pod_of_ray)):
            yield "its driver does not see the raylet's process, and cannot join the cluster"
        for fault in _pod_faults(pod_of_ray, things):
            if not fault.endswith(RAY_MAY):
                yield fault
    if thing["kind"] == "Deployment" and not _matches(
        thing["spec"]["selector"]["matchLabels"], pod
    ):
        yield "its selector does not match its own pods"
    if thing["kind"] == "Service":
        yield from _service_faults(thing, things)
    if len(json.dumps(thing)) > 200_000:
        yield "is too large for kubectl apply, which copies it into an annotation of 256 KiB"
    if thing["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        spec = thing["spec"]
        selector = spec["podSelector"] if thing["kind"] == "NetworkPolicy" else spec["selector"]
        chosen = _chosen(selector["matchLabels"], things)
        if not chosen:
            yield "chooses no pod"
        if thing["kind"] == "PodMonitor":
            yield from _monitor_faults(thing, chosen)
        if thing["kind"] == "NetworkPolicy":
            yield from _policy_faults(thing, chosen)


def _pod_faults(pod: Object, things: list[Object]) -> Iterator[str]:
    spec = pod["spec"]
    if spec.get("automountServiceAccountToken") is not False:
        yield "mounts a service account's token"
    if spec.get("enableServiceLinks") is not False:
        yield "takes variables of Services among its settings"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    mounted: set[str] = set()
    ports: list[int] = []
    for container in containers_of(pod):
        for fault in _container_faults(container, spec):
            yield f"{container['name']}: {fault}"
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield f"{container['name']}: mounts {mount['name']}, which is no volume"
        paths = [mount["mountPath"] for mount in mounts]
        if len(paths) != len(set(paths)):
            yield f"{container['name']}: mounts two volumes at one path"
        ports += [port["containerPort"] for port in container.get("ports", [])]
    for unused in sorted(volumes.keys() - mounted):
        yield f"volume {unused} is mounted nowhere"
    if len(ports) != len(set(ports)):
        yield "two ports are one number"
    claims = {t["metadata"]["name"] for t in things if t["kind"] == "PersistentVolumeClaim"}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"volume {volume['name']}: there is no claim {claim}"
        secret = volume.get("secret")
        if secret is not None:
            if secret["secretName"] not in MADE_BY_USERS:
                yield f"volume {volume['name']}: nobody makes the Secret {secret['secretName']}"
            if secret.get("defaultMode") != 0o440:
                yield f"volume {volume['name']}: others may read the Secret"
            if not spec["securityContext"].get("fsGroup"):
                yield f"volume {volume['name']}: without fsGroup the Secret cannot be read"


def _container_faults(container: Object, pod: Object) -> Iterator[str]:
    if not _PINNED.fullmatch(container["image"]):
        yield f"image {container['image']} is not pinned"
    own = container.get("securityContext", {})
    context = {**pod.get("securityContext", {}), **own}
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "may run as root"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "has no seccomp profile"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "may write its root"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if own.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    for kind in ("requests", "limits"):
        if not {"cpu", "memory"} <= container.get("resources", {}).get(kind, {}).keys():
            yield f"has no {kind} of cpu and memory"
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    for name in ports:
        if len(name) > 15:
            yield f"port name {name} is longer than 15 characters"
    flags = settings_of(container)
    for flag, port_name in (
        ("--listen", "grpc"),
        ("--health-listen", "health"),
        ("--admin-listen", "metrics"),
    ):
        host, _, port = flags.get(flag, "").rpartition(":")
        if host == "0.0.0.0":
            if ports.get(port_name) != int(port):
                yield f"{flag} is {flags[flag]}, but the port {port_name} is {ports.get(port_name)}"
        # What is not given listens on the pod's loopback.
        elif port_name in ports or (flag in flags and flag == "--health-listen"):
            given = flags.get(flag, "not given")
            yield f"{flag} is {given}, which neither kubelet nor Prometheus reaches"
    probes = [
        kind for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in container
    ]
    if "--health-listen" in flags and len(probes) < 3:
        yield "lacks a probe"
    for kind in probes:
        probe = container[kind].get("grpc", {})
        if probe.get("port") != ports.get("health"):
            yield f"{kind} asks port {probe.get('port')}, health is at {ports.get('health')}"
        # Not ready is no reason to be killed: it loads, or drains.
        if (probe.get("service") == "liveness") != (kind == "livenessProbe"):
            yield f"{kind} asks for the wrong service"
    is_sidecar = container in pod.get("initContainers", [])
    if is_sidecar and container.get("restartPolicy") != "Always":
        yield "is no sidecar: the trainer would wait for its end"
    if "--max-inflight-bytes" in flags:
        kept = int(flags.get("--max-loaded-bytes", 4 * 2**30))
        limit = _bytes_of(container["resources"]["limits"]["memory"])
        if CALLS + kept > limit:
            yield f"may hold {kept} bytes of runs beside its calls, more than its limit of {limit}"
    drain = float(flags.get("--drain-seconds", 0))
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if drain and drain + 5 > grace:
        yield f"drains for {drain:g} s, but is killed after {grace} s"
    proofs = {"--tls-cert", "--tls-key", "--token-file"}
    is_open = flags.get("--listen", "").startswith("0.0.0.0") and "--insecure" not in flags
    if is_open and not proofs <= flags.keys():
        yield "serves others without TLS and tokens"
    shows = flags.get("--admin-listen", "").startswith("0.0.0.0")
    if shows and not {"--insecure", "--token-file"} & flags.keys():
        yield "shows metrics to others without a token, which it would refuse to"


def _service_faults(service: Object, things: list[Object]) -> Iterator[str]:
    chosen = _chosen(service["spec"]["selector"], things)
    if not chosen:
        yield "chooses no pod"
    for port in service["spec"]["ports"]:
        for pod in chosen:
            if port["targetPort"] not in _port_names(pod):
                yield f"leads to port {port['targetPort']}, which its pods do not have"
            elif port["port"] != _port_names(pod)[port["targetPort"]]:
                yield f"has port {port['port']}, its pods {_port_names(pod)[port['targetPort']]}"


def _monitor_faults(monitor: Object, chosen: list[Object]) -> Iterator[str]:
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        for pod in chosen:
            if endpoint["port"] not in _port_names(pod):
                yield f"scrapes port {endpoint['port']}, which its pods do not have"
            guarded = any("--token-file" in flags_of(c) for c in containers_of(pod))
            if guarded != ("authorization" in endpoint):
                yield "has no token where one is asked for, or one where none is"


def _policy_faults(policy: Object, chosen: list[Object]) -> Iterator[str]:
    """What a policy opens must be what its pods serve, metrics for one namespace only."""
    for pod in chosen:
        names = _port_names(pod)
        if "metrics" not in names:
            continue
        opened = {
            port["port"]: rule
            for rule in policy["spec"]["ingress"]
            for port in rule.get("ports", [])
            if "endPort" not in port
        }
        if names["metrics"] not in opened:
            yield "keeps Prometheus from the metrics"
        elif not opened[names["metrics"]].get("from"):
            yield "opens the metrics to everybody"
        for rule in policy["spec"]["ingress"]:
            for port in rule.get("ports", []):
                end = port.get("endPort", port["port"])
                inside = port["port"] <= names["metrics"] <= end
                if port["protocol"] == "TCP" and inside and "from" not in rule:
                    yield "opens the metrics to everybody"
        if "grpc" in names and names["grpc"] not in opened:
            yield "keeps clients from the API"


def _bytes_of(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def flags_of(container: Object) -> dict[str, str]:
    """Return the flags of a container by name; those without a value have an empty one."""
    found = {}
    for argument in container.get("args", []):
        if argument.startswith("--"):
            flag, _, value = argument.partition("=")
            found[flag] = value
    return found


def settings_of(container: Object) -> dict[str, str]:
    """Return a container's flags, those among them that it has as variables."""
    prefix = "KNAPSACK_SCHEDULER_"
    found = {
        "--" + variable["name"].removeprefix(prefix).lower().replace("_", "-"): variable["value"]
        for variable in container.get("env", [])
        if variable["name"].startswith(prefix) and "value" in variable
    }
    return found | flags_of(container)


def _port_names(pod: Object) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in containers_of(pod)
        for port in container.get("ports", [])
    }


def _matches(selector: dict[str, str], pod: Object | None) -> bool:
    labels = pod["metadata"]["labels"] if pod else {}
    return bool(selector) and selector.items() <= labels.items()


def _chosen(selector: dict[str, str], things: list[Object]) -> list[Object]:
    pods = [pod for pod in map(pod_of, things) if pod is not None]
    pods += [pod for thing in things for pod in ray_pods_of(thing)]
    return [pod for pod in pods if _matches(selector, pod)]

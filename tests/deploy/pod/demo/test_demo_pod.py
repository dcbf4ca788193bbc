"""The services of deploy/compose.yaml that are ours, as compose starts them, in one pod.

Debian's Prometheus, with the configuration of the compose file, watches them there. Not part of
`make test-deploy`, but of .ci/run: it builds an image with torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_tools import DEPLOY, ROOT, VERSION, run, tool
from podman import Podman, until

pytestmark = pytest.mark.timeout(1800)

GENSERVER = f"knapsack-rl/genserver-cpu:{VERSION}"
STEPS = 4
OURS = ("scheduler", "model", "genserver", "trainer")
TARGETS = ("scheduler", "genserver", "trainer")
PROMETHEUS = "http://127.0.0.1:9090"


def as_pod(services: dict[str, Any]) -> dict[str, Any]:
    """Return compose's services as a pod, whose containers share a loopback.

    So their names are addresses of it; nothing else of their commands is changed, but for a
    shorter training.
    """
    containers, volumes = [], {}
    for name in OURS:
        service = services[name]
        words = [
            word.replace("=scheduler:", "=127.0.0.1:").replace("=genserver:", "=127.0.0.1:")
            for word in service["command"]
        ]
        if name == "trainer":
            words += ["--runs=1", f"--steps={STEPS}", "--warm-up-steps=50"]
        mounts = [{"name": f"{name}-tmp", "mountPath": "/tmp"}]
        volumes[f"{name}-tmp"] = {"emptyDir": {}}
        for volume in service["volumes"]:
            mounts.append({"name": volume["source"], "mountPath": volume["target"]})
            volumes[volume["source"]] = {"persistentVolumeClaim": {"claimName": volume["source"]}}
        environment = service.get("environment", {})
        container = {
            "name": name,
            "image": service["image"],
            "args": words,
            "env": [{"name": key, "value": value} for key, value in environment.items()],
            "volumeMounts": mounts,
            "securityContext": {
                "runAsUser": 10001,
                "readOnlyRootFilesystem": service["read_only"],
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": service["cap_drop"]},
            },
        }
        if service.get("entrypoint"):
            container["command"] = service["entrypoint"]
        containers.append(container)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "demo"},
        "spec": {
            "restartPolicy": "Never",
            "containers": containers,
            "volumes": [{"name": name, **volume} for name, volume in volumes.items()],
        },
    }


@dataclass(frozen=True)
class Demo:
    """The pod after its training, its servers still running."""

    podman: Podman
    trainer_exit: int
    trainer_log: list[dict[str, Any]]

    def in_pod(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program of this machine on the pod's loopback."""
        return run("nsenter", *_network(self.podman), *command)

    def ask(self, path: str, query: str = "") -> Any:
        """Return what Prometheus answers."""
        script = (
            "import sys, urllib.parse, urllib.request\n"
            "url = sys.argv[1] + '?' + urllib.parse.urlencode({'query': sys.argv[2]})\n"
            "print(urllib.request.urlopen(url, timeout=10).read().decode())\n"
        )
        done = self.in_pod(sys.executable, "-c", script, f"{PROMETHEUS}/api/v1/{path}", query)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["data"]

    def script(self, container: str, text: str) -> Any:
        """Run a script in a container and return the JSON that it prints."""
        python = "/opt/knapsack-rl/bin/python"
        return json.loads(self.podman("exec", f"demo-{container}", python, "-c", text))


def _network(podman: Podman) -> list[str]:
    pid = podman.inspect("demo-scheduler")["State"]["Pid"]
    return [f"--target={pid}", "--net"]


@contextmanager
def _watched(podman: Podman, folder: Path) -> Iterator[None]:
    """Let a Prometheus with the compose file's configuration watch the pod, once a second."""
    shutil.copytree(DEPLOY / "prometheus", folder)
    file = folder / "prometheus.yaml"
    text = re.sub(rf'"({"|".join(TARGETS)}):', '"127.0.0.1:', file.read_text())
    file.write_text(text.replace("_interval: 15s", "_interval: 1s"))
    command = ["nsenter", *_network(podman), tool("prometheus"), f"--config.file={file}",
               f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:9090",
               "--log.level=error"]  # fmt: skip
    with subprocess.Popen(command) as prometheus:
        try:
            yield
        finally:
            prometheus.terminate()


@pytest.fixture(scope="module")
def demo(built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """Image of the generation server built, model made, servers ready, a short training done."""
    podman: Podman = built.podman
    wheels = podman.wheelhouse(DEPLOY / "images/genserver/requirements.txt")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--dest", str(wheels), "torch==2.13.0"],
        check=True, timeout=600,
    )  # fmt: skip
    dockerfile = DEPLOY / "images/genserver/Dockerfile"
    podman.build(dockerfile, GENSERVER, wheels, "--target=cpu")
    compose = run("docker-compose", "--file", DEPLOY / "compose.yaml", "config", "--format=json")
    folder = tmp_path_factory.mktemp("demo")
    file = folder / "pod.yaml"
    file.write_text(yaml.safe_dump(as_pod(json.loads(compose.stdout)["services"])))
    podman("kube", "play", "--start=false", "--network=none", file)
    try:
        podman("start", "demo-model")
        assert int(podman("wait", "demo-model")) == 0
        podman("start", "demo-scheduler", "demo-genserver")
        podman.await_serving("demo-scheduler")
        until("genserver serves", lambda: podman.serves("demo-genserver", port=50062))
        with _watched(podman, folder / "prometheus"):
            podman("start", "demo-trainer")
            code = int(podman("wait", "demo-trainer", timeout=900))
            log = [json.loads(line) for line in podman("logs", "demo-trainer").splitlines()]
            yield Demo(podman, code, log)
    finally:
        podman("pod", "rm", "--force", "--time=5", "demo", check=False)


def test_it_trains(demo: Demo) -> None:
    """Every step of the training came, scheduled and generated by the servers."""
    assert demo.trainer_exit == 0
    assert len(demo.trainer_log) == STEPS


def test_the_scheduler_divided_every_step(demo: Demo) -> None:
    """It counts the rollouts of all steps: no step was a fallback."""
    rollouts = demo.script(
        "scheduler",
        "import json\n"
        "from knapsack_trainer_client import BudgetClient\n"
        "with BudgetClient('localhost:50051', 'demo-0', outbox=False) as budget:\n"
        "    print(json.dumps(sum(p.total_rollouts for p in budget.prompt_stats())))\n",
    )
    assert rollouts == STEPS * 1024


def test_prometheus_finds_all_three(demo: Demo) -> None:
    """By the configuration of the compose file, with every rule that is shipped."""
    up = demo.ask("query", "max_over_time(up[10m])")["result"]
    assert {(each["metric"]["job"], each["value"][1]) for each in up} == {
        (f"knapsack-{name}", "1") for name in TARGETS
    }
    groups = demo.ask("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    rules = yaml.safe_load((DEPLOY / "prometheus/rules/knapsack-rl.yaml").read_text())["groups"]
    assert {group["name"]: len(group["rules"]) for group in groups} == {
        group["name"]: len(group["rules"]) for group in rules
    }


def test_the_dashboard_of_the_run_shows_it(demo: Demo) -> None:
    """Each query of what Grafana opens first has data there."""
    program = ROOT / "tests/watch/dashboards.py"
    done = demo.in_pod(sys.executable, program, "--prometheus", PROMETHEUS, "run")
    assert done.returncode == 0, done.stdout + done.stderr


def test_sigterm_drains(demo: Demo) -> None:
    """The last test of the module: both servers end with exit code 0."""
    for name in ("demo-genserver", "demo-scheduler"):
        demo.podman("stop", "--time=45", name, timeout=100)
        assert demo.podman.inspect(name)["State"]["ExitCode"] == 0

"""The sidecar's pod, from our manifest and our image: killed, back, and drained last."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import process_facts
from deploy_tools import DEPLOY, kustomized, objects_of
from podman import Podman, as_podman_plays, until

pytestmark = pytest.mark.timeout(1800)

POD = "knapsack-trainer"
SIDECAR, TRAINER = f"{POD}-scheduler", f"{POD}-trainer"


@dataclass
class Story:
    """What was seen while the pod ran."""

    manifest: dict[str, Any]
    status: dict[str, dict[str, str]] = field(default_factory=dict)
    mounts: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    listening: set[tuple[str, int]] = field(default_factory=set)
    memory: tuple[int, int] = (0, 0)
    steps_at_restart: int = 0
    pids: list[int] = field(default_factory=list)
    health_before_start: bool = True
    trainer_log: list[dict[str, Any]] = field(default_factory=list)
    trainer_exit: int = -1
    sidecar_ran_after_trainer: bool = False
    sidecar_exit: int = -1
    sidecar_log: str = ""


@pytest.fixture(scope="module")
def story(built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Play the pod as the kubelet would: sidecar, probe, trainer, kill, end of trainer, drain."""
    podman: Podman = built.podman
    job = next(thing for thing in kustomized("sidecar") if thing["kind"] == "Job")
    template = job["spec"]["template"]
    seen = Story(template)
    file = tmp_path_factory.mktemp("pod") / "pod.yaml"
    file.write_text(yaml.safe_dump(as_podman_plays(template, POD)))
    podman("kube", "play", "--start=false", "--network=none", file)
    try:
        _play(podman, seen)
        yield seen
    finally:
        podman("pod", "rm", "--force", "--time=5", POD, check=False)


def _play(podman: Podman, seen: Story) -> None:
    # The startup probe holds the trainer back until the sidecar serves.
    seen.health_before_start = podman.serves(SIDECAR)
    podman("start", SIDECAR)
    podman.await_serving(SIDECAR)
    assert podman.serves(SIDECAR, "liveness")
    podman("start", TRAINER)

    def steps() -> int:
        return podman("logs", TRAINER).count('"step"')

    until("some steps", lambda: steps() >= 20)
    for name in (SIDECAR, TRAINER):
        pid = podman.inspect(name)["State"]["Pid"]
        seen.status[name] = process_facts.status(pid)
        seen.mounts[name] = process_facts.mount_options(pid)
    pid = podman.inspect(SIDECAR)["State"]["Pid"]
    seen.listening = process_facts.listening(pid)
    seen.pids.append(pid)
    os.kill(pid, signal.SIGKILL)
    seen.pids.append(
        until(
            "the sidecar is started again",
            lambda: (new := podman.inspect(SIDECAR)["State"]["Pid"]) not in (0, pid) and new,
        )
    )
    podman.await_serving(SIDECAR)
    seen.steps_at_restart = steps()

    seen.trainer_exit = int(podman("wait", TRAINER, timeout=300))
    seen.trainer_log = [json.loads(line) for line in podman("logs", TRAINER).splitlines()]
    state = podman.inspect(SIDECAR)["State"]
    seen.sidecar_ran_after_trainer = state["Running"]
    seen.memory = process_facts.memory_limit_and_peak(state["Pid"])
    # SIGTERM, and SIGKILL only after the time that the manifest gives.
    grace = seen.manifest["spec"]["terminationGracePeriodSeconds"]
    podman("stop", f"--time={grace}", SIDECAR, timeout=grace + 60)
    seen.sidecar_exit = podman.inspect(SIDECAR)["State"]["ExitCode"]
    seen.sidecar_log = podman("logs", SIDECAR)


def test_every_acknowledged_rollout_is_counted_once(story: Story) -> None:
    """The trainer's own books and the scheduler's agree although it was killed between them."""
    done = story.trainer_log[-1]
    assert done["event"] == "done"
    assert done["counted"] == done["reported"] > 0
    assert done["counted_successes"] == done["successes"] > 0
    assert story.trainer_exit == 0


def test_the_killed_sidecar_comes_back_with_its_state(story: Story) -> None:
    """It is another process, and gives unequal groups at once: it knows the prompts."""
    first, second = story.pids
    assert first != second
    steps = [line for line in story.trainer_log if "step" in line][story.steps_at_restart :]
    # On a busy machine a call may take longer than the trainer waits: one that did not will do.
    assert any(not step["fallback"] and step["largest_group"] > 8 for step in steps)
    assert story.sidecar_log.count('"event": "serving"') == 2


def test_the_training_never_stops(story: Story) -> None:
    """Each step of the trainer came, some with equal groups while the sidecar was away."""
    steps = [line["step"] for line in story.trainer_log if "step" in line]
    assert steps == list(range(400))


def test_the_sidecar_ends_last_and_drained(story: Story) -> None:
    """It runs when the trainer is done, and SIGTERM ends it with exit code 0."""
    assert not story.health_before_start
    assert story.sidecar_ran_after_trainer
    assert story.sidecar_exit == 0


@pytest.mark.parametrize("name", [SIDECAR, TRAINER])
def test_it_has_no_rights(story: Story, name: str) -> None:
    """By the kernel's own account: no root, no capabilities, no new privileges, a filter."""
    status = story.status[name]
    assert status["Uid"].split() == ["10001"] * 4
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


@pytest.mark.parametrize(
    ("name", "writable"),
    [(SIDECAR, {"/var/lib/knapsack-rl", "/tmp"}), (TRAINER, {"/outbox"})],
)
def test_it_writes_only_where_it_may(story: Story, name: str, writable: set[str]) -> None:
    """The root is read-only; what the manifest mounts is not."""
    mounts = story.mounts[name]
    assert "ro" in mounts["/"]
    for path in writable:
        assert "rw" in mounts[path], path


def test_it_stays_within_its_memory(story: Story, record_property) -> None:
    """The limit of the cgroup is the manifest's, and half of it was never used."""
    limit, peak = story.memory
    assert limit == 1536 * 2**20
    record_property(
        "measured", f"the sidecar used at most {peak / 2**20:.0f} MiB of {limit / 2**20:.0f}"
    )
    assert peak < limit / 2


def test_only_health_leaves_the_pod(story: Story) -> None:
    """API and metrics listen on the pod's loopback; what the kubelet needs does not."""
    assert story.listening == {("127.0.0.1", 50051), ("127.0.0.1", 9464), ("0.0.0.0", 50052)}


def test_metrics_leave_the_pod_when_they_are_monitored(built, tmp_path: Path) -> None:
    """With what the overlay `monitored` adds, Prometheus reaches them, and still nobody the API."""
    podman: Podman = built.podman
    job = next(thing for thing in kustomized("monitored") if thing["kind"] == "Job")
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump(as_podman_plays(job["spec"]["template"], "monitored")))
    podman("kube", "play", "--start=false", "--network=none", file)
    try:
        podman("start", "monitored-scheduler")
        podman.await_serving("monitored-scheduler")
        pid = podman.inspect("monitored-scheduler")["State"]["Pid"]
        others = {port for host, port in process_facts.listening(pid) if host == "0.0.0.0"}
        assert others == {50052, 9464}
    finally:
        podman("pod", "rm", "--force", "--time=5", "monitored")


def test_a_store_is_copied_from_a_claim_that_nobody_holds(built, tmp_path: Path) -> None:
    """As the README says: the pod that holds a claim copies the store in it, which is whole."""
    podman: Podman = built.podman
    [pod] = objects_of((DEPLOY / "kubernetes/claim-pod.yaml").read_text())
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump(as_podman_plays(pod, "knapsack-claim")))
    podman("kube", "play", "--network=none", file)
    try:
        inside = ("exec", "knapsack-claim-claim")
        store = "/var/lib/knapsack-rl/stats.db"
        script = (
            "from knapsack_trainer_client import BudgetClient\n"
            f"with BudgetClient.embedded('{store}', 'exp1', timeout=30, outbox=False) as budget:\n"
            "    given = budget.allocate(['a', 'b'], 8, 0)\n"
            "    budget.report(given, [[1.0] * n for n in given.num_rollouts])\n"
        )
        podman(*inside, "python", "-c", script)
        podman(*inside, "knapsack-scheduler", "backup", "--to", "/tmp/stats.db")
        copied = podman(*inside, "knapsack-scheduler", "check", "--store=sqlite:////tmp/stats.db")
        assert "exp1" in copied
    finally:
        podman("pod", "rm", "--force", "--time=1", "knapsack-claim")


def test_the_manifest_was_changed_only_as_said(story: Story) -> None:
    """What podman played has every word of the manifest but sidecars' place and ports."""
    played = as_podman_plays(story.manifest, POD)["spec"]
    spec = story.manifest["spec"]
    for container, original in zip(
        played["containers"], [*spec["initContainers"], *spec["containers"]], strict=True
    ):
        gone = set(original) - set(container)
        assert gone <= {"ports", "restartPolicy"}
        assert all(container[key] == original[key] for key in container)
    assert {k: v for k, v in played.items() if k != "containers"} == {
        k: v for k, v in spec.items() if k not in ("containers", "initContainers")
    }


def test_a_broken_manifest_does_not_come_up(built, story: Story, tmp_path: Path) -> None:
    """A flag that is misspelt in the manifest ends the sidecar with exit code 2."""
    manifest = as_podman_plays(story.manifest, "broken")
    sidecar = manifest["spec"]["containers"][0]
    sidecar["args"] = [*sidecar["args"], "--drain-secs=10"]
    manifest["spec"]["restartPolicy"] = "Never"
    file = tmp_path / "pod.yaml"
    file.write_text(yaml.safe_dump(manifest))
    built.podman("kube", "play", "--start=false", "--network=none", file)
    built.podman("start", "broken-scheduler", check=False)
    assert int(built.podman("wait", "broken-scheduler")) == 2
    built.podman("pod", "rm", "--force", "--time=5", "broken")

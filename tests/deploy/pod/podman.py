"""Podman with a root of its own: no registry, no network, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy_tools import ROOT, VERSION, tool

BASE = "docker.io/library/python:3.11-slim-bookworm"
SCHEDULER = f"knapsack-rl/scheduler:{VERSION}"
EPOCH = "1735689600"

# runc, because crun refuses hosts with both kinds of cgroups; cgroupfs, because there may be no
# systemd; and limits of processes that a container's user may have where root is confined.
_CONTAINERS = """
[containers]
default_ulimits = ["nofile=8192:8192", "nproc=8192:8192"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
_STORAGE = """
[storage]
driver = "overlay"
runroot = "{folder}/run"
graphroot = "{folder}/graph"
"""


class Podman:
    """A podman whose images, containers and settings lie in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("podman", "runc", "conmon", "mmdebstrap", "nsenter"):
            tool(name)
        (folder / "containers.conf").write_text(_CONTAINERS.format(folder=folder))
        (folder / "storage.conf").write_text(_STORAGE.format(folder=folder))
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __call__(self, *arguments: str | Path, timeout: float = 120, check: bool = True) -> str:
        """Run podman and return what it wrote; AssertionError with its errors if it failed."""
        done = subprocess.run(
            ["podman", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
            cwd=ROOT,
        )
        assert done.returncode == 0 or not check, f"podman {arguments[0]}: {done.stderr[-3000:]}"
        return done.stdout

    def inspect(self, container: str) -> Any:
        """Return what podman knows of a container."""
        return json.loads(self("container", "inspect", container))[0]

    def serves(self, container: str, service: str = "", *, port: int = 50052) -> bool:
        """Return whether a server's health port says SERVING, as a probe would see it."""
        python, check = "/opt/knapsack-rl/bin/python", "/opt/knapsack-rl/healthcheck.py"
        said = self("exec", container, python, check, f"127.0.0.1:{port}", service, check=False)
        return said == "SERVING\n"

    def await_serving(self, container: str) -> None:
        """Return when it serves; AssertionError with what it wrote if it does not in time."""
        try:
            until(f"{container} serves", lambda: self.serves(container))
        except AssertionError as error:
            state = self.inspect(container)["State"]
            command = ["podman", "logs", container]
            said = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=60
            )
            raise AssertionError(f"{error}\n{state}\n{said.stdout}{said.stderr}") from None

    def import_base(self) -> None:
        """Make the base image, under its usual name, of Debian's own packages."""
        archive = self.folder / "base.tar"
        subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=minbase",
             "--include=ca-certificates,python3,python3-venv", "bookworm", str(archive)],
            check=True,
            timeout=500,
        )  # fmt: skip
        self("import", archive, BASE, timeout=200)
        archive.unlink()

    def wheelhouse(self, *locks: Path) -> Path:
        """Return a folder with the wheels that locks name, each checked against its hash."""
        folder = self.folder / "wheels"
        for lock in locks:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                 "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:",
                 "--dest", str(folder), "--requirement", str(lock)],
                check=True,
                timeout=500,
            )  # fmt: skip
        return folder

    def build(self, dockerfile: Path, tag: str, wheels: Path, *arguments: str) -> str:
        """Build an image without a network; return its layers' hashes and its configuration.

        Not its id: in the format that has health checks that names the steps in between, too.
        """
        self(
            "build", "--format=docker", "--pull=never", "--network=none", "--no-cache",
            f"--timestamp={EPOCH}",
            "--volume", f"{wheels}:/wheels:ro",
            "--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels",
            "--file", dockerfile, "--tag", tag, *arguments, ".",
            timeout=600,
        )  # fmt: skip
        return self("image", "inspect", "--format", "{{json .RootFS}} {{json .Config}}", tag)


def until(what: str, happened: Callable[[], Any], seconds: float = 240) -> Any:
    """Return the first true answer; AssertionError if there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = happened()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:g} s")


@contextmanager
def own_podman() -> Iterator[Podman]:
    """Yield a podman in a new folder; at the end nothing of it runs and nothing is left."""
    folder = Path(tempfile.mkdtemp(prefix="knapsack-podman-", dir="/var/tmp"))
    podman = None
    try:
        podman = Podman(folder)
        yield podman
    finally:
        if podman is not None:
            podman("pod", "rm", "--all", "--force", "--time=5", check=False)
            podman("rm", "--all", "--force", "--time=5", check=False)
            # Podman mounts the folder of its layers onto itself.
            subprocess.run(["umount", "--recursive", str(folder / "graph/overlay")], check=False)
        shutil.rmtree(folder)


def as_podman_plays(pod: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a pod template as podman 4 can play it.

    Podman knows no native sidecars (it would wait for their end) and publishes ports, for which
    it wants a network. So sidecars stand among the containers here, and whoever plays the pod
    starts them first and stops them last, as the kubelet does. Nothing else is changed.
    """
    spec = dict(pod["spec"])
    sidecars = []
    for container in spec.pop("initContainers", []):
        assert container["restartPolicy"] == "Always", "an init container that is no sidecar"
        sidecars.append({k: v for k, v in container.items() if k != "restartPolicy"})
    spec["containers"] = [
        {k: v for k, v in container.items() if k != "ports"}
        for container in [*sidecars, *spec["containers"]]
    ]
    # What absence means, said: podman 4 ends with a nil pointer where it is not.
    spec["volumes"] = [
        {**volume, "secret": {"optional": False, **volume["secret"]}}
        if "secret" in volume
        else volume
        for volume in spec["volumes"]
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": pod["metadata"]["labels"]},
        "spec": spec,
    }

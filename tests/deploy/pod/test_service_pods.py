"""Two replicas of the service, from our manifest and our image, on one real PostgreSQL."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import process_facts
from deploy_tools import DEPLOY, kustomized, tool
from podman import SCHEDULER, Podman, as_podman_plays
from postgres_server import PostgresServer, postgres  # noqa: F401

pytestmark = pytest.mark.timeout(1800)

ADMIN, TEAM = "a" * 64, "b" * 64
REPLICAS = ("replica-a", "replica-b")
PYTHON = "/opt/knapsack-rl/bin/python"


def give_secrets(
    podman: Podman, folder: Path, variables: dict[str, str], files: dict[str, dict[str, str]]
) -> None:
    """Give podman Secrets in the two forms that its version 4 reads them in.

    Those for variables as a map of base64, those for files as objects whose values are plain.
    """
    path = folder / "secret"
    for name, text in variables.items():
        path.write_text(json.dumps({"url": base64.b64encode(text.encode()).decode()}))
        podman("secret", "create", name, path)
    for name, data in files.items():
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "data": data}))
        podman("secret", "create", name, path)
    path.unlink()


@dataclass(frozen=True)
class Service:
    """Running replicas and what a client needs."""

    podman: Podman
    secrets: Path

    def client(self, replica: str, *arguments: str) -> str:
        """Run a program of the image beside a replica, as a trainer's container."""
        return self.podman(
            "run", "--rm", f"--pod={replica}", "--read-only",
            "--cap-drop=ALL", "--env=KNAPSACK_RL_OUTBOX=/outbox", "--tmpfs=/outbox:mode=1777",
            f"--volume={self.secrets}:/secrets:ro", f"--entrypoint={PYTHON}",
            SCHEDULER, *arguments,
        )  # fmt: skip

    def script(self, replica: str, text: str) -> Any:
        """Run a script there and return the JSON that it prints; None if it printed none."""
        said = self.client(replica, "-c", text)
        return json.loads(said) if said else None


def _certificate(folder: Path) -> None:
    """Make the README's certificate, by its command, for the pod's loopback as well."""
    tool("openssl")
    readme = (DEPLOY / "README.md").read_text().replace("\\\n", "")
    [command] = re.findall(r"(?m)^openssl req .*$", readme)
    words = shlex.split(command)
    assert words[-1] == "subjectAltName=DNS:knapsack-scheduler.rl.svc"
    words[-1] += ",DNS:localhost"
    subprocess.run(words, check=True, capture_output=True, timeout=60, cwd=folder)


@pytest.fixture(scope="module")
def service(
    built,
    postgres: PostgresServer,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """Both replicas, ready; the Secrets are those that the README makes."""
    podman: Podman = built.podman
    folder = tmp_path_factory.mktemp("service")
    secrets = folder / "client"
    secrets.mkdir()
    _certificate(secrets)
    (secrets / "team-token").write_text(TEAM)
    for path in (folder, secrets, secrets / "tls.crt", secrets / "team-token"):
        path.chmod(0o755)
    store = postgres.new_store()
    sockets = store.partition("host=")[2]
    Path(sockets).chmod(0o755)
    pair = {name: (secrets / name).read_text() for name in ("tls.crt", "tls.key")}
    tokens = {"tokens": f"{ADMIN} *\n{TEAM} team-a/\n", "admin-token": ADMIN}
    give_secrets(
        podman,
        folder,
        {"knapsack-scheduler-store": store},
        {"knapsack-scheduler-tls": pair, "knapsack-scheduler-tokens": tokens},
    )
    deployment = next(t for t in kustomized("service") if t["kind"] == "Deployment")
    try:
        for replica in REPLICAS:
            pod = as_podman_plays(deployment["spec"]["template"], replica)
            # A pod without a network reaches the database by its socket.
            pod["spec"]["volumes"] = [
                *pod["spec"]["volumes"],
                {"name": "database", "hostPath": {"path": sockets}},
            ]
            scheduler = pod["spec"]["containers"][0]
            scheduler["volumeMounts"] = [
                *scheduler["volumeMounts"],
                {"name": "database", "mountPath": sockets},
            ]
            file = folder / f"{replica}.yaml"
            file.write_text(yaml.safe_dump(pod))
            podman("kube", "play", "--network=none", file)
        for replica in REPLICAS:
            podman.await_serving(f"{replica}-scheduler")
        yield Service(podman, secrets)
    finally:
        for replica in REPLICAS:
            podman("pod", "rm", "--force", "--time=5", replica, check=False)
        podman("secret", "rm", "--all")


def test_a_trainer_with_a_token_is_served_and_the_other_replica_knows(service: Service) -> None:
    """What one replica was told, over TLS and with a token, the other one answers from."""
    said = service.client(
        "replica-a", "/opt/knapsack-rl/play_trainer.py", "--scheduler=localhost:50051",
        "--tls-ca=/secrets/tls.crt", "--token-file=/secrets/team-token",
        "--run=team-a/exp1", "--steps=10", "--step-seconds=0",
    )  # fmt: skip
    done = json.loads(said.splitlines()[-1])
    assert done["right"]
    counted = service.script(
        "replica-b",
        "import json\n"
        "from knapsack_trainer_client import BudgetClient, TLS\n"
        "token = open('/secrets/team-token').read()\n"
        "with BudgetClient('localhost:50051', 'team-a/exp1', token=token,"
        " tls=TLS(ca='/secrets/tls.crt')) as budget:\n"
        "    print(json.dumps(sum(p.total_rollouts for p in budget.prompt_stats())))\n",
    )
    assert counted == done["counted"]


@pytest.mark.parametrize(
    ("run", "token", "tls", "error"),
    [
        ("team-b/exp1", TEAM, True, "PERMISSION_DENIED"),
        ("team-a/exp1", "wrong", True, "UNAUTHENTICATED"),
        ("team-a/exp1", "", True, "UNAUTHENTICATED"),
        ("team-a/exp1", "", False, "UNAVAILABLE"),
    ],
)
def test_others_are_refused(service: Service, run: str, token: str, tls: bool, error: str) -> None:
    """Without TLS, without a token, or with one of another team, no call is served."""
    name = service.script(
        "replica-a",
        "import json, grpc\n"
        "from knapsack_proto.v1 import scheduler_pb2 as pb, scheduler_pb2_grpc as rpc\n"
        "ca = open('/secrets/tls.crt', 'rb').read()\n"
        "address, tls = 'localhost:50051', grpc.ssl_channel_credentials(ca)\n"
        f"channel = grpc.secure_channel(address, tls) if {tls}"
        " else grpc.insecure_channel(address)\n"
        f"metadata = [('authorization', 'Bearer {token}')] if {token!r} else []\n"
        "try:\n"
        f"    request = pb.GetRunRequest(run_id={run!r})\n"
        "    rpc.BudgetSchedulerStub(channel).GetRun(request, metadata=metadata, timeout=5)\n"
        "except grpc.RpcError as refused:\n"
        "    print(json.dumps(refused.code().name))\n",
    )
    assert name == error


def test_metrics_are_for_the_holder_of_the_admin_token(service: Service) -> None:
    """As the PodMonitor asks: with the Secret's admin-token, and not without."""
    found = service.script(
        "replica-a",
        "import json, urllib.error, urllib.request\n"
        "def ask(**headers):\n"
        "    request = urllib.request.Request('http://127.0.0.1:9464/metrics', headers=headers)\n"
        "    try:\n"
        "        return urllib.request.urlopen(request, timeout=5).status\n"
        "    except urllib.error.HTTPError as error:\n"
        "        return error.code\n"
        f"print(json.dumps([ask(), ask(Authorization='Bearer {ADMIN}'),"
        f" ask(Authorization='Bearer {TEAM}')]))\n",
    )
    assert found == [401, 200, 401]


def test_it_serves_others_and_has_no_rights(service: Service) -> None:
    """API, health and metrics are at the pod's address; the kernel says it has no rights."""
    pid = service.podman.inspect("replica-a-scheduler")["State"]["Pid"]
    assert process_facts.listening(pid) == {("0.0.0.0", port) for port in (50051, 50052, 9464)}
    status = process_facts.status(pid)
    assert (status["CapEff"], status["NoNewPrivs"]) == ("0" * 16, "1")
    assert "ro" in process_facts.mount_options(pid)["/"]
    limit, peak = process_facts.memory_limit_and_peak(pid)
    assert limit == 2 * 2**30
    assert peak < limit / 2


def test_the_password_of_the_store_is_in_no_list_of_processes(service: Service) -> None:
    """The store's URL comes by the environment."""
    pid = service.podman.inspect("replica-a-scheduler")["State"]["Pid"]
    assert b"postgresql" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_sigterm_drains(service: Service) -> None:
    """The last test of the module: both replicas end with exit code 0."""
    for replica in REPLICAS:
        service.podman("stop", "--time=40", f"{replica}-scheduler", timeout=100)
        assert service.podman.inspect(f"{replica}-scheduler")["State"]["ExitCode"] == 0

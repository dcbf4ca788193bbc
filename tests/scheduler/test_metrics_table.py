"""METRICS.md says what there is, and there is what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import grpc
import pytest
from authority import Authority

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_trainer_client import TLS, BudgetClient

from metrics_table import documented, exposed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def exposition(start_scheduler, tmp_path) -> str:
    """What a scheduler exposes after a run of two steps, a wave, a fallback and a rewind."""
    authority, cert, key = Authority(tmp_path, "ca"), tmp_path / "server.pem", tmp_path / "key"
    authority.issue_to(cert, key)
    scheduler = start_scheduler("--auto-create-runs", f"--tls-cert={cert}", f"--tls-key={key}")
    address = "localhost:" + scheduler.addresses["listen"].rsplit(":", 1)[1]
    tls = TLS(str(authority.cert))
    with BudgetClient(address, "run", timeout=60, outbox=False, tls=tls) as client:
        for step in range(2):
            first = client.allocate(["a", "b", "c"], 12, step, wave_fraction=0.5)
            client.report(first, [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], policy_version=step)
            second = client.extend(first)
            client.report(second, [[1.0] * n for n in second.num_rollouts], policy_version=step)
        client.rewind(0)
    imported = pb.ImportOutcomesRequest(
        run_id="run", request_id="i", prompt_ids=["d"], num_rewards=[1], rewards=[1.0]
    )
    trusted = grpc.ssl_channel_credentials(authority.cert.read_bytes())
    with grpc.secure_channel(address, trusted) as channel:
        rpc.BudgetSchedulerStub(channel).ImportOutcomes(iter([imported]))  # type: ignore[no-untyped-call]
    url = f"http://{scheduler.addresses['admin']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_the_table_is_what_is_exposed(exposition: str) -> None:
    """Names, types and labels, both ways."""
    table = documented(ROOT / "scheduler/METRICS.md")
    there = exposed(exposition, "knapsack_")
    assert table - there == set(), "documented, but not there"
    assert there - table == set(), "there, but not documented"


def test_promtool_has_nothing_against_the_exposition(exposition: str) -> None:
    """Names, units and help texts by the conventions of Prometheus."""
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is not installed; .ci/packages installs it")
        pytest.skip("promtool is not installed; make test-watch installs and runs it")
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=exposition,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if line]
    assert [line for line in ours if not line.startswith(("process_", "python_"))] == []

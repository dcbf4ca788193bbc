"""The real process: its first line, status codes, health, pages, security, and its end."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.config import load_settings
from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.server import secrets_of

SERVICE = "knapsack_proto.v1.BudgetScheduler"
SERVING = health_pb2.HealthCheckResponse.SERVING


def get(address: str, path: str) -> tuple[int, str]:
    """Return status and body of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def health(address: str, service: str) -> int:
    """Return what a health check answers."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def refused(*flags: str, expected: int = 2) -> str:
    """Return why a scheduler with these flags does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "knapsack_scheduler.cli", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (expected, ""), done
    assert done.stderr.startswith("knapsack-scheduler: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_calls_over_the_wire_and_their_status(start_scheduler, calls) -> None:
    """A step of training over gRPC, and one refusal of every kind with its code."""
    scheduler = start_scheduler()
    stub = scheduler.stub
    with pytest.raises(grpc.RpcError) as unknown:
        stub.Allocate(calls.allocate())
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert unknown.value.details() == "run 'run' does not exist"
    stub.CreateRun(pb.CreateRunRequest(run_id="run"))
    first = stub.Allocate(calls.allocate(request_id="x", wave_fraction=0.5))
    stub.Report(calls.report(first.allocation_id, [[1.0], [0.0]]))
    second = stub.Extend(calls.extend(first.allocation_id))
    assert first.allocated_rollouts + second.allocated_rollouts >= 8
    wrong = {
        grpc.StatusCode.INVALID_ARGUMENT: lambda: stub.Allocate(calls.allocate([], 8)),
        grpc.StatusCode.ALREADY_EXISTS: lambda: stub.Allocate(
            calls.allocate(total_rollouts=9, request_id="x")
        ),
        grpc.StatusCode.NOT_FOUND: lambda: stub.Extend(calls.extend("a-other")),
        grpc.StatusCode.FAILED_PRECONDITION: lambda: stub.Extend(
            calls.extend(stub.Allocate(calls.allocate()).allocation_id)
        ),
        # The stream of an import may not be larger than the server takes.
        grpc.StatusCode.RESOURCE_EXHAUSTED: lambda: stub.Allocate(
            calls.allocate(["x" * 1000] * 70_000, 8)
        ),
    }
    for code, call in wrong.items():
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert error.value.code() is code, error.value.details()
    parts = [
        pb.ImportOutcomesRequest(
            run_id="run", request_id="i", prompt_ids=["z"], num_rewards=[1], rewards=[1.0]
        )
    ]
    assert stub.ImportOutcomes(iter(parts)).imported_rollouts == 1
    assert stub.RewindRun(calls.rewind(-1)).total_rollouts == 1
    assert [r.run_id for r in stub.ListRuns(pb.ListRunsRequest()).runs] == ["run"]
    assert stub.ListPromptStats(pb.ListPromptStatsRequest(run_id="run")).prompt_ids == ["z"]
    stub.DeleteRun(pb.DeleteRunRequest(run_id="run"))


def test_auto_create_runs_uses_the_default_config(start_scheduler, calls, tmp_path) -> None:
    """An unknown run is created as the settings say; a refused call creates none."""
    file = tmp_path / "settings.yaml"
    file.write_text("run-defaults:\n  max_rollouts: 16\n  objective: effective\n")
    stub = start_scheduler("--auto-create-runs", "--config", str(file)).stub
    with pytest.raises(grpc.RpcError):
        stub.Allocate(calls.allocate(total_rollouts=33))
    assert not stub.ListRuns(pb.ListRunsRequest()).runs
    stub.Allocate(calls.allocate(total_rollouts=32))
    run = stub.GetRun(pb.GetRunRequest(run_id="run"))
    assert (run.config.max_rollouts, run.config.objective) == (16, "effective")


def test_health_reflection_and_pages(start_scheduler, calls) -> None:
    """Probes, grpcurl, Prometheus and a person's browser get what they ask for."""
    scheduler = start_scheduler()
    assert set(scheduler.addresses) == {"event", "listen", "admin", "health"}
    assert scheduler.addresses["event"] == "serving"
    for port in ("listen", "health"):
        for service in ("", "liveness", SERVICE):
            assert health(scheduler.addresses[port], service) == SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health(scheduler.addresses["listen"], "other")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND

    with grpc.insecure_channel(scheduler.addresses["listen"]) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        described = pool.FindServiceByName(SERVICE)
        assert {m.name for m in described.methods} >= {"Allocate", "Extend", "Report"}

    stub = scheduler.stub
    stub.CreateRun(pb.CreateRunRequest(run_id="run"))
    calls.run_id = "<b>run"
    stub.CreateRun(pb.CreateRunRequest(run_id="<b>run"))
    allocation = stub.Allocate(calls.allocate())
    stub.Report(calls.report(allocation.allocation_id, [[1.0, 0.0], [0.0]]))
    # Answered once the report is told of.
    stub.GetRun(pb.GetRunRequest(run_id=calls.run_id))
    admin = scheduler.addresses["admin"]
    assert get(admin, "/healthz") == (200, "ok\n")
    assert get(admin, "/readyz") == (200, "ok\n")
    status, page = get(admin, "/")
    assert status == 200
    assert "&lt;b&gt;run" in page
    assert "<b>run" not in page
    status, text = get(admin, "/metrics")
    samples = {
        (s.name, *(s.labels.get(label, "") for label in ("run_id", "band"))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["knapsack_scheduler_allocated_rollouts_total", "<b>run", "unseen"] == 8
    assert samples["knapsack_scheduler_reported_rollouts_total", "<b>run", ""] == 3
    assert get(admin, "/other")[0] == 404


def test_sigterm_drains_and_exits_0(start_scheduler, calls) -> None:
    """Calls under way are answered, what was answered is stored, and the exit code is 0."""
    scheduler = start_scheduler("--auto-create-runs")
    scheduler.stub.Allocate(calls.allocate())
    answers: list[Any] = []
    going = threading.Event()

    def many() -> None:
        for _ in range(2000):
            try:
                answers.append(scheduler.stub.Report(calls.own_report(["a"], [[1.0]]), timeout=20))
            except grpc.RpcError as error:
                # Once draining, new calls are turned away and not left hanging.
                answers.append(error.code())
                return
            going.set()

    caller = threading.Thread(target=many)
    caller.start()
    assert going.wait(60)
    assert scheduler.end(signal.SIGTERM) == 0
    caller.join(60)
    acknowledged = sum(isinstance(a, pb.ReportResponse) for a in answers)
    assert answers[-1] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    scheduler.start()
    stats = scheduler.stub.ListPromptStats(
        pb.ListPromptStatsRequest(run_id="run"), wait_for_ready=True
    )
    assert stats.total_rollouts[0] in (acknowledged, acknowledged + 1)


def test_a_second_scheduler_on_one_file_is_refused(start_scheduler, tmp_path) -> None:
    """It names the file and the process that holds it, and the first one serves on."""
    scheduler = start_scheduler()
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    message = refused("--store", store, "--listen", "127.0.0.1:0")
    assert "is in use by another scheduler" in message
    assert f"pid {scheduler.process.pid}" in message
    assert scheduler.stub.ListRuns(pb.ListRunsRequest()).runs == []


@pytest.mark.parametrize("key", ["listen", "admin-listen", "health-listen"])
def test_an_address_in_use_is_named(start_scheduler, tmp_path, key: str) -> None:
    """Whichever of the three sockets it is."""
    taken = start_scheduler().addresses[key.removesuffix("-listen")]
    flags = {"listen": "127.0.0.1:0", "admin-listen": "127.0.0.1:0", "health-listen": "127.0.0.1:0"}
    flags[key] = taken
    message = refused(
        "--store", f"sqlite:///{tmp_path / 'other.db'}", *(f"--{k}={v}" for k, v in flags.items())
    )
    assert f"{key.replace('-', '_')} = '{taken}': cannot be bound" in message


def test_settings_that_cannot_be_are_refused(tmp_path) -> None:
    """Each message names the key and the consequence, without a traceback."""
    assert "listen = '0.0.0.0:50051'" in refused("--listen", "0.0.0.0:50051")
    assert "--insecure" in refused("--listen", "0.0.0.0:50051")
    assert "HOST:PORT" in refused("--admin-listen", "9464")
    assert "must be given together" in refused("--tls-cert", __file__)
    assert "no such file" in refused("--token-file", str(tmp_path / "none"))
    assert "max_prompts" in refused("--max-prompts", "0")
    assert "such as sqlite:///stats.db for a file" in refused("--store", "stats.db")
    assert "postgresql://" in refused("--store", "nonsense://host/name")
    missing = tmp_path / "missing" / "stats.db"
    assert f"there is no folder {missing.parent}" in refused("--store", f"sqlite:///{missing}")
    assert not missing.parent.exists()
    folder = tmp_path / "folder.db"
    folder.mkdir()
    assert "cannot be opened" in refused("--store", f"sqlite:///{folder}")
    file = tmp_path / "bad.yaml"
    file.write_text("lisen: 127.0.0.1:1\n")
    assert "lisen" in refused("--config", str(file))
    file.write_text("run_defaults: {policy: best}\n")
    assert "run_defaults.policy = 'best'" in refused("--config", str(file))


def certificates(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """Write a self-signed certificate and its key; returns their paths."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-keyout", key, "-out", cert, "-days", "2", "-nodes", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_tokens_and_their_rotation(start_scheduler, tmp_path, calls) -> None:
    """Calls need TLS, a client certificate and a token of their run; files may change."""
    cert, key = certificates(tmp_path)
    client_cert, client_key = certificates(tmp_path, "client")
    tokens = tmp_path / "tokens"
    tokens.write_text("# token prefix\nsecret-a team-a/\nsecret-all *\n")
    scheduler = start_scheduler(
        "--auto-create-runs",
        f"--tls-cert={cert}",
        f"--tls-key={key}",
        f"--tls-client-ca={client_cert}",
        f"--token-file={tokens}",
    )
    address = "localhost:" + scheduler.addresses["listen"].rsplit(":", 1)[1]

    def call(run_id: str, token: str | None, with_certificate: bool = True) -> str:
        pair = (client_key.read_bytes(), client_cert.read_bytes()) if with_certificate else ()
        credentials = grpc.ssl_channel_credentials(cert.read_bytes(), *pair)
        calls.run_id = run_id
        with grpc.secure_channel(address, credentials) as channel:
            stub = rpc.BudgetSchedulerStub(channel)
            try:
                metadata = (("authorization", f"Bearer {token}"),) if token else ()
                stub.Allocate(calls.allocate(), metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                return error.code().name
        return "OK"

    assert call("team-a/one", "secret-a") == "OK"
    assert call("team-b/one", "secret-a") == "PERMISSION_DENIED"
    assert call("team-b/one", "secret-all") == "OK"
    assert call("team-a/one", "other") == "UNAUTHENTICATED"
    assert call("team-a/one", None) == "UNAUTHENTICATED"
    assert call("team-a/one", "secret-a", with_certificate=False) == "UNAVAILABLE"
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
        rpc.BudgetSchedulerStub(channel).ListRuns(pb.ListRunsRequest(), timeout=20)
    assert health(scheduler.addresses["health"], "") == SERVING

    tokens.write_text("fresh-token *\n")
    certificates(tmp_path)
    assert call("team-a/one", "secret-a") == "UNAUTHENTICATED"
    assert call("team-a/one", "fresh-token") == "OK"
    assert "secret-a" not in scheduler.log()
    assert "fresh-token" not in scheduler.log()


def test_logs_are_json_lines_with_the_run_and_the_call(start_scheduler, calls) -> None:
    """Every line of stderr is one JSON object; a refusal says why."""
    scheduler = start_scheduler("--auto-create-runs", "--log-level", "debug")
    scheduler.stub.Allocate(calls.allocate(request_id="fine"))
    with pytest.raises(grpc.RpcError):
        scheduler.stub.Allocate(calls.allocate([], request_id="wrong"))
    assert scheduler.end() == 0
    lines = [json.loads(line) for line in scheduler.log().splitlines()]
    assert all("time" in line and "level" in line for line in lines)
    times = [datetime.datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    about = [line for line in lines if line.get("call_id") == "wrong"]
    assert any("prompt_ids" in json.dumps(line) for line in about)
    # Where it stands when it is not ready: at its start or at its end.
    words = " ".join(line["message"] for line in lines)
    assert re.search("^ready: .*told to end: .*ended$", words)


def test_names_do_not_pass_for_lines_of_a_log_for_people(start_scheduler, calls) -> None:
    """Callers' ids hold neither the end of a line, nor terminal codes, nor fields of their own."""
    scheduler = start_scheduler("--auto-create-runs", "--log-format=text")
    for calls.run_id in ("x\n2026-01-01 00:00:00,000 ERROR   forged", "\x1b[2Jx", "x step=9"):
        for request_id in ("", "y\nforged", "\u202ez"):
            with contextlib.suppress(grpc.RpcError):
                scheduler.stub.Allocate(calls.allocate(request_id=request_id))
    assert scheduler.end() == 0
    lines = scheduler.log().split("\n")
    assert lines.pop() == ""
    ours = ("ready: ", "told to end: ", "ended")
    slow = ("call was slow", "event loop was blocked")
    lines = [line for line in lines if not line[32:].startswith(ours + slow)]
    assert len(lines) == 9
    for line in lines:
        assert re.match(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) +(call|budget) ", line
        )
        assert line.isprintable()
        assert " step=9" not in line.replace("'x step=9'", "")


def test_certificates_that_cannot_serve_are_named(tmp_path) -> None:
    """At the start and by check, before anything is loaded; not taken for a port in use."""
    cert, key = certificates(tmp_path)
    _, other_key = certificates(tmp_path, "other")
    words = tmp_path / "words"
    words.write_text("words")
    for flags, said in (
        ([f"--tls-cert={words}", f"--tls-key={key}"], "tls_cert = "),
        ([f"--tls-cert={cert}", f"--tls-key={other_key}"], "its own key"),
        (
            [f"--tls-cert={cert}", f"--tls-key={key}", f"--tls-client-ca={words}"],
            "tls_client_ca = ",
        ),
        ([f"--token-file={words}"], "line 1 must be a token and a run prefix"),
    ):
        with pytest.raises(ConfigError, match=said):
            secrets_of(load_settings(dict(flag_of(flag) for flag in flags), None))
    assert "its own key" in refused(f"--tls-cert={cert}", f"--tls-key={other_key}")
    check = [sys.executable, "-m", "knapsack_scheduler.cli", "check", f"--token-file={words}"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")


def flag_of(text: str) -> tuple[str, str]:
    """Return the name and value of a flag."""
    name, _, value = text.removeprefix("--").partition("=")
    return name.replace("-", "_"), value

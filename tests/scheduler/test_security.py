"""Who may do what, with real certificates and tokens, and where secrets must not turn up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from authority import Authority

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler.config import load_settings
from knapsack_scheduler.errors import ConfigError, Unauthenticated
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.security import Caller, TokenGuard
from knapsack_scheduler.service import SchedulerService

DENIED = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


def test_certificates_rotate_without_restart(
    start_scheduler: Callable[..., Any], tmp_path: Path
) -> None:
    """After rotation the old authority's clients are refused and the new one's are served."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    cert, key, clients = tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "clients.pem"

    def install(authority: Authority) -> None:
        pair = authority.issue("server")
        key.write_bytes(pair[0])
        cert.write_bytes(pair[1])
        clients.write_bytes(authority.cert.read_bytes())

    install(old)
    scheduler = start_scheduler(
        f"--tls-cert={cert}", f"--tls-key={key}", f"--tls-client-ca={clients}"
    )
    pid = scheduler.process.pid
    address = "localhost:" + scheduler.addresses["listen"].rsplit(":", 1)[1]

    def call(trusted: Authority, client: tuple[bytes, bytes]) -> str:
        credentials = grpc.ssl_channel_credentials(trusted.cert.read_bytes(), *client)
        with grpc.secure_channel(address, credentials) as channel:
            try:
                rpc.BudgetSchedulerStub(channel).ListRuns(pb.ListRunsRequest(), timeout=20)  # type: ignore[no-untyped-call]
            except grpc.RpcError as error:
                return error.code().name
        return "OK"

    old_client, new_client = old.issue("trainer"), new.issue("trainer")
    assert call(old, old_client) == "OK"
    assert call(old, new_client) == "UNAVAILABLE"
    install(new)
    assert call(new, new_client) == "OK"
    assert call(new, old_client) == "UNAVAILABLE"
    assert call(old, new_client) == "UNAVAILABLE"
    # A pair that does not fit, as while the two files are written, leaves what there was.
    key.write_bytes(old.issue("server")[0])
    assert call(new, new_client) == "OK"
    assert call(new, new_client) == "OK"
    assert scheduler.log().count("certificates cannot be used, the old ones stay") == 1
    # One of the files away for a moment: what else changed meanwhile is not forgotten.
    aside = tmp_path / "aside"
    clients.rename(aside)
    pair = old.issue("server")
    key.write_bytes(pair[0])
    cert.write_bytes(pair[1])
    assert call(new, new_client) == "OK"
    aside.rename(clients)
    assert call(old, new_client) == "OK"
    expired = new.issue("trainer", days="-1")
    assert call(old, expired) == "UNAVAILABLE"
    assert scheduler.process.pid == pid
    assert scheduler.process.poll() is None


def every_call(run_id: str) -> dict[str, Any]:
    """Return a request of every method that names a run."""
    return {
        "CreateRun": pb.CreateRunRequest(run_id=run_id),
        "GetRun": pb.GetRunRequest(run_id=run_id),
        "Allocate": pb.AllocateRequest(
            run_id=run_id, request_id="a", prompt_ids=["p"], total_rollouts=8
        ),
        "Extend": pb.ExtendRequest(run_id=run_id, allocation_id="none", request_id="e"),
        "Report": pb.ReportRequest(run_id=run_id, report_id="r", prompt_ids=["p"]),
        "RewindRun": pb.RewindRunRequest(run_id=run_id, step=3),
        "ListPromptStats": pb.ListPromptStatsRequest(run_id=run_id),
        "DeleteRun": pb.DeleteRunRequest(run_id=run_id),
    }


@pytest.fixture
def guarded(start_scheduler: Callable[..., Any], tmp_path: Path) -> Any:
    """A scheduler with a token for the runs of team a, and one for every run."""
    tokens = tmp_path / "tokens"
    tokens.write_text("token-of-a team-a/\ntoken-of-all *\n")
    return start_scheduler("--auto-create-runs", f"--token-file={tokens}", "--log-level=debug")


def code(call: Any) -> grpc.StatusCode:
    """Return the status of a call."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


def test_a_token_is_good_for_its_runs_in_every_method(guarded: Any) -> None:
    """Without a token, with an unknown one, for others' runs: refused; never for its own."""
    mine = (("authorization", "Bearer token-of-a"),)
    stub = guarded.stub
    for method, request in every_call("team-b/x").items():
        ask = getattr(stub, method)
        assert code(lambda: ask(request)) is UNKNOWN, method  # noqa: B023
        wrong = (("authorization", "Bearer token-of-"),)
        assert code(lambda: ask(request, metadata=wrong)) is UNKNOWN, method  # noqa: B023
        assert code(lambda: ask(request, metadata=mine)) is DENIED, method  # noqa: B023
    for method, request in every_call("team-a/x").items():
        ask = getattr(stub, method)
        refused = code(lambda: ask(request, metadata=mine))  # noqa: B023
        assert refused not in (DENIED, UNKNOWN), method
    # Whose name is short in the refusal and in the log, however long it is in the call.
    before = len(guarded.log())
    long = pb.GetRunRequest(run_id="team-b/" + "x" * 2**20)
    with pytest.raises(grpc.RpcError) as refused_long:
        stub.GetRun(long, metadata=mine)
    assert refused_long.value.code() is DENIED
    assert len(refused_long.value.details()) < 300
    assert len(guarded.log()) - before < 2000
    parts = [
        pb.ImportOutcomesRequest(
            run_id="team-b/x", request_id="i", prompt_ids=["p"], num_rewards=[1], rewards=[1.0]
        )
    ]
    assert code(lambda: stub.ImportOutcomes(iter(parts))) is UNKNOWN
    assert code(lambda: stub.ImportOutcomes(iter(parts), metadata=mine)) is DENIED
    # Later messages need not name the run again, and may not name another.
    parts[0].run_id = "team-a/x"
    parts.append(pb.ImportOutcomesRequest(prompt_ids=["q"], num_rewards=[1], rewards=[0.0]))
    assert stub.ImportOutcomes(iter(parts), metadata=mine).imported_prompts == 2
    parts[1].run_id, parts[0].request_id = "team-b/x", "j"
    code_of_other = code(lambda: stub.ImportOutcomes(iter(parts), metadata=mine))
    assert code_of_other is grpc.StatusCode.INVALID_ARGUMENT


def test_runs_are_listed_to_those_who_may_see_them(guarded: Any) -> None:
    """In pages too: a token's pages hold its runs and tell nothing of others."""
    everything = (("authorization", "Bearer token-of-all"),)
    mine = (("authorization", "Bearer token-of-a"),)
    names = [f"team-{team}/{i}" for i in range(3) for team in "ab"]
    for name in names:
        guarded.stub.CreateRun(pb.CreateRunRequest(run_id=name), metadata=everything)

    def listed(metadata: Any, size: int) -> list[str]:
        found, token = [], ""
        while True:
            page = guarded.stub.ListRuns(
                pb.ListRunsRequest(page_size=size, page_token=token), metadata=metadata
            )
            assert len(page.runs) <= size
            found += [run.run_id for run in page.runs]
            token = page.next_page_token
            if not token:
                return found

    for size in (1, 2, 100):
        assert listed(everything, size) == sorted(names)
        assert listed(mine, size) == [f"team-a/{i}" for i in range(3)]
    assert code(lambda: guarded.stub.ListRuns(pb.ListRunsRequest())) is UNKNOWN


def test_the_admin_port_asks_for_a_token_of_every_run(guarded: Any) -> None:
    """As Prometheus sends it or as a browser does; probes need none."""

    def status(path: str, authorization: str = "") -> int:
        request = urllib.request.Request(f"http://{guarded.addresses['admin']}{path}")
        if authorization:
            request.add_header("Authorization", authorization)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    password = b64encode(b"anybody:token-of-all").decode()
    for path in ("/", "/metrics"):
        assert status(path) == 401
        assert status(path, "Bearer token-of-a") == 401
        assert status(path, "Bearer other") == 401
        assert status(path, "Basic !") == 401
        assert status(path, "Bearer token-of-all") == 200
        assert status(path, f"Basic {password}") == 200
    assert (status("/healthz"), status("/readyz")) == (200, 200)


def test_a_token_in_a_malformed_request_is_in_no_log(guarded: Any) -> None:
    """As of a token file whose lines end in carriage returns; the refusal itself is there."""
    host, port = guarded.addresses["admin"].rsplit(":", 1)
    for line in (
        "Authorization: Bearer token-of-all\r\x01",
        "Authorization : Bearer token-of-all",
        "Authorization: Bearer token-of-all" + 9000 * "a",
        "token-of-all",
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            request = f"GET /metrics HTTP/1.1\r\nHost: here\r\n{line}\r\n\r\n"
            connection.sendall(request.encode())
            assert connection.recv(100).startswith(b"HTTP/1.0 400 ")
            # Said before the connection is closed.
            while connection.recv(10_000):
                pass
    assert guarded.log().count("a malformed HTTP request was refused") == 4
    assert "token-of-all" not in guarded.log()


def test_secrets_are_in_no_log_and_no_message(
    guarded: Any, tmp_path: Path, start_scheduler: Callable[..., Any]
) -> None:
    """Neither tokens, known or not, nor the password of the store's URL."""
    for token in ("token-of-a", "token-of-all", "guess-of-mine"):
        metadata = (("authorization", f"Bearer {token}"),)
        for request in (pb.GetRunRequest(run_id="team-b/x"), pb.GetRunRequest(run_id="\n")):
            with pytest.raises(grpc.RpcError) as error:
                guarded.stub.GetRun(request, metadata=metadata)
            assert token not in str(error.value)
    log = guarded.log()
    assert '"UNAUTHENTICATED"' in log
    for secret in ("token-of-", "guess-of-mine"):
        assert secret not in log
    assert "can be read by every user" in log

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "knapsack_scheduler.cli", *words], capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        return done.stdout + done.stderr

    password = "hunter2"
    urls = [
        f"nonsense://user:{password}@host/name",
        f"sqlite://user:{password}@host/nowhere/stats.db",
        f"postgresql+nodriver://user:{password}@host/name",
    ]
    commands = [["check"], ["migrate"], ["export", "--run", "r"]]
    for command, url in [*((["serve"], url) for url in urls), *((c, urls[0]) for c in commands)]:
        said = run(*command, "--store", url)
        assert said, command
        assert password not in said, (command, said)
    for key in ("password", "sslpassword"):
        url = f"postgresql://user@127.0.0.1:1/name?{key}={password}"
        with pytest.raises(ConfigError) as refused:
            load_settings({"store": url, "insecure": True}, None)
        assert password not in str(refused.value)


def test_what_others_can_reach_must_be_guarded(tmp_path: Path) -> None:
    """Safe by default: plaintext, and TLS for anybody, need an explicit flag."""
    tokens, cert = tmp_path / "tokens", tmp_path / "cert"
    tokens.write_text("t *\n")
    cert.write_text("")

    def said(*flags: str) -> str:
        given: dict[str, Any] = {}
        for flag in flags:
            name, _, value = flag.removeprefix("--").partition("=")
            given[name.replace("-", "_")] = value or True
        try:
            load_settings(given, None)
        except ConfigError as error:
            return str(error)
        return ""

    outside, tls = "--listen=0.0.0.0:1", (f"--tls-cert={cert}", f"--tls-key={cert}")
    assert "without tls_cert" in said(outside)
    assert "without tls_cert" in said(outside, f"--token-file={tokens}")
    assert "without tls_client_ca or token_file" in said(outside, *tls)
    assert "without token_file" in said("--admin-listen=0.0.0.0:1")
    for fine in (
        (outside, *tls, f"--token-file={tokens}"),
        (outside, *tls, f"--tls-client-ca={cert}"),
        (outside, "--insecure"),
        ("--admin-listen=0.0.0.0:1", f"--token-file={tokens}"),
        ("--health-listen=0.0.0.0:1",),
    ):
        assert said(*fine) == ""


def test_a_token_file_that_cannot_be_read_leaves_the_old_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; and a file in place of another is read, though its time and size are the same."""
    file, other = tmp_path / "tokens", tmp_path / "other"
    file.write_text("old-token *\n")
    guard = TokenGuard(file)
    for broken in (
        b"old-token team-a/ team-b/\n",
        b"",
        b"new *\n\0\0 \0\n",
        b"old-\xfftoken *\n",
        None,
    ):
        file.unlink()
        if broken is not None:
            file.write_bytes(broken)
        caplog.clear()
        for _ in range(3):
            assert guard.bearer("old-token").is_everywhere
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "old-token" not in caplog.text
        file.touch()
    file.write_text("old-token *\n")
    assert guard.bearer("old-token").is_everywhere
    other.write_text("new-token *\n")
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    assert guard.bearer("new-token").is_everywhere
    with pytest.raises(Unauthenticated):
        guard.bearer("old-token")


async def test_runs_of_others_are_passed_over_in_few_queries(
    service: SchedulerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pages are of a caller who may see one run of hundreds."""
    for number in range(300):
        await service.create_run(pb.CreateRunRequest(run_id=f"others/{number:03d}"))
    await service.create_run(pb.CreateRunRequest(run_id="team-a/x"))
    queries = []
    ask = Journal.list_runs

    def counted(journal: Journal, *arguments: Any) -> Any:
        queries.append(arguments)
        return ask(journal, *arguments)

    monkeypatch.setattr(Journal, "list_runs", counted)
    request = pb.ListRunsRequest(page_size=1)
    page = await service.list_runs(request, Caller(("team-a/",)).covers)
    assert [run.run_id for run in page.runs] == ["team-a/x"]
    assert len(queries) <= 2

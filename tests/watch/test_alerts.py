"""Every alert fires for its real cause, and reaches whom it is for through a real Alertmanager.

Each scenario brings a cause about on real programs, until the test is over. The rules are the
shipped ones with times shortened, see ``rules.shortened``; the routes are the shipped ones
with addresses and waits replaced.
"""

from __future__ import annotations

import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from authority import Authority

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_trainer_client import BudgetClient, KnapsackError, RolloutClient

import rules
from programs import (
    ROOT,
    Alertmanager,
    Program,
    Prometheus,
    Webhook,
    generator,
    get_json,
    scheduler,
    wait_until,
)

SECONDS = 45
"""Of every range in the rules."""


class Stage:
    """What the scenarios play on.

    Attributes:
        folder: for stores and outboxes.
        over: set when all has been seen.
        fired: names of the alerts that have reached the webhook.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.over = threading.Event()
        self.fired: set[str] = set()

    def until(self, *alerts: str) -> Iterator[int]:
        """Count up, with a pause between two numbers, until these have fired."""
        number = 0
        while not self.over.is_set() and not self.fired >= set(alerts):
            yield number
            number += 1
            self.over.wait(0.5)


def client_of(program: Program, run: str, stage: Stage, **more: Any) -> BudgetClient:
    """Return a client of a scheduler."""
    more = {"outbox": stage.folder / f"{run}.outbox", "timeout": 10} | more
    return BudgetClient(program.addresses["listen"], run, **more)


def stub_of(program: Program) -> Any:
    """Return a bare stub: for calls that the client would not make."""
    channel = grpc.insecure_channel(program.addresses["listen"])
    return rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]


def sick_runs(program: Program, stage: Stage) -> None:
    """One run each that teaches nothing, is misjudged, mute, haunted, too tight, or jumping."""
    random = np.random.default_rng(0)
    ids = [f"prompt-{n}" for n in range(100)]
    with (
        client_of(program, "flat", stage) as flat,
        client_of(program, "misjudged", stage) as misjudged,
        client_of(program, "mute", stage) as mute,
        client_of(program, "haunted", stage) as haunted,
        client_of(program, "tight", stage) as tight,
        client_of(program, "jumping", stage) as jumping,
    ):
        wanted = ("KnapsackNothingTeaches", "KnapsackPredictionsOff", "KnapsackNothingReported",
                  "KnapsackReportsIgnored", "KnapsackBudgetUnallocated",
                  "KnapsackStepJumped")  # fmt: skip
        for step in stage.until(*wanted):
            given = flat.allocate(ids, 400, step)
            flat.report(given, [[1.0] * n for n in given.num_rollouts])
            # Half of the groups succeed as one, so that each seems to be a toss of a coin.
            given = misjudged.allocate(ids, 400, step)
            tossed = random.random(100) < 0.5
            rewards = [[float(t)] * n for t, n in zip(tossed, given.num_rollouts, strict=True)]
            misjudged.report(given, rewards)
            mute.allocate(ids, 400, step)
            lost = haunted.allocate(["a", "b"], 8, 5 + step)
            haunted.rewind(4)
            haunted.report(lost, [[1.0], [0.0]])
            tight.allocate(["a", "b"], 100, step, max_rollouts=4, allow_partial=True)
            jumping.allocate(["a", "b"], 8, 2000 * step)


def wrong_calls(program: Program, stage: Stage) -> None:
    """A trainer whose every call is refused, and an import with a message that is too large."""
    stub = stub_of(program)
    for number in stage.until("KnapsackCallsRefused", "KnapsackOverloaded"):
        with suppress(grpc.RpcError):
            stub.Allocate(pb.AllocateRequest(run_id="wrong", request_id=f"{number}"))
        large = pb.ImportOutcomesRequest(
            run_id="wrong", request_id="i", prompt_ids=["p"], num_rewards=[3_000_000],
            rewards=[1.0] * 3_000_000,
        )  # fmt: skip
        with suppress(grpc.RpcError):
            stub.ImportOutcomes(iter([large]))


def halting(program: Program, stage: Stage) -> None:
    """A scheduler that gets no processor for a second and a half, again and again."""
    with client_of(program, "halted", stage, timeout=0.5) as client:
        client.allocate(["a", "b"], 8, 0)
        for step in stage.until("KnapsackEventLoopBlocked", "KnapsackFallbacks"):
            given = client.allocate(["a", "b"], 8, 2 * step)
            client.report(given, [[1.0] * n for n in given.num_rollouts])
            program.send(signal.SIGSTOP)
            time.sleep(0.8)
            # What the client divides meanwhile it reports when it can.
            given = client.allocate(["a", "b"], 8, 2 * step + 1)
            client.report(given, [[1.0] * n for n in given.num_rollouts])
            time.sleep(0.3)
            program.send(signal.SIGCONT)
            client.flush(5)


def locked_store(program: Program, stage: Stage) -> None:
    """Another program that holds the store's lock for a second, then for longer than is waited."""
    stub = stub_of(program)

    def calls() -> None:
        for step in stage.until("KnapsackStoreSlow", "KnapsackAnswersSlow", "KnapsackStoreFailing"):
            with suppress(grpc.RpcError):
                request = pb.AllocateRequest(
                    run_id="locked", request_id=f"{step}", step=step, prompt_ids=["a", "b"],
                    total_rollouts=8,
                )  # fmt: skip
                stub.Allocate(request, timeout=20)

    calling = threading.Thread(target=calls)
    calling.start()
    with closing(sqlite3.connect(stage.folder / "locked.db", isolation_level=None)) as other:
        slow, failing = ("KnapsackStoreSlow", "KnapsackAnswersSlow"), ("KnapsackStoreFailing",)
        for seconds, alerts in ((1.5, slow), (8, failing)):
            for _ in stage.until(*alerts):
                other.execute("BEGIN IMMEDIATE")
                stage.over.wait(seconds)
                other.execute("ROLLBACK")
    calling.join()


def damaged_store(program: Program, stage: Stage) -> None:
    """A store whose snapshots are refused, and one run of which cannot be read."""
    stub = stub_of(program)

    def report(run: str, number: int) -> None:
        stub.Report(
            pb.ReportRequest(
                run_id=run, report_id=f"{number}", step=number, prompt_ids=["a"],
                prompt_indices=[0], num_rewards=[1], rewards=[1.0],
            )
        )  # fmt: skip

    report("snapped", 0)
    report("broken", 0)
    with closing(sqlite3.connect(stage.folder / "damaged.db", timeout=20)) as other:
        other.execute(
            "CREATE TRIGGER no_snapshots BEFORE INSERT ON snapshot_parts "
            "BEGIN SELECT RAISE(ABORT, 'no snapshots today'); END"
        )
        # Without a checksum, as of an older scheduler: with one the run would be refused.
        other.execute(
            "UPDATE runs SET config = x'ffffffff', checksum = NULL WHERE run_id = 'broken'"
        )
        other.commit()
    program.end(signal.SIGTERM)
    program.start()
    stub = stub_of(program)
    number = 1
    for _ in stage.until("KnapsackSnapshotsFailing", "KnapsackCallsFailing"):
        for _ in range(60):
            report("snapped", number)
            number += 1
        with suppress(grpc.RpcError):
            report("broken", number)


def runs_in_turn(program: Program, stage: Stage) -> None:
    """Two runs that are trained at once and do not fit into memory together."""
    with client_of(program, "one", stage) as one, client_of(program, "other", stage) as other:
        for step in stage.until("KnapsackRunsReadAgain"):
            for client in (one, other):
                client.allocate(["a", "b"], 8, step)


def stuck_reports(program: Program, stage: Stage) -> None:
    """A run whose report is larger than its scheduler's limit, and waits for ever."""
    ids = [f"prompt-{n}" for n in range(15_000)]
    with client_of(program, "stuck", stage) as client:
        given = client.allocate(ids, 128 * 15_000, 0)
        # 4 bytes of a reward and 5 of a length, 128 of each for every prompt: over 16 MiB.
        flat = [1.0] * given.allocated_rollouts
        client.report(given, flat, completion_tokens=[2**30] * len(flat))
        for step in stage.until("KnapsackReportsWaiting"):
            client.allocate(["a", "b"], 8, step)


def end_of_a_scheduler(program: Program, stage: Stage) -> None:
    """One that turns callers away, is started again and again, hangs as it drains, and is gone."""
    stub = stub_of(program)
    for _ in stage.until("KnapsackAccessDenied"):
        with suppress(grpc.RpcError):
            stub.GetRun(pb.GetRunRequest(run_id="anybody's"))
    for _ in stage.until("KnapsackSchedulerRestarts"):
        program.end(signal.SIGTERM)
        program.start()
        stage.over.wait(3)
    channel = grpc.insecure_channel(program.addresses["listen"])
    stub = rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]
    sent = threading.Event()

    def endless() -> Iterator[pb.ImportOutcomesRequest]:
        yield pb.ImportOutcomesRequest(
            run_id="slow", request_id="i", prompt_ids=["p"], num_rewards=[1], rewards=[1.0]
        )
        sent.set()
        stage.over.wait(900)

    pending = stub.ImportOutcomes.future(endless(), metadata=(("authorization", "Bearer secret"),))
    assert sent.wait(60)
    # On the same connection, so the call that is to hang has come before it.
    with suppress(grpc.RpcError):
        stub.GetRun(pb.GetRunRequest(run_id="slow"), metadata=(("authorization", "Bearer secret"),))
    program.send(signal.SIGTERM)
    for _ in stage.until("KnapsackSchedulerNotReady"):
        pass
    program.end()
    pending.cancel()
    channel.close()


def ending_certificate(_: Program, stage: Stage) -> None:
    """A scheduler whose certificate was not replaced."""
    for _ in stage.until("KnapsackCertificateEnds"):
        pass


def failing_generation(program: Program, stage: Stage) -> None:
    """A generation server one rollout in eight of which fails, and whose weights are not there."""
    client = RolloutClient(program.addresses["listen"])
    wanted = ("KnapsackGenerationFailing", "KnapsackWeightUpdatesFailing")
    for number in stage.until(*wanted):
        client.generate([[1, 2, 3]] * 4, [8] * 4, max_tokens=4, seed=number)
        with suppress(KnapsackError):
            client.update_weights(stage.folder / "nothing", number + 1)
    program.end()


def stalled_generation(program: Program, stage: Stage) -> None:
    """A generation server whose rollouts never finish."""
    client = RolloutClient(program.addresses["listen"])
    cancels: list[Callable[[], object]] = []

    def ask() -> None:
        with suppress(KnapsackError):
            client.generate([[1, 2, 3]] * 4, [8] * 4, max_tokens=4, on_call=cancels.append)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in stage.until("KnapsackGenerationStalled"):
        pass
    for cancel in cancels:
        cancel()
    program.end()
    asking.join()


def missing_replicas(program: Program, stage: Stage) -> None:
    """A generation server one of whose two replicas never starts; in the end neither does."""
    for _ in stage.until("KnapsackReplicasMissing"):
        pass
    program.send(signal.SIGUSR1)
    for _ in stage.until("KnapsackNoReplica"):
        pass
    program.end()


Scenario = Callable[[Program, Stage], None]
SCHEDULERS: dict[str, tuple[Sequence[Scenario], Sequence[str]]] = {
    "sick": ((sick_runs, wrong_calls), ()),
    "halting": ((halting,), ()),
    "locked": ((locked_store,), ()),
    "damaged": ((damaged_store,), ()),
    "crowded": ((runs_in_turn,), ("--max-loaded-bytes=1000",)),
    "stuck": ((stuck_reports,), ("--max-message-bytes=16777216",)),
    "certified": ((ending_certificate,), ("--tls-cert=CERT", "--tls-key=KEY")),
    "ending": ((end_of_a_scheduler,), ("--token-file=TOKENS", "--drain-seconds=900")),
}
GENERATORS: dict[str, tuple[Scenario, Sequence[str]]] = {
    "failing": (failing_generation, ("--fail-every=8",)),
    "stalled": (stalled_generation, ("--hold",)),
    "shrunken": (missing_replicas, ("--missing",)),
}


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    """Who is told."""
    opened = Webhook()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Where it happens."""
    return Stage(tmp_path_factory.mktemp("alerts"))


def routes(webhook: Webhook, folder: Path) -> Path:
    """Return the shipped routes, to the webhook and without waiting."""
    text = (ROOT / "deploy/alertmanager/alertmanager.yaml").read_text()
    text = re.sub(r"http://([\w-]+)\.invalid/", rf"{webhook.url}/\1", text)
    text, waits = re.subn(r"(group_wait|group_interval): \w+", r"\1: 1s", text)
    assert waits == 3
    file = folder / "alertmanager.yaml"
    file.write_text(text)
    return file


@pytest.mark.timeout(1500)
def test_every_alert_fires_for_its_cause(
    begin: Callable[[Program], Program], stage: Stage, webhook: Webhook
) -> None:
    """Each has reached the receiver of its severity, with its labels."""
    tokens = stage.folder / "tokens"
    tokens.write_text("secret *\n")
    tokens.chmod(0o600)
    cert, key = stage.folder / "server.pem", stage.folder / "server.key"
    Authority(stage.folder, "ca").issue_to(cert, key)
    words = {"TOKENS": str(tokens), "CERT": str(cert), "KEY": str(key)}
    playing: list[tuple[Scenario, Program]] = []
    for name, (scenarios, flags) in SCHEDULERS.items():
        flags = [re.sub("[A-Z]+", lambda found: words[found[0]], flag) for flag in flags]
        program = begin(scheduler(name, stage.folder, *flags))
        playing += [(scenario, program) for scenario in scenarios]
    for name, (scenario, flags) in GENERATORS.items():
        playing.append((scenario, begin(generator(name, stage.folder, *flags))))
    short = stage.folder / "rules.yaml"
    short.write_text(rules.shortened(SECONDS))
    alerting = Alertmanager(stage.folder / "alertmanager", routes(webhook, stage.folder))
    begin(alerting)
    targets = {
        f"knapsack-{kind}-{program.name}": program.addresses["admin"]
        for kind, names in (("scheduler", SCHEDULERS), ("genserver", GENERATORS))
        for _, program in playing
        if program.name in names
    }
    watching = Prometheus(
        stage.folder / "prometheus", targets, [short], alerting.address,
        credentials=tokens.read_text().split()[0],
    )  # fmt: skip
    begin(watching)

    failures: list[BaseException] = []

    def play(scenario: Scenario, program: Program) -> None:
        try:
            scenario(program, stage)
        except BaseException as error:
            if not stage.over.is_set():
                failures.append(error)

    threads = [threading.Thread(target=play, args=each, daemon=True) for each in playing]
    for thread in threads:
        thread.start()
    wanted = set(rules.alerts())

    def all_fired() -> bool:
        assert not failures, failures
        stage.fired.update(alert["labels"]["alertname"] for _, alert in webhook.received)
        return stage.fired >= wanted

    try:
        wait_until(all_fired, "every alert has fired", 900)
    except AssertionError as error:
        missing = sorted(wanted - stage.fired)
        states = get_json(f"{watching.url}/api/v1/rules")["data"]["groups"]
        bad = [r.get("lastError") for g in states for r in g["rules"] if r.get("lastError")]
        raise AssertionError(f"{missing} did not fire; {bad}") from error
    finally:
        stage.over.set()
        for thread in threads:
            thread.join(60)
    _check_received(webhook)


def _check_received(webhook: Webhook) -> None:
    """Pages went to whom is on call and tickets to whom reads them; each names its object."""
    receivers = {"page": "/on-call", "ticket": "/tickets"}
    for name, alert in rules.alerts().items():
        got = [(path, a) for path, a in webhook.received if a["labels"]["alertname"] == name]
        assert {path for path, _ in got} == {receivers[alert["labels"]["severity"]]}, name
        for _, each in got:
            labels = each["labels"]
            assert "run_id" in labels or "instance" in labels or "job" in labels, labels
            for text in each["annotations"].values():
                assert "<no value>" not in text, text
    runs = {(a["labels"]["alertname"], a["labels"].get("run_id")) for _, a in webhook.received}
    assert {
        ("KnapsackNothingReported", "mute"),
        ("KnapsackReportsIgnored", "haunted"),
        ("KnapsackBudgetUnallocated", "tight"),
        ("KnapsackFallbacks", "halted"),
        ("KnapsackNothingTeaches", "flat"),
        ("KnapsackPredictionsOff", "misjudged"),
        ("KnapsackStepJumped", "jumping"),
    } <= runs
    assert ("KnapsackNothingReported", "flat") not in runs
    # Whose client is paused has reports that wait, too.
    waiting = {run for alert, run in runs if alert == "KnapsackReportsWaiting"}
    assert waiting <= {"stuck", "halted"}

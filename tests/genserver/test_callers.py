"""Callers that die, leave, ask for too much or do not read: real processes, real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.metrics import Load, Metrics
from knapsack_genserver.server import Server, ServerOptions
from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc
from knapsack_trainer_client import (
    AsyncRolloutClient,
    GeneratorBusy,
    GeneratorUnavailable,
    InvalidRequest,
    RolloutClient,
)

CALLER = """
import sys
from knapsack_trainer_client import RolloutClient
with RolloutClient(sys.argv[1]) as client:
    for rollout in client.stream([[1]] * 9, [10_000] * 9, max_tokens=200):
        print("came", flush=True)
"""


def levels(generator: Any) -> dict[str, float]:
    """Return the server's metrics by name, summed over labels."""
    with urllib.request.urlopen(f"http://{generator.addresses['admin']}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("knapsack_genserver_")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again, for two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_caller_that_is_killed_frees_the_engine(start_generator: Any) -> None:
    """kill -9 amid 10,000 rollouts of each of its prompts; others are served before and after."""
    generator = start_generator("--engine=fake")
    address = generator.addresses["listen"]
    caller = subprocess.Popen([sys.executable, "-c", CALLER, address], stdout=subprocess.PIPE)
    assert caller.stdout is not None
    assert caller.stdout.readline() == b"came\n"
    with RolloutClient(address) as client:
        assert [len(group) for group in client.generate([[2], [3]], [5, 9], max_tokens=8)] == [5, 9]
        assert client.status().waiting_rollouts > 5000
        caller.send_signal(signal.SIGKILL)
        caller.wait(30)
        caller.stdout.close()
        until(lambda: client.status().waiting_rollouts + client.status().running_rollouts == 0)
        assert len(client.generate([[2]], [5], max_tokens=8)[0]) == 5
    found = levels(generator)
    assert found["rollouts_given_up_total"] > 5000
    assert found["calls_under_way"] == found["unread_rollouts"] == 0


class Wire:
    """Connects callers to a server until it is cut: then whatever either side sends is lost.

    As a machine that has vanished: no connection is closed, and no question answered.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self.is_cut = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._sockets += [caller, server]
                for ends in ((caller, server), (server, caller)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.is_cut.is_set():
                    target.sendall(data)

    def close(self) -> None:
        """Close everything."""
        for each in self._sockets:
            each.close()


def test_a_caller_that_has_vanished_is_noticed(start_generator: Any) -> None:
    """Nothing is closed and nothing comes any more; the server asks, and ends the work."""
    generator = start_generator("--engine=fake", "--keepalive-seconds=1")
    wire = Wire(generator.addresses["listen"])
    caller = subprocess.Popen([sys.executable, "-c", CALLER, wire.address], stdout=subprocess.PIPE)
    assert caller.stdout is not None
    try:
        assert caller.stdout.readline() == b"came\n"
        wire.is_cut.set()
        until(lambda: levels(generator)["calls_under_way"] == 0)
        found = levels(generator)
        assert found["waiting_rollouts"] == 0
        assert found["rollouts_given_up_total"] > 100
    finally:
        caller.kill()
        caller.wait(30)
        caller.stdout.close()
        wire.close()


def test_a_caller_that_does_not_read_costs_little_memory(start_generator: Any) -> None:
    """Its finished rollouts stay below the limit, and others are served meanwhile."""
    generator = start_generator("--engine=fake", "--max-unread-rollouts=300")
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1]))],
        num_rollouts=[100_000],
        sampling=pb.SamplingParams(max_tokens=200, stop_token_ids=[]),
    )
    with (
        grpc.insecure_channel(generator.addresses["listen"]) as channel,
        RolloutClient(generator.addresses["listen"]) as client,
    ):
        call = rpc.RolloutGeneratorStub(channel).Generate(request)
        next(iter(call))
        until(lambda: levels(generator)["unread_rollouts"] >= 300)
        for _ in range(3):
            assert len(client.generate([[2]], [200], max_tokens=5)[0]) == 200
            found = levels(generator)
            # What the engine had been given when it was reached may still have come.
            assert found["unread_rollouts"] <= 300 + found["capacity_rollouts"] + 32
            assert found["waiting_rollouts"] > 50_000
        call.cancel()
        until(lambda: levels(generator)["calls_under_way"] == 0)
    assert levels(generator)["unread_rollouts"] == 0


def test_too_much_is_refused_with_the_flag_that_allows_it(start_generator: Any) -> None:
    """A million rollouts, 10,000 of a prompt, many calls, prompts that are too long."""
    generator = start_generator(
        "--engine=fake", "--max-call-rollouts=20000", "--max-group-rollouts=9999",
        "--max-calls=1", "--max-prompt-tokens=1000", "--max-prompts=50",
    )  # fmt: skip
    with RolloutClient(generator.addresses["listen"]) as client:
        for prompts, sizes, kind, message in (
            ([[1]], [10_000], InvalidRequest, "from 0 to 9999"),
            ([[1]] * 3, [9000] * 3, InvalidRequest, "max_call_rollouts"),
            ([[1] * 600] * 2, [1, 1], GeneratorBusy, "max_prompt_tokens"),
            ([[1]] * 51, [1] * 51, InvalidRequest, "at most 50"),
            ([[64]], [1], InvalidRequest, "from 0 to 63"),
        ):
            with pytest.raises(kind, match=message):
                client.generate(prompts, sizes, max_tokens=4)
        with client.session(max_tokens=4), pytest.raises(GeneratorBusy, match="max_calls"):
            client.generate([[1]], [1], max_tokens=4)
        assert len(client.generate([[1]], [9999], max_tokens=1)[0]) == 9999


def test_waves_are_parts_of_one_group(start_generator: Any, model_folder: Path) -> None:
    """Rollout k is the same in whichever wave it is asked for; stopped ones are named."""
    generator = start_generator(f"--model={model_folder}", "--max-batch-rollouts=16", "--threads=1")
    prompts = [[1, 2], [3], [4, 5, 6]]
    with RolloutClient(generator.addresses["listen"]) as client:
        whole = client.generate(prompts, [12, 5, 40], max_tokens=6, seed=8)
        with client.session(max_tokens=6, seed=8, request_id="step-8") as session:
            session.add([4, 0, 9], prompts, expected_tokens=[6, 0, 2], prompt_ids=["a", "b", "c"])
            first = session.collect()
            assert [len(group) for group in first] == [4, 0, 9]
            session.add([8, 5], prompt_indices=[0, 1])
            came = [(r.prompt_index, r.rollout_index) for r in session]
            assert len(came) == 13
            session.add([0, 0, 31])
            second = session.collect()
            assert [len(group) for group in second] == [8, 5, 31]
            tokens = [[r.token_ids for r in group] for group in session.groups]
            assert tokens == [[r.token_ids for r in group] for group in whole]

            with pytest.raises(InvalidRequest, match=r"add\.prompt_indices\[0\] = 3"):
                session.add([1], prompt_indices=[3])
            with pytest.raises(InvalidRequest, match=r"stop\.prompt_indices\[0\] = 7"):
                session.stop([7])
            session.add([0, 20_000, 2])
            seen = 0
            for rollout in session:
                seen += rollout.prompt_index == 1
                if seen == 10 and not session.groups.stopped:
                    stopped = session.stop([1])
                    assert stopped > 15_000
            assert session.outstanding == 0
            last = session.collect()
            assert len(last[1]) + len(last.stopped) == 20_000
            indices = [r.rollout_index for r in session.groups[1]]
            assert sorted(indices + [k for _, k in last.stopped]) == list(range(20_005))
            # It goes on after the stop, with the next numbers.
            session.add([0, 3, 0])
            assert [r.rollout_index for r in session.collect()[1]] == [20_005, 20_006, 20_007]
    assert generator.end() == 0
    waves = [json.loads(line) for line in generator.log().splitlines()]
    completed = [w for w in waves if w["message"] == "rollouts completed"]
    assert [w["request_id"] for w in completed] == ["", *["step-8"] * 5]
    assert [w["rollouts"] for w in completed] == [57, 13, 13, 31, 20_002, 3]


async def test_the_asynchronous_session(start_generator: Any) -> None:
    """The same, and cancelling a call ends the session."""
    generator = start_generator("--engine=fake")
    async with AsyncRolloutClient(generator.addresses["listen"]) as client:
        async with await client.session(max_tokens=5, seed=1) as session:
            await session.add([2, 3], [[1], [2]])
            assert len([rollout async for rollout in session]) == 5
            await session.add([1, 1])
            assert [len(group) for group in await session.collect()] == [3, 4]
            assert await session.stop([0]) == 0
            assert [len(group) for group in session.groups] == [3, 4]
            assert session.outstanding == 0
        assert (await client.status()).waiting_rollouts == 0


def test_a_server_that_dies_leaves_a_session_with_what_came(start_generator: Any) -> None:
    """The loss is an error, never a short group; what had come is kept."""
    generator = start_generator("--engine=fake")
    with (
        RolloutClient(generator.addresses["listen"]) as client,
        client.session(max_tokens=200) as session,
    ):
        session.add([3, 90_000], [[1], [2]])
        next(iter(session))
        generator.process.kill()
        with pytest.raises(GeneratorUnavailable):
            session.collect()
        with pytest.raises(GeneratorUnavailable):
            session.collect()
        assert session.outstanding > 0
        assert sum(map(len, session.groups)) >= 1


def test_a_draining_server_finishes_what_it_has(start_generator: Any) -> None:
    """SIGTERM in the middle of a request: all of it comes, and the exit code is 0."""
    generator = start_generator("--engine=fake")
    begun = threading.Event()
    with (
        RolloutClient(generator.addresses["listen"]) as client,
        client.session(max_tokens=50) as session,
    ):
        session.add([10_000], [[1]])
        for _ in session:
            if not begun.is_set():
                begun.set()
                generator.process.send_signal(signal.SIGTERM)
        assert len(session.groups[0]) == 10_000
        with pytest.raises(GeneratorUnavailable):
            session.add([1])
    assert generator.process.wait(60) == 0


async def test_not_ready_while_the_weights_load() -> None:
    """Alive, but neither /readyz nor the health check says serving before the model is there."""
    import asyncio

    loading, loaded = asyncio.Event(), asyncio.Event()

    class Slow(FakeEngine):
        async def start(self) -> None:
            loading.set()
            await loaded.wait()

    server = Server(Slow(), ServerOptions(*["127.0.0.1:0"] * 3))
    starting = asyncio.ensure_future(server.start())
    await loading.wait()

    def asked() -> tuple[int, int, int]:
        codes = []
        for page in ("healthz", "readyz"):
            try:
                with urllib.request.urlopen(f"http://{server.addresses['admin']}/{page}") as answer:
                    codes.append(answer.status)
            except urllib.error.HTTPError as error:
                codes.append(error.code)
                error.close()
        with grpc.insecure_channel(server.addresses["health"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        return codes[0], codes[1], status

    serving = health_pb2.HealthCheckResponse.SERVING
    assert await asyncio.to_thread(asked) == (200, 503, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert "listen" not in server.addresses
    loaded.set()
    await starting
    assert await asyncio.to_thread(asked) == (200, 200, serving)
    await server.stop(0)


def test_metrics_count_what_happened(start_generator: Any, tmp_path: Path) -> None:
    """Groups, waves, rollouts, refusals and weights, by their names."""
    generator = start_generator("--engine=fake")
    with RolloutClient(generator.addresses["listen"]) as client:
        client.generate([[1], [2, 3]], [30, 2], max_tokens=5, seed=1)
        with client.session(max_tokens=5) as session:
            session.add([2], [[1, 2]])
            session.collect()
            session.add([5])
            session.collect()
            with pytest.raises(InvalidRequest):
                session.stop([1])
        client.update_weights(tmp_path, 3)
    found = levels(generator)
    expected = {
        "rollouts_total": 39, "prompt_tokens_total": 5, "group_size_rollouts_count": 4,
        "group_size_rollouts_sum": 39, "group_seconds_count": 4, "wave_seconds_count": 3,
        "wave_tail_ratio_count": 1, "rollouts_given_up_total": 0, "refusals_total": 1,
        "weight_updates_total": 1, "weight_update_seconds_count": 1, "weight_version": 3,
        "running_rollouts": 0, "waiting_rollouts": 0, "unread_rollouts": 0, "replicas": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["wave_tail_ratio_sum"] >= 1
    assert found["completion_tokens_total"] > 39
    assert abs(found["weights_loaded_timestamp_seconds"] - time.time()) < 3600


def test_every_metric_is_documented() -> None:
    """The table in the README names what a server exports, no more and no less."""
    registry = CollectorRegistry()
    engine = FakeEngine()
    Metrics(registry, lambda: Load(engine.status()))
    families = {
        family.name.removeprefix("knapsack_genserver_") + ("_total" * (family.type == "counter")): (
            family.type
        )
        for family in registry.collect()
    }
    readme = Path(__file__).parents[2] / "genserver" / "README.md"
    section = readme.read_text().split("## Metrics")[1].split("\n## ")[0]
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| `")]
    assert {row[1].strip(" `"): row[2].strip() for row in rows} == families


def test_a_request_that_no_message_holds_is_the_callers(start_generator: Any) -> None:
    """Not a server that is busy, of which a caller would ask again for ever."""
    generator = start_generator("--engine=fake")
    with (
        RolloutClient(generator.addresses["listen"]) as client,
        pytest.raises(InvalidRequest, match="must be at most 67,108,864"),
    ):
        client.generate(["a" * (64 * 2**20)], [1])


async def test_a_call_cancelled_before_it_has_begun_is_not_begun() -> None:
    """Though the client was still asking the server how it is."""
    asked, answer, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow(rpc.RolloutGeneratorServicer):
        def GetStatus(self, request: Any, context: Any) -> pb.GeneratorStatus:
            asked.set()
            answer.wait(20)
            return pb.GeneratorStatus()

        def GenerateSession(self, requests: Any, context: Any) -> Any:
            context.add_callback(ended.set)
            for request in requests:
                if request.WhichOneof("request") == "add":
                    yield pb.GenerateSessionResponse(answers=[pb.SessionAnswer()])
            ended.wait(20)

    server = grpc.server(ThreadPoolExecutor(4))
    rpc.add_RolloutGeneratorServicer_to_server(Slow(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = AsyncRolloutClient(f"127.0.0.1:{port}")
    call = asyncio.ensure_future(client.generate([[1]], [100]))
    assert await asyncio.to_thread(asked.wait, 20)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    answer.set()
    try:
        assert await asyncio.to_thread(ended.wait, 20)
    finally:
        ended.set()
        await client.close()
        server.stop(0).wait()

"""Overload and bad neighbours: clear refusals, bounded memory, health throughout.

All of it on loopback, bounded in count and time. The bound on memory is the one that
OPERATIONS.md states.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import resource
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import served
from silent_client import SilentClient

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc
from knapsack_scheduler import rpc as rpc_module
from knapsack_scheduler.journal.journal import Journal
from knapsack_scheduler.journal.records import Entry, RunRow
from knapsack_scheduler.journal.transaction import Writing
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.rpc import SchedulerServicer
from knapsack_scheduler.service import SchedulerService

pytestmark = pytest.mark.faults

MIB = 2**20
CODE = grpc.StatusCode
SIZES = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


def stub_of(channel: Any) -> Any:
    """Return a stub."""
    return rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def health_asked(address: str) -> Iterator[list[bool]]:
    """Ask for health again and again in a thread; yields the answers, which must all be yes."""
    answers: list[bool] = []
    over = threading.Event()

    def ask() -> None:
        with grpc.insecure_channel(address, SIZES) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                    answers.append(answer.status == health_pb2.HealthCheckResponse.SERVING)
                except grpc.RpcError:
                    answers.append(False)
                if over.wait(0.05):
                    return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()
    assert answers
    assert all(answers)


def gauge(address: str, name: str) -> float:
    """Return the value of a metric of the scheduler's own."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return float(re.findall(rf"^knapsack_scheduler_{name} (\S+)$", text, re.MULTILINE)[0])


class Peak:
    """The largest resident memory of a process while a block runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.bytes = 0

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def code_of(call: Any) -> Any:
    """Return the status of a call."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() is CODE.INTERNAL:
            raise AssertionError(error.details()) from error
        return error.code()
    return CODE.OK


def big_report(run_id: str, number: int, size: int) -> bytes:
    """Return a request of about ``size`` bytes that is right but for its prompts' number."""
    message = pb.AllocateRequest(run_id=run_id, request_id=f"big-{number}", total_rollouts=8)
    message.prompt_ids.extend(["p" * 1000] * (size // 1004))
    return message.SerializeToString()


async def test_190_000_prompts_are_served_and_a_gigabyte_of_ids_is_refused(
    start_scheduler: Callable[..., Any],
) -> None:
    """Beyond the default limit of gRPC's clients calls work; beyond ours they are refused."""
    scheduler = start_scheduler("--auto-create-runs")
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as channel:
        stub = stub_of(channel)
        prompts = [f"prompt-{i:012d}" for i in range(190_000)]
        answer = await stub.Allocate(
            pb.AllocateRequest(
                run_id="run", request_id="many", prompt_ids=prompts, total_rollouts=400_000
            )
        )
        assert sum(answer.num_rollouts) == 400_000

        raw = channel.unary_unary(f"/{_SERVICE}/Allocate")
        with Peak(scheduler.process.pid) as peak, health_asked(scheduler.addresses["health"]):
            before = psutil.Process(scheduler.process.pid).memory_info().rss
            data = big_report("run", 0, 128 * MIB)
            for _ in range(8):
                assert await code_of(raw(data, timeout=60)) is CODE.RESOURCE_EXHAUSTED
        assert peak.bytes - before < 200 * MIB


_SERVICE = pb.DESCRIPTOR.services_by_name["BudgetScheduler"].full_name


def largest_messages() -> dict[str, bytes]:
    """Return requests of nearly 16 MiB, made to take the most memory once parsed."""
    head = pb.AllocateRequest(run_id="run", request_id="x", total_rollouts=8).SerializeToString()
    count, length = 15 * MIB, b""
    while count > 127:
        length += bytes([count & 127 | 128])
        count >>= 7
    length += bytes([count])
    rewards = pb.ReportRequest(
        run_id="run", report_id="x", prompt_ids=["a"], prompt_indices=[0], num_rewards=[2_500_000],
        rewards=[1.0] * 2_500_000, completion_tokens=[100] * 2_500_000,
    )  # fmt: skip
    return {
        "long ids": big_report("run", 0, 15 * MIB),
        # Field 4 is prompt_ids, field 6 min_rollouts, packed.
        "short ids": head + b"\x22\x01a" * (5 * MIB),
        "numbers": head + b"\x22\x01a\x32" + length + b"\x01" * (15 * MIB),
        "rewards": rewards.SerializeToString(),
    }


async def test_memory_stays_within_its_bound_under_the_largest_calls(
    start_scheduler: Callable[..., Any],
) -> None:
    """Many of the worst messages at once, and imports: what OPERATIONS.md says is enough is."""
    limits = Limits(message_bytes=16 * MIB, inflight_bytes=64 * MIB)
    scheduler = start_scheduler(
        "--auto-create-runs",
        f"--max-message-bytes={limits.message_bytes}",
        f"--max-inflight-bytes={limits.inflight_bytes}",
    )
    pid = scheduler.process.pid
    before = psutil.Process(pid).memory_info().rss
    codes: dict[str, set[Any]] = {}
    part = pb.ImportOutcomesRequest(
        run_id="run", request_id="i", prompt_ids=[f"p{i}" for i in range(100_000)],
        num_rewards=[10] * 100_000, rewards=[1.0] * 1_000_000,
    )  # fmt: skip

    async def neighbour(kind: str, data: bytes) -> None:
        async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as channel:
            method = "Report" if kind == "rewards" else "Allocate"
            raw = channel.unary_unary(f"/{_SERVICE}/{method}")
            calls = [asyncio.ensure_future(code_of(raw(data, timeout=90))) for _ in range(4)]
            codes.setdefault(kind, set()).update(await asyncio.gather(*calls))
            # Refused while the machine had no time for it, who asks again is served.
            for _ in range(20 if kind == "rewards" else 0):
                if CODE.OK in codes[kind]:
                    break
                codes[kind].add(await code_of(raw(data, timeout=90)))

    async def importer() -> None:
        async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as channel:
            call = stub_of(channel).ImportOutcomes(iter([part] * 9), timeout=90)
            codes.setdefault("import", set()).add(await code_of(call))

    with Peak(pid) as peak, health_asked(scheduler.addresses["health"]):
        await asyncio.gather(
            *(neighbour(kind, data) for kind, data in largest_messages().items() for _ in "ab"),
            *(importer() for _ in range(3)),
        )
    refusals = {CODE.INVALID_ARGUMENT, CODE.RESOURCE_EXHAUSTED}
    for kind in ("long ids", "short ids", "numbers"):
        assert codes[kind] <= refusals, codes
    assert codes["rewards"] | codes["import"] <= {CODE.OK, CODE.RESOURCE_EXHAUSTED}, codes
    assert CODE.OK in codes["rewards"]
    assert peak.bytes - before < limits.memory_bytes
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"]) as channel:
        assert await code_of(stub_of(channel).ListRuns(pb.ListRunsRequest(), timeout=20)) is CODE.OK


async def test_slow_senders_give_way_to_those_who_wait(
    start_scheduler: Callable[..., Any], calls: Any
) -> None:
    """Calls that begin and never send hold their room for a grace, not for ever."""
    scheduler = start_scheduler("--auto-create-runs", f"--max-inflight-bytes={128 * MIB}")
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as slow:
        allocate = slow.stream_unary(f"/{_SERVICE}/Allocate")
        imports = stub_of(slow).ImportOutcomes

        async def never() -> Any:
            await asyncio.sleep(3600)
            yield b""

        stuck = [asyncio.ensure_future(code_of(allocate(never()))) for _ in range(4)]
        stuck += [asyncio.ensure_future(code_of(imports(never()))) for _ in range(8)]
        admin = scheduler.addresses["admin"]
        async with asyncio.timeout(60):
            # Until they hold all the room there is.
            while await asyncio.to_thread(gauge, admin, "inflight_bytes") < 128 * MIB:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not any(call.done() for call in stuck)
        with health_asked(scheduler.addresses["listen"]):
            async with grpc.aio.insecure_channel(scheduler.addresses["listen"]) as channel:
                for _ in range(3):
                    await stub_of(channel).Allocate(calls.allocate(), timeout=30)
        # Their callers are told after the places were given to others.
        done, _ = await asyncio.wait(stuck, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert {call.result() for call in done} == {CODE.RESOURCE_EXHAUSTED}
        for call in stuck:
            call.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)


@pytest.mark.parametrize("method", ["GetRun", "ListPromptStats"])
async def test_who_takes_no_answers_is_hung_up_on(
    start_scheduler: Callable[..., Any], calls: Any, method: str
) -> None:
    """Answers that nobody takes hold room and places for a grace; then their connection ends."""
    scheduler = start_scheduler(
        "--auto-create-runs", "--max-concurrent-calls=40",
        f"--max-message-bytes={16 * MIB}", f"--max-inflight-bytes={64 * MIB}",
    )  # fmt: skip
    prompts = [f"{i:0100d}" for i in range(4000)]
    scheduler.stub.Report(calls.own_report(prompts, [[1.0]] * 4000))
    request = {
        "GetRun": pb.GetRunRequest(run_id="run"),
        "ListPromptStats": pb.ListPromptStatsRequest(run_id="run", page_size=4000),
    }[method].SerializeToString()
    address = scheduler.addresses["listen"]
    with contextlib.closing(SilentClient(address)) as silent, health_asked(address):
        for _ in range(60):
            silent.call(f"/{_SERVICE}/{method}", request)
        await asyncio.to_thread(silent.wait_until_hung_up)
    scheduler.stub.GetRun(pb.GetRunRequest(run_id="run"), timeout=30)
    admin = scheduler.addresses["admin"]
    # Refusals for want of a place are seen as all others are.
    refused = f'calls_total{{code="RESOURCE_EXHAUSTED",method="{method}"}}'
    assert gauge(admin, re.escape(refused)) > 0
    async with asyncio.timeout(60):
        while gauge(admin, "inflight_bytes"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert "did not take its answers" in scheduler.log()


async def test_strangers_take_neither_memory_nor_places(
    start_scheduler: Callable[..., Any], tmp_path: Path
) -> None:
    """Health checks need no token, on two ports: huge ones, hundreds of watches, none taken."""
    tokens = tmp_path / "tokens"
    tokens.write_text("secret *\n")
    scheduler = start_scheduler(
        f"--token-file={tokens}", "--max-concurrent-calls=100", "--drain-seconds=1"
    )
    watch = "/grpc.health.v1.Health/Watch"
    huge = health_pb2.HealthCheckRequest(service="s" * 30 * MIB).SerializeToString()
    before = psutil.Process(scheduler.process.pid).memory_info().rss
    with contextlib.ExitStack() as stack:
        for port in ("listen", "health"):
            silent = stack.enter_context(
                contextlib.closing(SilentClient(scheduler.addresses[port]))
            )
            silent.call(watch, b"")
        async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as channel:
            raw = channel.unary_unary("/grpc.health.v1.Health/Check")
            with Peak(scheduler.process.pid) as peak, health_asked(scheduler.addresses["listen"]):
                refused = await asyncio.gather(*(code_of(raw(huge, timeout=60)) for _ in "123456"))
            assert set(refused) == {CODE.RESOURCE_EXHAUSTED}
            assert peak.bytes - before < 150 * MIB
            watches = [channel.unary_stream(watch)(b"") for _ in range(150)]
            held = [call for call in watches if await code_of(call.read()) is CODE.OK]
            assert 0 < len(held) < 100
            mine = (("authorization", "Bearer secret"),)
            await stub_of(channel).ListRuns(pb.ListRunsRequest(), metadata=mine, timeout=30)
            assert scheduler.end() == 0
            # Who watches is told of the end before it.
            assert await held[0].read() == b"\x08\x02"
            assert await held[0].read() is grpc.aio.EOF
    assert "still under way" not in scheduler.log()


@pytest.fixture
def most_files() -> Iterator[int]:
    """As many files as this process may have open, which it has by default on few systems."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = min(hard, 11_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, soft), hard))
    yield max(allowed, soft)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_thousands_of_connections_leave_the_others_served(
    start_scheduler: Callable[..., Any], calls: Any, most_files: int
) -> None:
    """Beyond the limit connections are closed; calls of a client that is there go on."""
    scheduler = start_scheduler("--auto-create-runs", "--max-connections=500")
    host, port = scheduler.addresses["listen"].rsplit(":", 1)
    most = min(10_000, most_files - 500)
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"]) as channel:
        stub = stub_of(channel)
        await stub.Allocate(calls.allocate())
        sockets = []
        with Peak(scheduler.process.pid) as peak, health_asked(scheduler.addresses["health"]):
            before = psutil.Process(scheduler.process.pid).memory_info().rss
            for _ in range(most):
                one = socket.socket()
                one.setblocking(False)
                one.connect_ex((host, int(port)))
                sockets.append(one)
                if len(sockets) % 1000 == 0:
                    await stub.Allocate(calls.allocate(), timeout=30)
            await stub.Allocate(calls.allocate(), timeout=30)
            connections = len(psutil.Process(scheduler.process.pid).net_connections())
        for one in sockets:
            one.close()
        assert connections < 700
        assert peak.bytes - before < 100 * MIB


@pytest.mark.parametrize("limits", ["-S -n 100", "-n 500"])
async def test_connections_never_take_the_last_open_files(
    start_scheduler: Callable[..., Any], calls: Any, limits: str
) -> None:
    """A limit that may be raised is raised; where it may not, fewer connections are let in."""
    scheduler = start_scheduler(prefix=("bash", "-c", f'ulimit {limits} && exec "$@"', "bash"))
    host, port = scheduler.addresses["listen"].rsplit(":", 1)
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"]) as channel:
        stub = stub_of(channel)
        await stub.CreateRun(pb.CreateRunRequest(run_id="run"))
        with contextlib.ExitStack() as sockets, health_asked(scheduler.addresses["health"]):
            for number in range(600):
                one = sockets.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex((host, int(port)))
                if number % 100 == 0:
                    await stub.Allocate(calls.allocate(), timeout=30)
            # Writes, reads, and what is imported when it is first needed.
            made = await stub.Allocate(calls.allocate(), timeout=30)
            await stub.Report(calls.report(made.allocation_id, [[1.0], [0.0]]), timeout=30)
            await stub.ListPromptStats(pb.ListPromptStatsRequest(run_id="run"), timeout=30)
    assert ("open files are limited to 500" in scheduler.log()) == (limits == "-n 500")


async def test_deadlines_of_a_millisecond_and_huge_metadata_harm_nobody(
    start_scheduler: Callable[..., Any], calls: Any
) -> None:
    """Work whose caller has gone is bounded, finished, and answered to a retry."""
    scheduler = start_scheduler("--auto-create-runs")
    async with grpc.aio.insecure_channel(scheduler.addresses["listen"], SIZES) as channel:
        stub = stub_of(channel)
        requests = [calls.allocate([f"p{i}" for i in range(500)], 4000) for _ in range(200)]
        with health_asked(scheduler.addresses["health"]):
            hurried = [code_of(stub.Allocate(r, timeout=0.001)) for r in requests]
            assert set(await asyncio.gather(*hurried)) <= {CODE.DEADLINE_EXCEEDED, CODE.OK}
            answers = [await stub.Allocate(r, timeout=30) for r in requests[:5]]
            metadata = (("x-request-id", "r" * 10_000_000),)
            code = await code_of(stub.Allocate(calls.allocate(), metadata=metadata, timeout=30))
            assert code in (CODE.RESOURCE_EXHAUSTED, CODE.UNAVAILABLE, CODE.INTERNAL)
            assert [await stub.Allocate(r, timeout=30) for r in requests[:5]] == answers


async def test_64_trainers_beside_large_calls_all_get_their_answers(
    start_scheduler: Callable[..., Any],
) -> None:
    """Small calls of many runs, next to imports and batches of hundred thousands of prompts."""
    scheduler = start_scheduler("--auto-create-runs")
    address = scheduler.addresses["listen"]
    numbers = itertools.count()

    async def trainer(name: str) -> int:
        done = 0
        async with grpc.aio.insecure_channel(address, SIZES) as channel:
            stub = stub_of(channel)
            prompts = [f"p{i}" for i in range(64)]
            for step in range(4):
                allocation = await stub.Allocate(
                    pb.AllocateRequest(run_id=name, step=step, request_id=f"s{step}",
                                       prompt_ids=prompts, total_rollouts=512),
                    timeout=60,
                )  # fmt: skip
                counts = list(allocation.num_rollouts)
                answer = await stub.Report(
                    pb.ReportRequest(run_id=name, allocation_id=allocation.allocation_id,
                                     report_id=f"s{step}", prompt_indices=range(64),
                                     num_rewards=counts, rewards=[1.0] * 512),
                    timeout=60,
                )  # fmt: skip
                done += answer.accepted_rollouts
        return done

    async def large(kind: str) -> Any:
        prompts = [f"prompt-{i:09d}" for i in range(100_000)]
        async with grpc.aio.insecure_channel(address, SIZES) as channel:
            stub = stub_of(channel)
            if kind == "import":
                part = pb.ImportOutcomesRequest(
                    run_id="huge", request_id=f"{next(numbers)}", prompt_ids=prompts,
                    num_rewards=[1] * 100_000, rewards=[1.0] * 100_000,
                )  # fmt: skip
                return await code_of(stub.ImportOutcomes(iter([part] * 2), timeout=100))
            request = pb.AllocateRequest(run_id="vast", request_id=f"{next(numbers)}",
                                         prompt_ids=prompts, total_rollouts=300_000)  # fmt: skip
            return await code_of(stub.Allocate(request, timeout=100))

    with health_asked(scheduler.addresses["health"]):
        heavy = [asyncio.ensure_future(large(k)) for k in ("import", "allocate") * 3]
        done = await asyncio.gather(*(trainer(f"run-{i}") for i in range(64)))
        assert await asyncio.gather(*heavy) == [CODE.OK] * 6
    assert done == [4 * 512] * 64


class StalledJournal(Journal):
    """A journal in which transactions on runs named slow do not begin until told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.stalled = threading.Semaphore(0)
        self.go_on = threading.Event()

    def _stall(self, run_id: str) -> None:
        if run_id.startswith("slow"):
            self.stalled.release()
            assert self.go_on.wait(60)

    @contextlib.contextmanager
    def writing(self, run_id: str) -> Iterator[Writing]:
        """Hold a run."""
        self._stall(run_id)
        with super().writing(run_id) as writing:
            yield writing

    def append(self, run: RunRow, entry: Entry, now: int) -> Entry | None:
        """Append to a run as it was read."""
        self._stall(run.run_id)
        return super().append(run, entry, now)


async def test_large_calls_that_stall_leave_threads_for_small_ones(
    tmp_path: Path, calls: Any
) -> None:
    """Of six large calls of six runs two are worked on; small calls of others are answered."""
    journal = StalledJournal(f"sqlite:///{tmp_path / 'stats.db'}")
    journal.open()
    service = SchedulerService(journal, auto_create_runs=True)
    prompts = [f"{i:0100d}" for i in range(12_000)]
    async with (
        served(SchedulerServicer(service, Limits())) as address,
        grpc.aio.insecure_channel(address, SIZES) as channel,
    ):
        stub = stub_of(channel)
        large = []
        for number in range(6):
            calls.run_id = f"slow-{number}"
            large.append(asyncio.ensure_future(stub.Allocate(calls.allocate(prompts, 24_000))))
        for _ in range(Limits().large_calls):
            await asyncio.to_thread(journal.stalled.acquire, timeout=60)
        calls.run_id = "quick"
        for _ in range(5):
            await stub.Allocate(calls.allocate(), timeout=60)
        assert not any(call.done() for call in large)
        journal.go_on.set()
        for call in large:
            assert (await call).allocated_rollouts == 24_000
    service.close()
    journal.close()


async def test_large_messages_leave_the_event_loop_to_others_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is parsed nothing else runs; many that wait are not parsed one after another."""
    journal = Journal(f"sqlite:///{tmp_path / 'stats.db'}")
    journal.open()
    service = SchedulerService(journal, auto_create_runs=True)
    turns, between = 0, []
    parsed = rpc_module._parsed

    def counting(*arguments: Any) -> Any:
        nonlocal turns
        between.append(turns)
        try:
            return parsed(*arguments)
        finally:
            turns = 0

    monkeypatch.setattr(rpc_module, "_parsed", counting)
    head = pb.AllocateRequest(run_id="run", request_id="x", total_rollouts=8).SerializeToString()
    data = head + b"\x22\x00" * (2 * MIB)
    async with served(SchedulerServicer(service, Limits())) as address:
        with grpc.insecure_channel(address, SIZES) as channel:
            raw = channel.unary_unary(f"/{_SERVICE}/Allocate")
            calls = [raw.future(data, timeout=60) for _ in range(8)]
            while not all(call.done() for call in calls):
                await asyncio.sleep(0)
                turns += 1
            assert {call.code() for call in calls} == {CODE.INVALID_ARGUMENT}
    assert sorted(between[1:])[3] > 100, between
    service.close()
    journal.close()

"""The gate before vLLM's weights holds in every order of calls.

The orders are of calls that overlap, which a real engine makes only by chance; so vLLM's
engine is a stand-in here, whose calls to its workers end when a test says so. What a real
one does with the gate is in tests/vllm_engine.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.engines.vllm.engine import VllmEngine, VllmOptions
from knapsack_genserver.errors import FailedPrecondition, Unavailable
from knapsack_genserver.server import Server, ServerOptions

from small_engines import group

GATE = "knapsack_genserver.engines.vllm.gate"


class HttpError(Exception):
    """Like vLLM's: a message and a status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Core:
    """Like vLLM's engine core, as far as the gate sees it.

    Attributes:
        running: generation goes on.
        weights: that the model computes with.
        cached: weights that the prefix cache is of.
        calls: of workers, in order, with whether generation ran.
        held: calls of workers that wait for their event.
        failing: calls of workers that fail, and why.
        refusal: why a folder cannot be served, if it cannot.
    """

    def __init__(self) -> None:
        self.running = True
        self.weights = self.cached = "old"
        self.calls: list[tuple[str, bool]] = []
        self.held: dict[str, asyncio.Event] = {}
        self.failing: dict[str, Exception] = {}
        self.refusal = ""

    def hold(self, method: str) -> asyncio.Event:
        """Let a call of workers wait until the event is set."""
        return self.held.setdefault(method, asyncio.Event())

    async def collective_rpc_async(self, method: str, *_: Any) -> list[Any]:
        """Call the workers."""
        self.calls.append((method, self.running))
        if method in self.held:
            await self.held[method].wait()
        if method in self.failing:
            raise self.failing[method]
        if method == "knapsack_check_weights":
            # One of two workers may see another disk.
            return ["", self.refusal]
        if method in ("knapsack_take_weights", "update_weights"):
            self.weights = "new"
        if method == "knapsack_restore_weights":
            self.weights = "old"
        return [{"fingerprint": "f", "proven": 1, "unproven": []}]


class AsyncLLM:
    """Like vLLM's, as far as the gate sees it.

    Attributes:
        drained: rollouts in flight have ended, for which a pause with wait waits.
        asleep: what is not in the GPU's memory.
        sleep_fails: why sleeping fails, if it does.
    """

    errored = False

    def __init__(self, backend: str) -> None:
        self.engine_core = Core()
        self.output_processor = SimpleNamespace(request_states={}, parent_requests={})
        transfer = SimpleNamespace(backend=backend)
        self.vllm_config = SimpleNamespace(weight_transfer_config=transfer)
        self.drained = asyncio.Event()
        self.asleep: set[str] = set()
        self.sleep_fails = ""

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Stand still; with wait when rollouts in flight have ended."""
        self.engine_core.running = False
        if mode == "wait":
            await self.drained.wait()

    async def resume_generation(self) -> None:
        """Go on, and end every wait."""
        self.engine_core.running = True
        self.drained.set()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free the memory."""
        await asyncio.sleep(0)
        if self.sleep_fails:
            raise ValueError(self.sleep_fails)
        await AsyncLLM.pause_generation(self, mode=mode)
        if level:
            self.asleep = {"weights", "kv_cache"}

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """Take the memory back; resumes when all of it is there."""
        self.asleep -= set(tags or self.asleep)
        if not self.asleep:
            await AsyncLLM.resume_generation(self)
        return not self.asleep

    async def update_weight_version(self, new_version: str) -> None:
        """Label the weights."""

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Forget what was computed with other weights."""
        await asyncio.sleep(0)
        self.engine_core.cached = self.engine_core.weights

    async def reset_encoder_cache(self) -> None:
        """Forget."""

    async def abort(self, *_: Any, **__: Any) -> None:
        """End rollouts."""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The gate's module on the stand-in, whether or not vLLM is installed."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.exceptions": {"GracefulHTTPError": HttpError},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": RuntimeError},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, GATE, raising=False)
    yield importlib.import_module(GATE)
    sys.modules.pop(GATE, None)


async def llm_of(gate: Any, folder: Path, backend: str = "", patience: float = 600.0) -> Any:
    """Return a guarded engine; without a backend it takes folders."""
    llm = gate.GatedLLM(backend or gate.NAME)
    await llm.guard(folder, 0, None, "keep", patience)
    llm.engine_core.calls.clear()
    return llm


def part(folder: Path) -> Any:
    """Return a request to take a folder."""
    return SimpleNamespace(update_info={"path": str(folder)})


async def settled() -> None:
    """Return when every task has gone as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def at_once(call: Coroutine[Any, Any, None]) -> None:
    """Await a call that must not wait for anything."""
    task = asyncio.ensure_future(call)
    await settled()
    if not task.done():
        task.cancel()
        pytest.fail(f"{call} waits")
    task.result()


@pytest.mark.parametrize("backend", ["", "nccl"])
async def test_one_call_of_an_update_at_a_time(gate: Any, backend: str, tmp_path: Path) -> None:
    """While weights are taken nothing ends the update or takes others; then it ends right."""
    llm = await llm_of(gate, tmp_path, backend)
    core = llm.engine_core
    slow = core.hold("update_weights" if backend else "knapsack_check_weights")
    await llm.start_weight_update()
    taking = asyncio.ensure_future(llm.update_weights(part(tmp_path)))
    await settled()
    with pytest.raises(gate.Refused, match=r"cannot finish_weight_update now.*is under way"):
        await at_once(llm.finish_weight_update("1"))
    with pytest.raises(gate.Refused, match=r"cannot update_weights now.*is under way"):
        await at_once(llm.update_weights(part(tmp_path)))
    assert (llm.version, core.running) == (0, False)
    slow.set()
    await taking
    await llm.finish_weight_update("1")
    assert (llm.version, core.weights, core.cached) == (1, "new", "new")
    assert not any(running for _, running in core.calls)
    assert core.running


async def test_an_update_is_finished_once(gate: Any, tmp_path: Path) -> None:
    """A second finish, while the first is under way, is refused."""
    llm = await llm_of(gate, tmp_path, "nccl")
    slow = llm.engine_core.hold("finish_weight_update")
    await llm.start_weight_update()
    await llm.update_weights(part(tmp_path))
    finishing = asyncio.ensure_future(llm.finish_weight_update("7"))
    await settled()
    for call in (llm.finish_weight_update("8"), llm.update_weights(part(tmp_path))):
        with pytest.raises(gate.Refused, match="is under way"):
            await at_once(call)
    slow.set()
    await finishing
    assert llm.version == 7


async def test_an_update_that_is_being_given_up_takes_nothing_more(
    gate: Any, tmp_path: Path
) -> None:
    """The trainer that comes back too late is refused, and told so."""
    llm = await llm_of(gate, tmp_path, "nccl", patience=0.0)
    core = llm.engine_core
    slow = core.hold("finish_weight_update")
    await llm.start_weight_update()
    await settled()
    assert core.calls[-1] == ("finish_weight_update", False)
    for call in (llm.finish_weight_update("1"), llm.update_weights(part(tmp_path))):
        with pytest.raises(gate.Refused, match="is under way"):
            await at_once(call)
    slow.set()
    await settled()
    assert (llm.version, core.weights, core.running) == (0, "old", True)
    with pytest.raises(gate.Refused, match="start_weight_update must be called"):
        await llm.finish_weight_update("1")


async def test_a_label_of_any_length_ends_an_update(gate: Any, tmp_path: Path) -> None:
    """Its number is the next where the label's is none that a version can have."""
    llm = await llm_of(gate, tmp_path)
    await llm.start_weight_update()
    await llm.update_weights(part(tmp_path))
    await llm.finish_weight_update("9" * 5000)
    assert (llm.version, llm.engine_core.running) == (1, True)


async def test_a_resume_has_the_last_word_over_a_pause_that_waits(
    gate: Any, tmp_path: Path
) -> None:
    """A trainer that tires of its pause resumes; the next update leaves generation running."""
    llm = await llm_of(gate, tmp_path)
    pausing = asyncio.ensure_future(llm.pause_generation(mode="wait"))
    await settled()
    with pytest.raises(gate.Refused, match="a pause, sleep or wake-up is under way"):
        await llm.start_weight_update()
    await llm.resume_generation()
    await pausing
    await llm.serve_folder(tmp_path, 1)
    assert llm.engine_core.running


async def test_a_pause_that_fails_is_none(gate: Any, tmp_path: Path) -> None:
    """It changes nothing, not even another pause that came meanwhile."""
    llm = await llm_of(gate, tmp_path)
    for paused in (False, True):
        pausing = asyncio.ensure_future(llm.pause_generation(mode="wait"))
        await settled()
        if paused:
            await llm.pause_generation(mode="keep")
        pausing.cancel()
        await asyncio.wait([pausing])
        await llm.serve_folder(tmp_path, 1)
        assert llm.engine_core.running is not paused


async def test_a_pause_outlives_an_update(gate: Any, tmp_path: Path) -> None:
    """Whether it came before or in it; resuming or waking up ends it."""
    llm = await llm_of(gate, tmp_path)
    core = llm.engine_core
    await llm.pause_generation(mode="keep")
    await llm.serve_folder(tmp_path, 1)
    assert not core.running
    await llm.resume_generation()
    await llm.start_weight_update()
    await llm.pause_generation(mode="abort")
    await llm.finish_weight_update()
    assert not core.running
    await llm.sleep(1)
    await llm.wake_up()
    await llm.serve_folder(tmp_path, 2)
    assert core.running


async def test_a_sleep_that_fails_is_none(gate: Any, tmp_path: Path) -> None:
    """The next update leaves generation running; so does one after a light sleep and a resume."""
    llm = await llm_of(gate, tmp_path)
    llm.sleep_fails = "sleep mode is not enabled"
    with pytest.raises(ValueError, match="not enabled"):
        await llm.sleep(1)
    await llm.serve_folder(tmp_path, 1)
    assert llm.engine_core.running
    await llm.sleep(0)
    assert not llm.engine_core.running
    await llm.resume_generation()
    await llm.serve_folder(tmp_path, 2)
    assert llm.engine_core.running


async def test_sleeping_weights_are_not_updated(gate: Any, tmp_path: Path) -> None:
    """Through no door, until they are awake; the rest of the memory may sleep on."""
    llm = await llm_of(gate, tmp_path)
    core = llm.engine_core
    await llm.sleep(1)
    for woken in ("nothing", "kv_cache"):
        if woken == "kv_cache":
            assert not await llm.wake_up([woken])
        for update in (
            llm.serve_folder(tmp_path, 1),
            llm.start_weight_update(),
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)}),
        ):
            with pytest.raises(gate.Refused, match="the weights are asleep; wake them up"):
                await update
    assert (core.calls, core.weights) == ([], "old")
    await llm.wake_up()
    await llm.sleep(2)
    assert not await llm.wake_up(["weights"])
    await llm.serve_folder(tmp_path, 1)
    assert (core.weights, core.running) == ("new", False)
    assert await llm.wake_up(["kv_cache"])
    assert core.running


async def test_waking_up_resumes_nothing_in_an_update(gate: Any, tmp_path: Path) -> None:
    """Also with the weights' tag: vLLM resumes whenever all of its memory is there."""
    llm = await llm_of(gate, tmp_path)
    await llm.start_weight_update()
    for tags in (None, ["weights"], ["kv_cache"]):
        with pytest.raises(gate.Refused, match="cannot wake up"):
            await llm.wake_up(tags)
    assert not llm.engine_core.running


async def test_a_failed_update_says_whether_any_weights_serve(gate: Any, tmp_path: Path) -> None:
    """The old ones do after a failure that was put right; none where it was not."""
    engine = VllmEngine(VllmOptions(tmp_path))
    engine._llm = llm = await llm_of(gate, tmp_path)
    failing = llm.engine_core.failing
    failing["knapsack_take_weights"] = RuntimeError("the disk is gone")
    with pytest.raises(FailedPrecondition, match="the disk is gone; the old weights serve on"):
        await engine.load_weights(tmp_path, 1)
    assert engine.broken == ""
    failing["knapsack_restore_weights"] = RuntimeError("and the other one")
    with pytest.raises(Unavailable, match=r"no weights serve until.*the disk is gone"):
        await engine.load_weights(tmp_path, 1)
    with pytest.raises(Unavailable, match="no weights serve until"):
        engine.generate(group())
    failing.clear()
    llm.engine_core.refusal = "not a folder"
    with pytest.raises(Unavailable, match="not a folder; no weights serve until"):
        await engine.load_weights(tmp_path, 1)
    llm.engine_core.refusal = ""
    await engine.load_weights(tmp_path, 2)
    assert (engine.broken, llm.version, llm.engine_core.running) == ("", 2, True)


@pytest.mark.parametrize("failing", ["check", "take", "restore"])
async def test_who_is_at_fault_is_in_the_status(gate: Any, tmp_path: Path, failing: str) -> None:
    """400 for a folder that was refused; 500 where this side failed, whatever serves then."""
    llm = await llm_of(gate, tmp_path)
    llm.engine_core.refusal = "it is not whole"
    await llm.start_weight_update()
    with pytest.raises(gate.UpdateFailed, match="it is not whole; the old weights") as refused:
        await llm.update_weights(part(tmp_path))
    assert refused.value.status == 400
    llm.engine_core.refusal = ""
    for method in {failing, "take" if failing == "restore" else failing}:
        llm.engine_core.failing[f"knapsack_{method}_weights"] = RuntimeError("no memory")
    await llm.start_weight_update()
    serving = "no weights serve" if failing == "restore" else "no memory; the old weights"
    with pytest.raises(gate.UpdateFailed, match=serving) as failed:
        await llm.update_weights(part(tmp_path))
    assert failed.value.status == 500
    assert llm.engine_core.cached == llm.engine_core.weights


@pytest.mark.parametrize("what", ["left alone", "refused"])
async def test_an_update_that_is_not_finished_is_undone(
    gate: Any, tmp_path: Path, what: str
) -> None:
    """Also after it has taken a folder: the old weights serve, under their version."""
    llm = await llm_of(gate, tmp_path, patience=0.0 if what == "left alone" else 600.0)
    core = llm.engine_core
    await llm.start_weight_update()
    await llm.update_weights(part(tmp_path))
    assert core.weights == "new"
    if what == "left alone":
        await settled()
    else:
        core.refusal = "not whole"
        with pytest.raises(gate.UpdateFailed, match="the old weights serve on"):
            await llm.update_weights(part(tmp_path))
        core.refusal = ""
    assert (core.weights, core.cached, llm.version, core.running) == ("old", "old", 0, True)
    assert ("knapsack_release_weights", False) not in core.calls
    await llm.serve_folder(tmp_path, 3)
    assert (core.weights, llm.version) == ("new", 3)
    assert core.calls[-1] == ("knapsack_release_weights", False)


async def test_updates_over_http_are_told_of(gate: Any, tmp_path: Path) -> None:
    """Each once, whether it succeeds; none that came through gRPC, whose caller tells of it."""
    llm = await llm_of(gate, tmp_path)
    told: list[tuple[int, bool]] = []
    llm.updated = lambda version, seconds, paused, failed: told.append((version, failed))
    await llm.serve_folder(tmp_path, 1)
    assert told == []
    await llm.start_weight_update()
    await llm.update_weights(part(tmp_path))
    await llm.finish_weight_update("2")
    reload = {"kwargs": {"weights_path": str(tmp_path)}}
    await llm.collective_rpc("reload_weights", **reload)
    assert told == [(2, False), (3, False)]
    llm.engine_core.refusal = "not a folder"
    await llm.start_weight_update()
    with pytest.raises(gate.UpdateFailed):
        await llm.update_weights(part(tmp_path))
    with pytest.raises(gate.UpdateFailed):
        await llm.collective_rpc("reload_weights", **reload)
    assert told[2:] == [(3, True), (4, True)]


class Breaking(FakeEngine):
    """An engine with a door of its own for weights, and without weights when told so."""

    broken = ""
    updated: Callable[[int, float, float | None, bool], None] | None = None

    def update(self, broken: str) -> None:
        """Update through that door."""
        self.broken = broken
        assert self.updated
        self.updated(5, 2.0, 1.5, bool(broken))


async def test_the_server_is_ready_while_weights_serve() -> None:
    """Probes say so, over HTTP with the reason; metrics count what the engine tells of."""
    engine = Breaking()
    any_port = "127.0.0.1:0"
    server = Server(engine, ServerOptions(any_port, any_port, any_port))
    await server.start()

    async def asked(path: str) -> tuple[int, str]:
        async with http.get(f"http://{server.addresses['admin']}{path}") as answer:
            return answer.status, await answer.text()

    async def healthy(service: str) -> bool:
        found = await probe.Check(health_pb2.HealthCheckRequest(service=service))
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    try:
        async with (
            aiohttp.ClientSession() as http,
            grpc.aio.insecure_channel(server.addresses["health"]) as channel,
        ):
            probe = health_pb2_grpc.HealthStub(channel)
            assert (await asked("/readyz"))[0] == 200
            engine.update("no weights serve")
            assert await asked("/readyz") == (503, "no weights serve\n")
            assert (await healthy(""), await healthy("liveness")) == (False, True)
            engine.update("")
            assert (await asked("/readyz"))[0] == 200
            assert await healthy("")
            _, text = await asked("/metrics")
    finally:
        await server.stop(0.0)
    for result in ("failed", "served"):
        assert re.search(rf'weight_updates_total{{.*"{result}"}} 1\.0', text)
    assert re.search(r"pause_seconds_sum 3\.0", text)

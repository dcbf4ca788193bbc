"""Weights change whole or not at all, through every door, and are what their folder holds."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from knapsack_genserver.engine import FinishReason
from knapsack_genserver.errors import FailedPrecondition, Unavailable
from knapsack_genserver.events import WeightsUpdated

from small_engines import all_of, group
from vllm_http import Http
from vllm_models import greedy, tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPTS = [[1, 2, 3], [7], [5, 6, 5, 6, 5], list(range(20))]


async def greedy_of(engine: Any) -> list[list[int]]:
    """Return what the engine generates greedily."""
    groups = [group(prompt, 1, temperature=0.0, max_tokens=40) for prompt in PROMPTS]
    return [rollouts[0].token_ids for rollouts in await all_of(engine, *groups)]


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same model."""
    folder = tmp_path_factory.mktemp("weights") / "other"
    tiny_model(seed=5).save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, change: Any) -> Path:
    """Return a copy of a folder whose tensors were changed by a function."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


async def test_greedy_tokens_are_those_of_hugging_face(engine, model_folder, other_folder) -> None:
    """Before, on new weights, and back on the old ones."""
    before = await greedy_of(engine)
    assert before == greedy(model_folder, PROMPTS, 40)
    loaded = await engine.load_weights(other_folder, 3)
    assert loaded.version == 3
    assert loaded.paused_seconds > 0
    after = await greedy_of(engine)
    assert after == greedy(other_folder, PROMPTS, 40)
    assert after != before
    again = await engine.load_weights(model_folder, 4)
    assert again.fingerprint != loaded.fingerprint
    assert (await engine.load_weights(other_folder, 5)).fingerprint == loaded.fingerprint
    await engine.load_weights(model_folder, 6)
    assert await greedy_of(engine) == before


async def test_a_folder_that_cannot_be_served_changes_nothing(
    engine, model_folder, other_folder, tmp_path
) -> None:
    """The message says what is wrong with it; the old tokens come, under the old version."""
    before = await greedy_of(engine)

    def drop(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)

    def reshape(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = torch.zeros(23, 63)

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    bad = {
        "up_proj.*missing": changed(other_folder, tmp_path / "drop", drop),
        "layers.2.*no tensor of that name": changed(other_folder, tmp_path / "add", add),
        r"lm_head.*\(23, 63\).*\(23, 64\)": changed(other_folder, tmp_path / "reshape", reshape),
        "norm.*not finite": changed(other_folder, tmp_path / "spoil", spoil),
        "not a folder": tmp_path / "none",
        "no .*safetensors": tmp_path,
    }
    truncated = shutil.copytree(other_folder, tmp_path / "truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    bad["cannot be read"] = truncated.parent
    for reason, folder in bad.items():
        with pytest.raises(FailedPrecondition, match=f"(?s){reason}.*the old weights serve on"):
            await engine.load_weights(folder, 9)
        assert await greedy_of(engine) == before
        assert engine.status().weight_version == 0


async def test_weights_that_fail_while_they_are_taken_are_put_back(
    engine, other_folder, tmp_path
) -> None:
    """Even where the model has been changed already, and the old folder is gone."""
    old = shutil.copytree(other_folder, tmp_path / "old")
    await engine.load_weights(old, 1)
    before = await greedy_of(engine)
    shutil.rmtree(old)

    # Tied in the folder, not in the model: found out only when it computes.
    folder = tmp_path / "new"
    tiny_model(seed=6).save_pretrained(folder)
    await engine.llm._workers("knapsack_check_weights", str(folder))
    path = folder / "model.safetensors"
    whole = path.read_bytes()

    async def check_then_overwrite(method: str, *args: Any) -> Any:
        answer = await workers(method, *args)
        if method == "knapsack_check_weights":
            path.write_bytes(whole[:-8] + bytes(8))
        return answer

    workers = engine.llm._workers
    engine.llm._workers = check_then_overwrite
    try:
        with pytest.raises(FailedPrecondition, match=r"written to.*the old weights serve on"):
            await engine.load_weights(folder, 2)
    finally:
        del engine.llm._workers
    assert await greedy_of(engine) == before
    assert engine.status().weight_version == 1


async def test_rollouts_in_flight_go_on_with_the_new_weights(engine, other_folder) -> None:
    """Each says which tokens are whose, and the new ones are what the new weights say."""
    prompt = [4, 4, 2]
    long = group(prompt, 8, seed=3, max_tokens=240, stop_token_ids=())
    stream = engine.generate(group(prompt, 60, seed=1, max_tokens=200))
    await anext(aiter(stream))
    loaded = await engine.load_weights(other_folder, 1)
    rest = [c async for c in stream]
    (after,) = await all_of(engine, long)
    assert loaded.version == 1
    assert all(not c.error for c in rest)
    for c in rest:
        spans = [(s.version, s.start, s.end) for s in c.weights]
        assert [s[1] for s in spans[1:]] == [s[2] for s in spans[:-1]]
        assert (spans[0][1], spans[-1][2]) == (0, len(c.token_ids))
        assert [s[0] for s in spans] in ([0], [0, 1], [1])
    assert any(len(c.weights) == 2 for c in rest)
    assert {s.version for c in after for s in c.weights} == {1}


@pytest.mark.parametrize("mode", ["wait", "abort"])
async def test_an_update_may_wait_for_rollouts_or_give_them_up(
    engine, other_folder, tmp_path, monkeypatch, mode: str
) -> None:
    """With wait all are of the old weights alone; with abort those begun say so and are short."""
    monkeypatch.setattr(engine.llm, "_mode", mode)
    (whole,) = await all_of(engine, group([4, 2], 200, seed=1, max_tokens=200))
    stream = engine.generate(group([4, 2], 200, seed=1, max_tokens=200))
    first = await anext(aiter(stream))
    if mode == "abort":
        # A trainer that has paused, so that they do not end by themselves meanwhile.
        await engine.llm.pause_generation(mode="keep", clear_cache=False)
    # A folder that cannot be served costs nobody anything.
    with pytest.raises(FailedPrecondition, match="the old weights serve on"):
        await engine.load_weights(tmp_path, 1)
    await engine.load_weights(other_folder, 2)
    await engine.llm.resume_generation()
    # What begins now is of the new weights.
    (after,) = await all_of(engine, group([4, 2], 200, seed=1, max_tokens=200))
    assert {s.version for c in after for s in c.weights} == {2}
    found = sorted([first, *[c async for c in stream]], key=lambda c: c.index)
    assert [c.index for c in found] == list(range(200))
    given_up = [c for c in found if c.reason is FinishReason.ABORT]
    assert bool(given_up) == (mode == "abort")
    for c, old in zip(found, whole, strict=True):
        assert {s.version for s in c.weights} <= {0}
        assert c.error == ""
        assert len(c.logprobs) == len(c.token_ids)
        if c in given_up:
            assert len(c.token_ids) < len(old.token_ids)
        assert c.token_ids == old.token_ids[: len(c.token_ids)]
        assert c in given_up or len(c.token_ids) == len(old.token_ids)


async def test_deleted_folders_take_up_no_disk(engine, other_folder, tmp_path) -> None:
    """Only the weights that serve are held; those before them go when the next ones serve."""

    def held() -> set[str]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(str(descriptor.readlink()))
        paths = {path.removesuffix(" (deleted)") for path in found}
        return {path for path in paths if path.endswith(".safetensors")}

    for version in (1, 2):
        folder = Path(shutil.copytree(other_folder, tmp_path / str(version)))
        await engine.load_weights(folder, version)
        shutil.rmtree(folder)
        assert held() == {str(folder / "model.safetensors")}
    with pytest.raises(FailedPrecondition):
        await engine.load_weights(tmp_path / "none", 3)
    assert held() == {str(tmp_path / "2" / "model.safetensors")}


async def test_a_broken_update_over_http(engine, http: Http, other_folder, tmp_path) -> None:
    """400 where the folder is at fault and 500 where the server is; the old weights serve on."""
    before = await greedy_of(engine)
    half = Path(shutil.copytree(other_folder, tmp_path / "half"))
    whole = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(whole[:-1000])

    async def update(folder: Path) -> tuple[int, str]:
        assert (await http.post("/start_weight_update"))[0] == 200
        status, answer = await http.post("/update_weights", update_info={"path": str(folder)})
        assert (await http.post("/finish_weight_update"))[0] == 409
        assert await greedy_of(engine) == before
        return status, str(answer)

    status, answer = await update(half)
    assert (status, "the old weights serve on" in answer) == (400, True), answer
    assert "cannot be read" in answer
    status, answer = await http.post(
        "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(half)}
    )
    assert (status, "cannot be read" in str(answer)) == (400, True)
    assert (await http.post("/start_weight_update"))[0] == 200
    status, answer = await http.post("/update_weights", update_info={"folder": "x"})
    assert (status, "path = None" in str(answer)) == (400, True)

    async def fail(method: str, *args: Any) -> Any:
        if method == "knapsack_take_weights":
            await workers(method, *args)
            raise RuntimeError("out of memory")
        return await workers(method, *args)

    workers = engine.llm._workers
    engine.llm._workers = fail
    try:
        status, answer = await update(other_folder)
    finally:
        del engine.llm._workers
    assert (status, "out of memory; the old weights serve on" in answer) == (500, True), answer
    assert engine.status().weight_version == 0
    # Begun and taken, but never finished: the patience ends, and it is as if it had not been.
    assert (await http.post("/start_weight_update"))[0] == 200
    assert (await http.post("/update_weights", update_info={"path": str(other_folder)}))[0] == 200
    assert await asyncio.wait_for(greedy_of(engine), 60) == before
    assert (await http.post("/finish_weight_update"))[0] == 409
    assert engine.status().weight_version == 0


async def test_an_update_over_http_is_the_same_update(
    server, engine, http: Http, model_folder, other_folder, tmp_path
) -> None:
    """Start, update and finish of vLLM's API; wrong folders and wrong orders are refused."""
    told: list[tuple[int, bool]] = []

    def listener(event: Any) -> None:
        if isinstance(event, WeightsUpdated):
            told.append((event.version, event.failed))

    server._events.listen(listener)
    before = await greedy_of(engine)
    assert (await http.post("/update_weights", update_info={"path": str(other_folder)}))[0] == 409
    assert (await http.post("/finish_weight_update"))[0] == 409
    assert (await http.post("/init_weight_transfer_engine", init_info={}))[0] == 200
    assert (await http.post("/pause?mode=keep"))[0] == 200
    assert (await http.post("/start_weight_update"))[0] == 200
    status, answer = await http.post("/update_weights", update_info={"path": str(tmp_path)})
    assert (status, "holds no" in str(answer)) == (400, True)
    assert (await http.post("/finish_weight_update"))[0] == 409
    assert (await http.post("/start_weight_update"))[0] == 200
    assert (await http.post("/update_weights", update_info={"path": str(other_folder)}))[0] == 200
    assert (await http.post("/finish_weight_update", weight_version="step-7"))[0] == 200
    assert (await http.get("/weight_info"))[1] == {"weight_version": "step-7"}
    assert (await http.get("/is_paused"))[1] == {"is_paused": True}
    assert (await http.post("/resume"))[0] == 200
    assert engine.status().weight_version == 7
    assert await greedy_of(engine) == greedy(other_folder, PROMPTS, 40) != before
    # A reload of vLLM's own goes through the same gate, and is right.
    answer = await http.post(
        "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(model_folder)}
    )
    assert answer[0] == 200
    assert engine.status().weight_version == 8
    assert await greedy_of(engine) == before
    assert told == [(0, True), (7, False), (8, False)]


async def test_nothing_is_generated_between_start_and_finish(
    engine, http: Http, other_folder
) -> None:
    """What kills vLLM alone: a start, no finish, and a request. Here it waits."""
    assert (await http.post("/start_weight_update"))[0] == 200
    asked = asyncio.ensure_future(all_of(engine, group(num_rollouts=3)))
    over_http = asyncio.ensure_future(
        http.post("/v1/completions", model=http.model, prompt=[1, 2], max_tokens=3)
    )
    # vLLM's routes to pause and resume make a 500 of every exception; the reason is in it.
    for refused, expected in (
        ("/resume", 500),
        ("/start_weight_update", 409),
        ("/sleep", 409),
        ("/wake_up?tags=weights", 409),
        ("/pause?mode=wait", 500),
    ):
        status, answer = await http.post(refused)
        assert (status, "is under way" in str(answer)) == (expected, True), (refused, answer)
    for method in ("start_weight_update", "update_weights", "reset_weights", "knapsack_x"):
        assert (await http.post("/collective_rpc", method=method))[0] == 400
    assert (await http.post("/collective_rpc", method="anything"))[0] == 409
    with pytest.raises(FailedPrecondition, match="through vLLM's transfer API is under way"):
        await engine.load_weights(other_folder, 1)
    assert not asked.done()
    assert not over_http.done()
    assert (await http.post("/update_weights", update_info={"path": str(other_folder)}))[0] == 200
    assert not asked.done()
    assert (await http.post("/finish_weight_update", weight_version="2"))[0] == 200
    (found,) = await asked
    assert {s.version for c in found for s in c.weights} == {2}
    assert (await over_http)[0] == 200


async def test_weights_that_nobody_knows_are_not_served(engine, http: Http, model_folder) -> None:
    """A failure half way, of which the old weights cannot be put back, refuses generation."""

    async def lost(method: str, *args: Any) -> Any:
        if method in ("knapsack_take_weights", "knapsack_restore_weights"):
            raise RuntimeError("the disk is gone")
        return await workers(method, *args)

    workers = engine.llm._workers
    engine.llm._workers = lost
    try:
        with pytest.raises(Unavailable, match=r"no weights serve.*the disk is gone"):
            await engine.load_weights(model_folder, 1)
    finally:
        del engine.llm._workers
    with pytest.raises(Exception, match="no weights serve until an update succeeds"):
        engine.generate(group())
    status, answer = await http.post("/v1/completions", model=http.model, prompt=[1], max_tokens=2)
    assert (status, "no weights serve" in str(answer)) == (503, True)
    await engine.load_weights(model_folder, 2)
    assert await greedy_of(engine) == greedy(model_folder, PROMPTS, 40)

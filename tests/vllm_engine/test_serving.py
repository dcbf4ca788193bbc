"""A step of training against real vLLM: unequal groups over gRPC, vLLM's HTTP beside it."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import openai
import pytest

from knapsack_genserver.server import Server
from knapsack_trainer_client.errors import GeneratorUnavailable, InvalidRequest
from knapsack_trainer_client.rollouts import AsyncRolloutClient, RolloutGroups

from small_engines import END, VOCABULARY, group
from vllm_http import Http
from vllm_models import idle, tiny_model, unequal

pytestmark = pytest.mark.asyncio(loop_scope="session")


def prompts_of(count: int) -> list[list[int]]:
    """Return prompts, no two alike."""
    draw = random.Random(3)
    return [[draw.randrange(VOCABULARY - 1) for _ in range(40)] for _ in range(count)]


def check(groups: RolloutGroups, sizes: list[int], max_tokens: int) -> None:
    """Every rollout asked for, once, and none that is no completion."""
    assert not groups.failed
    assert [len(rollouts) for rollouts in groups] == sizes
    for at, rollouts in enumerate(groups):
        assert [r.rollout_index for r in rollouts] == list(range(sizes[at]))
        for r in rollouts:
            assert (r.prompt_index, r.error) == (at, "")
            assert 1 <= len(r.token_ids) == len(r.logprobs) <= max_tokens
            assert all(p <= 0 for p in r.logprobs)
            stopped = r.token_ids[-1] == END
            assert r.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(r.token_ids) == max_tokens


async def test_2048_unequal_rollouts_before_during_and_after_an_update(
    engine, server: Server, tmp_path: Path
) -> None:
    """All of them, once each, and each says which weights made it."""
    sizes = unequal()
    prompts = prompts_of(len(sizes))
    tiny_model(seed=8).save_pretrained(tmp_path / "new")
    begun = asyncio.Event()
    async with AsyncRolloutClient(server.addresses["listen"]) as client:
        before = await client.generate(prompts, sizes, max_tokens=24, seed=1)
        check(before, sizes, 24)
        assert {r.weight_version for rollouts in before for r in rollouts} == {0}

        call = asyncio.ensure_future(
            client.generate(prompts, sizes, max_tokens=24, seed=1, on_rollout=lambda _: begun.set())
        )
        await begun.wait()
        await client.update_weights(tmp_path / "new", 7)
        during = await call
        check(during, sizes, 24)
        ways = {
            tuple(version for version, _, _ in r.weight_versions)
            for rollouts in during
            for r in rollouts
        }
        assert ways == {(0,), (0, 7), (7,)}

        after = await client.generate(prompts, sizes, max_tokens=24, seed=1)
        check(after, sizes, 24)
        assert {r.weight_version for rollouts in after for r in rollouts} == {7}
        # The same seeds: what ended before the update is as before, what began after it
        # as after.
        for position, rollouts in enumerate(during):
            for r, old, new in zip(rollouts, before[position], after[position], strict=True):
                spans = {version for version, _, _ in r.weight_versions}
                if len(spans) == 1:
                    assert r.token_ids == (old if spans == {0} else new).token_ids


async def test_logprobs_are_of_what_tokens_are_drawn_from(engine) -> None:
    """After temperature and top_k: of the kept tokens they are a whole distribution."""
    stream = engine.generate(group([3, 1, 4], 400, max_tokens=1, temperature=0.7, top_k=3, seed=2))
    of_token: dict[int, float] = {}
    async for c in stream:
        of_token.setdefault(c.token_ids[0], c.logprobs[0])
    assert len(of_token) == 3
    assert sum(2.718281828**p for p in of_token.values()) == pytest.approx(1, abs=1e-4)


async def test_one_call_of_10000_rollouts_of_one_prompt_harms_nobody(
    engine, server: Server
) -> None:
    """Another's small call is answered while it has hardly begun, and nothing is left of it."""
    address = server.addresses["listen"]
    came = 0
    begun = asyncio.Event()

    def count(_rollout: Any) -> None:
        nonlocal came
        came += 1
        begun.set()

    async with AsyncRolloutClient(address) as many, AsyncRolloutClient(address) as few:
        call = asyncio.ensure_future(
            many.generate([[1, 2]], [10_000], max_tokens=60, on_rollout=count)
        )
        await begun.wait()
        check(await few.generate([[5], [6]], [4, 2], max_tokens=8), [4, 2], 8)
        assert came < 5_000
        # The rest is one entry of a queue, not so many requests in vLLM.
        assert engine.llm.get_num_unfinished_requests() <= engine.status().capacity + 32
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await idle(engine)


async def test_what_waits_in_vllm_holds_up_no_other_call(engine) -> None:
    """A call that comes while another's rollouts wait there has the next free places."""
    places = engine.llm.vllm_config.scheduler_config.max_num_seqs
    # So that all are there before any begins.
    await engine.llm.pause_generation(mode="keep", clear_cache=False)
    order: list[int] = []

    async def read(request: int, stream: Any) -> None:
        async for _ in stream:
            order.append(request)

    calls = [(1, 4 * places), (2, 4)]
    streams = [(r, engine.generate(group(num_rollouts=n, request=r, seed=r))) for r, n in calls]
    readers = [asyncio.ensure_future(read(*each)) for each in streams]
    await engine.llm.resume_generation()
    await asyncio.gather(*readers)
    assert sorted(order) == [1] * 4 * places + [2] * 4
    last = max(at for at, request in enumerate(order) if request == 2)
    assert last < 2 * places


async def test_waves_share_a_prefix_and_a_stopped_group_leaves_the_engine(
    engine, server: Server
) -> None:
    """The second wave computes no whole block of its prompts anew; what is stopped is named."""
    prompts = prompts_of(3)
    async with AsyncRolloutClient(server.addresses["listen"]) as client:
        whole = await client.generate(prompts, [9, 5, 6], max_tokens=12, seed=3)
        assert await engine.llm.reset_prefix_cache()
        async with await client.session(max_tokens=12, seed=3) as session:
            await session.add([4, 2, 6], prompts)
            assert [len(g) for g in await session.collect()] == [4, 2, 6]
            before = engine.status().prefix_hit_tokens
            await session.add([5, 3, 0])
            assert [len(g) for g in await session.collect()] == [5, 3, 0]
            # A block is 32 tokens, and a prompt 40.
            assert engine.status().prefix_hit_tokens - before >= 8 * 32
            tokens = [[r.token_ids for r in rollouts] for rollouts in session.groups]
            assert tokens == [[r.token_ids for r in rollouts] for rollouts in whole]
            await session.add([0, 0, 5_000])
            stopped = await session.stop([2])
            assert await idle(engine)
            came = [r async for r in session]
            assert stopped == len(session.groups.stopped) > 1_000
            assert len(came) == 5_000 - stopped


async def test_deadline_and_death_of_a_client_free_the_engine(engine, server: Server) -> None:
    """Nothing is left to do for it, though it had asked for minutes of work."""
    address = server.addresses["listen"]
    async with AsyncRolloutClient(address) as client:
        with pytest.raises(GeneratorUnavailable, match="DEADLINE_EXCEEDED"):
            await client.generate([[1]] * 64, [64] * 64, max_tokens=200, timeout=1.0)
        assert await idle(engine)
    program = (
        "import sys\n"
        "from knapsack_trainer_client.rollouts import RolloutClient\n"
        "client = RolloutClient(sys.argv[1])\n"
        "for r in client.stream([[1]] * 64, [64] * 64, max_tokens=200):\n"
        "    print('came', flush=True)\n"
    )
    dying = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, address, stdout=subprocess.PIPE
    )
    assert dying.stdout is not None
    assert await asyncio.wait_for(dying.stdout.readline(), 60) == b"came\n"
    assert engine.status().running > 0
    dying.send_signal(signal.SIGKILL)
    await dying.wait()
    assert await idle(engine)


async def test_requests_that_cannot_be_served_are_refused_and_the_server_stays(
    engine, server: Server
) -> None:
    """The field, the value and what is allowed."""
    async with AsyncRolloutClient(server.addresses["listen"]) as client:
        with pytest.raises(InvalidRequest, match="the model holds 256"):
            await client.generate([[1] * 256], [1])
        with pytest.raises(InvalidRequest, match=r"23: must be from 0 to 22"):
            await client.generate([[23]], [1])
        with pytest.raises(InvalidRequest, match="tokenizer"):
            await client.generate(["a text"], [1])
        check(await client.generate([[1] * 255], [3], max_tokens=9), [3], 1)


async def test_an_aborted_rollout_is_no_completion(engine, http: Http) -> None:
    """What a trainer aborts over HTTP arrives, and says so."""
    stream = engine.generate(group(num_rollouts=300, max_tokens=200))
    first = await anext(aiter(stream))
    status, answer = await http.post("/abort_requests")
    assert status == 200
    assert answer["aborted"] > 0
    rest = [c async for c in stream]
    assert len([first, *rest]) == 300
    assert {c.reason.value for c in rest} >= {"abort"}
    assert all(not c.error for c in rest)


async def test_the_plain_openai_client(engine, http: Http) -> None:
    """Unchanged, on the same engine."""
    async with openai.AsyncOpenAI(base_url=f"{http.base}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == [http.model]
        answer = await client.completions.create(
            model=http.model,
            prompt=[1, 2, 3],
            n=5,
            max_tokens=6,
            seed=1,
            extra_body={"return_token_ids": True},
        )
        assert len(answer.choices) == 5
        for choice in answer.choices:
            assert 1 <= len(choice.token_ids) <= 6


async def test_tokens_in_and_tokens_out_over_http(engine, http: Http) -> None:
    """/inference/v1/generate gives what gRPC's engine gives with the same seed."""
    status, answer = await http.post(
        "/inference/v1/generate",
        model=http.model,
        token_ids=[5, 6],
        sampling_params={"n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 40},
    )
    assert status == 200, answer
    found = [c async for c in engine.generate(group([5, 6], 3, seed=40, max_tokens=12))]
    found.sort(key=lambda c: c.index)
    assert [c["token_ids"] for c in answer["choices"]] == [c.token_ids for c in found]


async def test_trl_s_own_vllm_client(engine, http: Http, tmp_path: Path) -> None:
    """What of it runs without CUDA: everything but the NCCL transfer itself.

    Its weight_update context, whose tensors need NCCL, is driven with a folder.
    """
    with warnings.catch_warnings():
        # TRL has been tried with older versions of vLLM.
        warnings.simplefilter("ignore")
        from trl.generation.vllm_client import VLLMClient

    def use() -> None:
        client = VLLMClient(base_url=http.base)
        assert client.model == http.model
        assert client.get_world_size() == 1
        info = client.get_server_info()
        assert info["weight_transfer_config"]["backend"] == "safetensors"
        assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
        answer = client.generate([[1, 2], [3]], n=4, max_tokens=5)
        assert answer["prompt_ids"] == [[1, 2], [3]]
        assert len(answer["completion_ids"]) == len(answer["logprobs"]) == 8
        for ids, logprobs in zip(answer["completion_ids"], answer["logprobs"], strict=True):
            assert 1 <= len(ids) == len(logprobs) <= 5
        with pytest.raises(NotImplementedError):
            client.init_communicator(device="cpu")
        client._start_weight_update()
        client._post(f"{client.base_url}/update_weights", json={"update_info": {"path": str(new)}})
        client._finish_weight_update()
        client.reset_prefix_cache()
        client.generate([[1, 2]], n=2, max_tokens=3)

    new = tmp_path / "new"
    tiny_model(seed=3).save_pretrained(new)
    await asyncio.to_thread(use)
    # It names no version: that of the old weights and one more.
    assert engine.status().weight_version == 1


async def test_metrics_of_both_are_on_one_page(engine, server: Server) -> None:
    """vLLM's and ours, on the admin port."""
    [c async for c in engine.generate(group(num_rollouts=3))]
    url = f"http://{server.addresses['admin']}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    for name in ("vllm:generation_tokens_total", "vllm:num_requests_running"):
        assert f"\n{name}{{" in page
    assert "\nknapsack_genserver_weight_version " in page
    assert "_created" not in page
    status = engine.status()
    assert status.prefix_queried_tokens > status.prefix_hit_tokens > 0

"""The engine remote on a vLLM server that a user runs: vLLM's own, in its own process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from knapsack_genserver.engine import Completion
from knapsack_genserver.engines.remote.engine import RemoteOptions
from knapsack_genserver.engines.remote.pool import remote_pool
from knapsack_genserver.errors import FailedPrecondition
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool

from held_port import HeldPort
from small_engines import all_of, group
from vllm_models import greedy, tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="session")

POOL = PoolOptions(piece_rollouts=8)


@pytest.fixture(scope="module")
def plain_url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server with the flags that our documentation asks for."""
    port = HeldPort()
    log = tmp_path_factory.mktemp("plain") / "log"
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = [
        f"--model={model_folder}",
        "--served-model-name=tiny",
        f"--port={port.number}",
        "--host=127.0.0.1",
        "--skip-tokenizer-init",
        "--enforce-eager",
        "--dtype=float32",
        "--block-size=32",
        "--max-num-seqs=64",
        "--distributed-executor-backend=uni",
        "--enable-scale-out",
        "--logprobs-mode=processed_logprobs",
        '--weight-transfer-config={"backend": "safetensors"}',
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command + flags,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://{port.address}"
    try:
        while not _answers(url):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                raise AssertionError(log.read_text()[-3000:])
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        port.close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


@pytest_asyncio.fixture(loop_scope="session")
async def pool(plain_url: str, model_folder: Path) -> AsyncIterator[ReplicaPool]:
    """An engine of that one server."""
    made = remote_pool([plain_url], RemoteOptions(""), POOL, model_folder)
    await made.start()
    yield made
    await made.close()


def tokens(found: list[list[Completion]]) -> list[list[list[int]]]:
    """Return the tokens of groups of rollouts."""
    return [[c.token_ids for c in rollouts] for rollouts in found]


async def test_unequal_groups(pool: ReplicaPool, plain_url: str, model_folder: Path) -> None:
    """Each rollout once, and the same whether its group goes in pieces or whole."""
    sizes = [2, 128, 3, 40, 1]
    groups = [group([k + 1, k + 2], n, seed=k, max_tokens=12) for k, n in enumerate(sizes)]
    found = await all_of(pool, *groups)
    assert [[c.index for c in rollouts] for rollouts in found] == [list(range(n)) for n in sizes]
    for completion in (c for rollouts in found for c in rollouts):
        assert completion.error == ""
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= 12
        assert [(s.version, s.start, s.end) for s in completion.weights] == [
            (0, 0, len(completion.token_ids))
        ]
    assert len({tuple(t) for t in tokens(found)[1]}) > 20
    whole = remote_pool([plain_url], RemoteOptions(""), PoolOptions(piece_rollouts=64))
    await whole.start()
    assert tokens(await all_of(whole, *groups)) == tokens(found)
    await whole.close()


async def test_new_weights_and_refused_ones(pool: ReplicaPool, tmp_path: Path) -> None:
    """What it then generates is what Hugging Face does with them."""
    for seed, name in enumerate(["old", "new"]):
        tiny_model(seed).save_pretrained(tmp_path / name)
    prompt = group([1, 2, 3], 3, temperature=0.0, max_tokens=12)
    (before,) = await all_of(pool, prompt)
    (wanted,) = greedy(tmp_path / "old", [[1, 2, 3]], 12)
    assert [c.token_ids for c in before] == [wanted] * 3
    long = [pool.generate(group([k + 1], 40, seed=k, max_tokens=40)) for k in range(4)]
    loaded = await pool.load_weights(tmp_path / "new", 3)
    during = [c for stream in long for c in [c async for c in stream]]
    assert len(during) == 160
    assert {s.version for c in during for s in c.weights} <= {0, 3}
    (after,) = await all_of(pool, prompt)
    (wanted,) = greedy(tmp_path / "new", [[1, 2, 3]], 12)
    assert [c.token_ids for c in after] == [wanted] * 3
    assert {s.version for c in after for s in c.weights} == {loaded.version} == {3}
    with pytest.raises(FailedPrecondition, match="the old weights serve"):
        await pool.load_weights(tmp_path / "none", 4)
    (same,) = await all_of(pool, prompt)
    assert tokens([same]) == tokens([after])
    assert {s.version for c in same for s in c.weights} == {3}
    await pool.load_weights(tmp_path / "old", 5)
    assert tokens(await all_of(pool, prompt)) == tokens([before])


async def test_closing_an_iterator_frees_the_server(pool: ReplicaPool, plain_url: str) -> None:
    """VLLM itself says that nothing runs."""

    def unfinished() -> float:
        with urllib.request.urlopen(f"{plain_url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))

    stream = pool.generate(group([5], 3000, max_tokens=60))
    await anext(aiter(stream))
    assert await asyncio.to_thread(unfinished) > 0
    await stream.aclose()
    async with asyncio.timeout(60):
        while await asyncio.to_thread(unfinished):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert len((await all_of(pool, group(num_rollouts=5)))[0]) == 5


async def test_what_vllm_refuses_is_said(pool: ReplicaPool) -> None:
    """A prompt longer than the model's context, in vLLM's words."""
    bad, good = await all_of(pool, group([1] * 300, 2), group([1], 2))
    assert {c.error for c in good} == {""}
    assert all("400: " in c.error and not c.token_ids for c in bad)

"""The same unequal rollouts from one vLLM engine, through every door, as ratios.

    make bench-vllm

256 prompts of 200 tokens, 2 to 128 rollouts each, 2,048 in all, of 32 tokens each, from a
random model of 4 layers that knows no end token. One engine, in this process, serves all
ways in turn. In a round all ways have the same prompts, rollouts and seeds, and begin with
an empty prefix cache, so their work is the same:

- raw: AsyncLLM called in this process, one request with n per prompt. Clients of the other
  ways are processes of their own, as a trainer is.
- gRPC: our server.
- HTTP n: vLLM's /inference/v1/generate, one request with n per prompt.
- HTTP 1: the same with one request per rollout, 256 connections.
- gRPC even: our server, 8 rollouts of each prompt: what unequal groups cost.

Every round has raw and gRPC, in changing order, and one of the others in turn; so other
load on the machine falls on all of them. Prints per way tokens per second, time to the last
rollout and to 95 % of them, each over raw's of the same round: the median over rounds, and
the interval that holds the true median with 95 % confidence, or all there is where the
rounds are fewer than six.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS, TOTAL, LENGTH, TOKENS, VOCABULARY = 256, 2048, 200, 32, 320
SEED = 5
OTHERS = ("HTTP n", "gRPC even", "HTTP 1")


def sizes_of(even: bool) -> list[int]:
    if even:
        return [TOTAL // PROMPTS] * PROMPTS
    draw = random.Random(7)
    sizes = [2] * PROMPTS
    while sum(sizes) < TOTAL:
        at = min(int(draw.expovariate(1 / 12)), PROMPTS - 1)
        sizes[at] = min(sizes[at] + draw.randint(1, 16), 128, sizes[at] + TOTAL - sum(sizes))
    draw.shuffle(sizes)
    return sizes


def prompts_of(round_number: int) -> list[list[int]]:
    """The prompts of a round, no two alike."""
    draw = random.Random(round_number)
    return [[draw.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(PROMPTS)]


def model(folder: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def seeds() -> list[int]:
    """The seed of each prompt's first rollout in vLLM, as our server has it."""
    from knapsack_genserver.seeds import group_seeds

    return [seed % 2**62 for seed in group_seeds(SEED, 0, PROMPTS)]


async def raw(engine: Any, prompts: list[list[int]], sizes: list[int]) -> dict[str, Any]:
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    came: list[float] = []
    tokens = 0
    drawn = seeds()
    start = time.perf_counter()

    async def one(at: int) -> None:
        nonlocal tokens
        params = SamplingParams(
            n=sizes[at],
            seed=drawn[at],
            max_tokens=TOKENS,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(prompts[at])
        async for output in engine.llm.generate(prompt, params, f"raw-{start}-{at}"):
            for part in output.outputs:
                came.append(time.perf_counter() - start)
                tokens += len(part.token_ids)

    await asyncio.gather(*(one(at) for at in range(len(prompts))))
    return {"came": came, "tokens": tokens}


def over_grpc(address: str, prompts: list[list[int]], sizes: list[int]) -> dict[str, Any]:
    from knapsack_trainer_client.rollouts import RolloutClient

    came: list[float] = []
    with RolloutClient(address, timeout=60) as client:
        client.status()
        start = time.perf_counter()
        groups = client.generate(
            prompts,
            sizes,
            max_tokens=TOKENS,
            seed=SEED,
            on_rollout=lambda _: came.append(time.perf_counter() - start),
        )
    assert not groups.failed
    return {"came": came, "tokens": sum(len(r.token_ids) for group in groups for r in group)}


async def over_http(
    address: str, prompts: list[list[int]], sizes: list[int], whole: bool
) -> dict[str, Any]:
    import aiohttp

    came: list[float] = []
    tokens = 0
    drawn = seeds()
    limit = aiohttp.TCPConnector(limit=256)
    async with aiohttp.ClientSession(connector=limit, timeout=aiohttp.ClientTimeout(1200)) as http:
        start = time.perf_counter()

        async def one(at: int, first: int, n: int) -> None:
            nonlocal tokens
            body = {
                "token_ids": prompts[at],
                "sampling_params": {
                    "n": n,
                    "max_tokens": TOKENS,
                    "seed": drawn[at] + first,
                    "temperature": 1.0,
                    "logprobs": 0,
                },
            }
            url = f"http://{address}/inference/v1/generate"
            for _ in range(5):
                try:
                    async with http.post(url, json=body) as response:
                        answer = await response.json()
                    break
                except aiohttp.ClientError:
                    continue
            for choice in answer["choices"]:
                came.append(time.perf_counter() - start)
                tokens += len(choice["token_ids"])

        if whole:
            asked = [one(at, 0, n) for at, n in enumerate(sizes)]
        else:
            asked = [one(at, k, 1) for at, n in enumerate(sizes) for k in range(n)]
        await asyncio.gather(*asked)
    return {"came": came, "tokens": tokens}


async def client(way: str, addresses: dict[str, str], seed: int) -> dict[str, Any]:
    """Run one way's client as a process of its own; returns what it measured."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        f"--client={way}",
        f"--addresses={json.dumps(addresses)}",
        f"--seed={seed}",
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


def run_client(way: str, addresses: dict[str, str], seed: int) -> None:
    prompts, sizes = prompts_of(seed), sizes_of(way == "gRPC even")
    if way.startswith("gRPC"):
        found = over_grpc(addresses["listen"], prompts, sizes)
    else:
        found = asyncio.run(over_http(addresses["http"], prompts, sizes, way == "HTTP n"))
    print(json.dumps(found))


async def bench(rounds: int) -> None:
    import psutil

    from knapsack_genserver.engines.vllm.engine import VllmEngine, VllmOptions
    from knapsack_genserver.server import Server, ServerOptions

    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder))
        engine = VllmEngine(
            VllmOptions(Path(folder), ["--dtype=float32"], log_format="text", log_level="error")
        )
        options = ServerOptions(*["127.0.0.1:0"] * 3, http_listen="127.0.0.1:0")
        server = Server(engine, options)
        await server.start()
        ways = ("raw", "gRPC", *OTHERS)
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        speeds = []
        for number in range(rounds + 1):
            # The first round has all ways and warms up what is compiled or allocated once.
            both = ["raw", "gRPC"] if number % 2 else ["gRPC", "raw"]
            now = [*both, *((OTHERS[number % len(OTHERS)],) if number else OTHERS)]
            found = {}
            for way in now:
                assert await engine.llm.reset_prefix_cache()
                if way == "raw":
                    came = await raw(engine, prompts_of(number), sizes_of(False))
                else:
                    came = await client(way, server.addresses, number)
                found[way] = _figures(way, came)
            last = ", ".join(f"{way} {each['last']:.1f}" for way, each in found.items())
            print(f"round {number}: seconds to the last rollout: {last}", file=sys.stderr)
            if number:
                speeds.append(found["raw"]["tokens/s"])
                for way in now:
                    ratios = {
                        what: value / found["raw"][what] for what, value in found[way].items()
                    }
                    measured[way].append(ratios)
        own = psutil.Process()
        memory = sum(p.memory_info().rss for p in [own, *own.children(recursive=True)])
        await server.stop(0.0)
    print(f"{'over raw':12}{'rounds':>6}" + "".join(f"{what:>20}" for what in FIGURES))
    for way in ways[1:]:
        shown = [_shown([one[what] for one in measured[way]]) for what in FIGURES]
        print(f"{way:12}{len(measured[way]):6}" + "".join(f"{text:>20}" for text in shown))
    print(
        f"raw made {statistics.median(speeds):.0f} tokens/s here; engine and server hold "
        f"{memory / 2**30:.1f} GiB"
    )


FIGURES = ("tokens/s", "last", "95 %")


def _figures(way: str, found: dict[str, Any]) -> dict[str, float]:
    came = sorted(found["came"])
    assert len(came) == TOTAL, (way, len(came))
    assert found["tokens"] == TOTAL * TOKENS, (way, found["tokens"])
    return {
        "tokens/s": found["tokens"] / came[-1],
        "last": came[-1],
        "95 %": came[int(0.95 * TOTAL) - 1],
    }


def _shown(values: list[float]) -> str:
    """Return the median and the interval of it that the module describes."""
    if not values:
        return "-"
    ordered = sorted(values)
    size, outside = len(ordered), 0
    # The true median is below the k-th of the ordered values with this probability.
    while outside < size // 2 and (
        2 * sum(math.comb(size, k) for k in range(outside + 2)) / 2**size <= 0.05
    ):
        outside += 1
    low, high = ordered[outside], ordered[-1 - outside]
    return f"{statistics.median(ordered):.2f} ({low:.2f}..{high:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--client")
    parser.add_argument("--addresses", type=json.loads)
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    if given.client:
        run_client(given.client, given.addresses, given.seed)
    else:
        asyncio.run(bench(given.rounds))

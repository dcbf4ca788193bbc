"""What a rollout costs on its way through the generation server, without a model.

    python tests/benchmarks/bench_generation_service.py [--rollouts 8192] [--tokens 32]

Two servers, each a process of its own, send the same rollouts to the same client: a bare
grpc.aio stream of a Rollout message that was made beforehand; ours by Generate; ours by
GenerateSession, read bare and by RolloutClient. Ours has an engine that makes its
completions beforehand too and finishes some at every turn of the event loop, so what is
above the bare stream is our own work: admission, fairness, messages, metrics. Rounds
alternate between the servers, and the figure is processor time per rollout, which other
programs on the machine disturb less than the clock.

Then a small transformer is asked for unequal groups, directly and through gRPC in turns:
tokens per second, and the time to the last rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil

from knapsack_genserver.engine import (
    Completion,
    Engine,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    WeightSpan,
)
from knapsack_genserver.inbox import Inbox
from knapsack_genserver.server import ServerOptions, serve
from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc
from knapsack_trainer_client import RolloutClient

OPTIONS = [("grpc.max_receive_message_length", 2**26), ("grpc.max_send_message_length", 2**26)]
PROMPTS = 256
ANY_PORT = "127.0.0.1:0"


def unequal(prompts: int, rollouts: int, seed: int = 0) -> list[int]:
    """Sizes from 2 to 128 with a heavy tail, which add up."""
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0.0, 1.2, prompts)
    sizes = np.clip((weights / weights.sum() * rollouts).astype(int), 2, 128)
    while sizes.sum() != rollouts:
        sizes[rng.integers(prompts)] += np.sign(rollouts - sizes.sum())
        sizes = np.clip(sizes, 2, 128)
    return sizes.tolist()


class ReadyEngine:
    """Finishes so many rollouts, made beforehand, at every turn of the event loop."""

    name = "ready"
    tokenizer = None

    def __init__(self, tokens: int, at_once: int) -> None:
        self._ids = list(range(tokens))
        self._logprobs = [-0.5] * tokens
        self._spans = (WeightSpan(0, 0, tokens),)
        self._at_once = at_once
        self._held: list[tuple[Inbox, int]] = []
        self._turning = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def generate(self, group: Group) -> Inbox:
        inbox = Inbox(group.num_rollouts, lambda: None)
        first = group.first_index
        self._held += [(inbox, index) for index in range(first, first + group.num_rollouts)]
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        return inbox

    def _turn(self) -> None:
        for inbox, index in self._held[: self._at_once]:
            reason = FinishReason.LENGTH
            inbox.put([Completion(index, self._ids, self._logprobs, reason, self._spans)])
        del self._held[: self._at_once]
        self._turning = bool(self._held)
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        return LoadedWeights(version, "")

    def status(self) -> EngineStatus:
        return EngineStatus("ready", 0, 1, len(self._held), 0, 0, 32_000)


class Bare(rpc.RolloutGeneratorServicer):
    """Sends the messages and does nothing else."""

    def __init__(self, tokens: int) -> None:
        self._message = {
            "token_ids": list(range(tokens)),
            "logprobs": [-0.5] * tokens,
            "finish_reason": pb.FINISH_REASON_LENGTH,
            "weight_versions": [pb.WeightSpan(weight_version=0, start=0, end=tokens)],
        }

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.Rollout]:
        message = pb.Rollout(**self._message)
        for size in request.num_rollouts:
            for _ in range(size):
                yield message


async def serve_bare(tokens: int) -> None:
    server = grpc.aio.server(options=OPTIONS)
    rpc.add_RolloutGeneratorServicer_to_server(Bare(tokens), server)
    port = server.add_insecure_port(ANY_PORT)
    await server.start()
    print(json.dumps({"listen": f"127.0.0.1:{port}"}), flush=True)
    await server.wait_for_termination()


@contextmanager
def server(*flags: str) -> Iterator[tuple[psutil.Process, str]]:
    command = [sys.executable, __file__, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield psutil.Process(process.pid), json.loads(process.stdout.readline())["listen"]
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def request_of(sizes: list[int], max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[k % 20 + 1] * 8)) for k in range(len(sizes))],
        num_rollouts=sizes,
        sampling=pb.SamplingParams(max_tokens=max_tokens, seed=1),
    )


def by_generate(stub: Any, request: pb.GenerateRequest) -> int:
    return sum(1 for _ in stub.Generate(request))


def by_session(stub: Any, request: pb.GenerateRequest) -> int:
    add = pb.AddRollouts(prompts=request.prompts, num_rollouts=request.num_rollouts)
    requests = [
        pb.GenerateSessionRequest(open=pb.OpenSession(sampling=request.sampling)),
        pb.GenerateSessionRequest(add=add),
    ]
    return sum(len(response.rollouts) for response in stub.GenerateSession(iter(requests)))


def by_client(client: RolloutClient, request: pb.GenerateRequest) -> int:
    prompts = [list(prompt.tokens.ids) for prompt in request.prompts]
    groups = client.generate(
        prompts, request.num_rollouts, max_tokens=request.sampling.max_tokens, seed=1
    )
    return sum(map(len, groups))


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def compare(rollouts: int, tokens: int, at_once: int, rounds: int) -> None:
    request = request_of(unequal(PROMPTS, rollouts), tokens)
    with (
        server("--serve=bare", f"--tokens={tokens}") as bare,
        server("--serve=ours", f"--tokens={tokens}", f"--at-once={at_once}") as ours,
        grpc.insecure_channel(bare[1], OPTIONS) as bare_channel,
        grpc.insecure_channel(ours[1], OPTIONS) as ours_channel,
    ):
        bare_stub = rpc.RolloutGeneratorStub(bare_channel)
        ours_stub = rpc.RolloutGeneratorStub(ours_channel)
        client = RolloutClient(ours[1])
        ways = {
            "bare stream": (bare[0], lambda: by_generate(bare_stub, request)),
            "Generate": (ours[0], lambda: by_generate(ours_stub, request)),
            "GenerateSession": (ours[0], lambda: by_session(ours_stub, request)),
            "RolloutClient": (ours[0], lambda: by_client(client, request)),
        }
        used: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, (process, way) in ways.items():
                before, ours_before = cpu_seconds(process), time.process_time()
                assert way() == rollouts
                costs = cpu_seconds(process) - before, time.process_time() - ours_before
                if turn:
                    used[name].append((costs[0] / rollouts, costs[1] / rollouts))
        client.close()
    print(f"{rollouts} rollouts of {tokens} tokens, {at_once} at once; us of CPU per rollout:")
    unit = 0.0
    for name, values in used.items():
        served, asked = (1e6 * statistics.median(column) for column in zip(*values, strict=True))
        unit = unit or served
        print(f"  {name:<16} server {served:>6.1f} {served / unit:>6.2f}x   client {asked:>6.1f}")


async def raw(engine: Engine, groups: list[Group]) -> tuple[float, float, int]:
    """Ask the engine for everything at once; returns seconds to 95 % and to all, and tokens."""
    start, times, tokens = time.perf_counter(), list[float](), 0

    async def read(stream: Any) -> None:
        nonlocal tokens
        async for completion in stream:
            times.append(time.perf_counter() - start)
            tokens += len(completion.token_ids)

    await asyncio.gather(*[read(stream) for stream in [engine.generate(g) for g in groups]])
    times.sort()
    return times[int(0.95 * (len(times) - 1))], times[-1], tokens


async def through(address: str, request: pb.GenerateRequest) -> tuple[float, float, int]:
    """Ask the server for the same; returns the same."""
    start, times, tokens = time.perf_counter(), list[float](), 0
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        stub = rpc.RolloutGeneratorStub(channel)
        start = time.perf_counter()
        async for rollout in stub.Generate(request):
            times.append(time.perf_counter() - start)
            tokens += len(rollout.token_ids)
    return times[int(0.95 * (len(times) - 1))], times[-1], tokens


async def with_a_model(rollouts: int, tokens: int, rounds: int) -> None:
    """The same engine in this process, asked directly and through its own gRPC port."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from knapsack_genserver import seeds
    from knapsack_genserver.engine import Sampling
    from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
    from knapsack_genserver.server import Server

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, bos_token_id=None, eos_token_id=511, pad_token_id=None,
    )  # fmt: skip
    sizes = unequal(PROMPTS, rollouts)
    request = request_of(sizes, tokens)
    found: dict[str, list[tuple[float, float, int]]] = {"raw engine": [], "through gRPC": []}
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(config).save_pretrained(folder)
        engine = TransformersEngine(TransformersOptions(Path(folder), max_batch_rollouts=256))
        options = ServerOptions(ANY_PORT, ANY_PORT, ANY_PORT)
        served = Server(engine, options)
        await served.start()
        groups = [
            Group(list(p.tokens.ids), n, Sampling(tokens), seed)
            for p, n, seed in zip(
                request.prompts, sizes, seeds.group_seeds(1, 0, len(sizes)), strict=True
            )
        ]
        for turn in range(rounds + 1):
            direct = await raw(engine, groups)
            served_ = await through(served.addresses["listen"], request)
            assert direct[2] == served_[2]
            if turn:
                found["raw engine"].append(direct)
                found["through gRPC"].append(served_)
        await served.stop(0)
    print(f"{rollouts} rollouts in groups of 2 to 128, up to {tokens} tokens, small transformer:")
    rates = {}
    for name, values in found.items():
        to_95, last, count = (statistics.median(column) for column in zip(*values, strict=True))
        rates[name] = count / last, last
        rate = f"{count / last:.0f} tokens/s"
        print(f"  {name:<16} {rate:>15}, 95 % after {to_95:.2f} s, all after {last:.2f} s")
    ratio, last = (a / b for a, b in zip(rates["through gRPC"], rates["raw engine"], strict=True))
    print(f"  through gRPC / raw: {ratio:.3f}x tokens/s, {last:.3f}x time to the last rollout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-model", action="store_true", help="only the cost of the service")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--at-once", type=int, default=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "bare":
        asyncio.run(serve_bare(options.tokens))
    elif options.serve == "ours":
        engine = ReadyEngine(options.tokens, options.at_once)
        asyncio.run(serve(engine, ServerOptions(ANY_PORT, ANY_PORT, ANY_PORT)))
    else:
        for at_once in (1, 16):
            compare(options.rollouts, options.tokens, at_once, options.rounds)
        if not options.no_model:
            asyncio.run(with_a_model(2048, options.tokens, max(2, options.rounds // 2)))


if __name__ == "__main__":
    main()

"""The real generation server, called by the real client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from knapsack_trainer_client.errors import (
    GeneratorBusy,
    GeneratorUnavailable,
    InvalidRequest,
    WeightUpdateFailed,
)
from knapsack_trainer_client.rollouts import AsyncRolloutClient, Rollout, RolloutClient

from small_engines import END, small_model


def metrics(generator: Any) -> dict[str, float]:
    """Return the server's metrics by name, summed over labels."""
    with urllib.request.urlopen(f"http://{generator.addresses['admin']}/metrics") as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_unequal_groups_and_new_weights(start_generator, model_folder, tmp_path: Path) -> None:
    """A step of training: groups as allocated, streamed, and then other weights."""
    generator = start_generator(f"--model={model_folder}")
    came: list[Rollout] = []
    with RolloutClient(generator.addresses["listen"]) as client:
        status = client.status()
        assert (status.engine, status.weight_version) == ("transformers", 0)
        sizes = [2, 128, 0, 5]
        prompts = [[1], [2, 3], [4], [5, 6, 7]]
        groups = client.generate(prompts, sizes, max_tokens=6, seed=5, on_rollout=came.append)
        assert [len(group) for group in groups] == sizes
        assert not groups.failed
        assert sorted(map(id, came)) == sorted(id(r) for group in groups for r in group)
        for at, group in enumerate(groups):
            assert [r.rollout_index for r in group] == list(range(sizes[at]))
            for r in group:
                assert (r.prompt_index, r.weight_version, r.error) == (at, 0, "")
                assert len(r.token_ids) == len(r.logprobs)
                assert r.finish_reason == ("stop" if r.token_ids[-1] == END else "length")
        small_model(seed=1).save_pretrained(tmp_path / "new")
        client.update_weights(tmp_path / "new", 9)
        after = client.generate(prompts, sizes, max_tokens=6, seed=5)
        assert {r.weight_version for group in after for r in group} == {9}
        assert [r.token_ids for r in after[1]] != [r.token_ids for r in groups[1]]
        assert client.status().weight_version == 9

        with pytest.raises(WeightUpdateFailed, match="not a folder"):
            client.update_weights(tmp_path / "none", 10)
        with pytest.raises(InvalidRequest, match=r"num_rollouts\[0\] = -1"):
            client.generate(prompts, [-1, 1, 1, 1])
        with pytest.raises(InvalidRequest, match="prompt_ids"):
            client.generate(prompts, sizes, prompt_ids=["a"])
    found = metrics(generator)
    assert found["knapsack_genserver_rollouts_total"] == 270
    assert generator.end() == 0
    for line in generator.log().splitlines():
        assert json.loads(line)["level"]


def test_a_caller_that_leaves_stops_the_work(start_generator, model_folder) -> None:
    """Closing the stream, an exception in on_rollout, a timeout: the server is idle after."""
    generator = start_generator(f"--model={model_folder}", "--max-batch-rollouts=32")
    many = {"prompts": [[1], [2]], "num_rollouts": [40_000, 40_000]}

    class Enough(Exception):
        pass

    def stop(_rollout: Rollout) -> None:
        raise Enough

    with RolloutClient(generator.addresses["listen"]) as client:
        with pytest.raises(Enough):
            client.generate(**many, max_tokens=50, on_rollout=stop)
        with pytest.raises(GeneratorUnavailable, match="DEADLINE_EXCEEDED"):
            client.generate(**many, max_tokens=50, timeout=0.5)
        stream = client.stream(**many, max_tokens=50)
        next(stream)
        stream.close()
        # Served at once, which a queue of 80,000 would not allow.
        assert len(client.generate([[3]], [4], max_tokens=5, timeout=30)[0]) == 4
        # What was left last may have a chunk in the batch that runs.
        end = time.monotonic() + 60
        while client.status().waiting_rollouts:
            assert time.monotonic() < end


def test_failures_and_refusals_of_the_client(start_generator) -> None:
    """A full queue and a server that is not there have names of their own."""
    generator = start_generator("--engine=fake", "--max-waiting-rollouts=10")
    address = generator.addresses["listen"]
    with RolloutClient(address) as client:
        assert len(client.generate([[1]], [10], max_tokens=3)[0]) == 10
        with pytest.raises(GeneratorBusy, match="at most 10"):
            client.generate([[1]], [11], max_tokens=3)
        with pytest.raises(InvalidRequest, match="tokenizer"):
            client.generate(["text"], [1], max_tokens=3)
    assert generator.end() == 0
    with (
        RolloutClient(address, timeout=0.3) as client,
        pytest.raises(GeneratorUnavailable, match=r"no generation server answered .* 0\.3 s"),
    ):
        client.status()


async def test_the_asynchronous_client(start_generator, model_folder, tmp_path: Path) -> None:
    """The same answers; cancelling a call stops its work."""
    generator = start_generator(f"--model={model_folder}", "--max-batch-rollouts=32")
    begun = threading.Event()
    async with AsyncRolloutClient(generator.addresses["listen"]) as client:
        groups = await client.generate([[1], [2]], [3, 1], max_tokens=4)
        assert [len(g) for g in groups] == [3, 1]
        call = asyncio.ensure_future(
            client.generate([[1]], [50_000], max_tokens=60, on_rollout=lambda _: begun.set())
        )
        assert await asyncio.to_thread(begun.wait, 60)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        small_model(seed=2).save_pretrained(tmp_path / "new")
        await client.update_weights(tmp_path / "new", 3)
        await asyncio.wait_for(client.generate([[1]], [2], max_tokens=4), 60)
        async with asyncio.timeout(60):
            while (await client.status()).waiting_rollouts:
                pass
        assert (await client.status()).weight_version == 3


def test_health_follows_the_server(start_generator) -> None:
    """Ready while it serves, on the API's port and on the probes'."""
    generator = start_generator("--engine=fake")
    for port in ("listen", "health"):
        with grpc.insecure_channel(generator.addresses[port]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "liveness", "knapsack_proto.v1.RolloutGenerator"):
                status = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
                assert status == health_pb2.HealthCheckResponse.SERVING
    with urllib.request.urlopen(f"http://{generator.addresses['admin']}/readyz") as answer:
        assert answer.status == 200


def test_it_says_why_it_does_not_start(tmp_path: Path) -> None:
    """One line, exit code 2, no traceback."""

    def refused(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "knapsack_genserver.cli", "serve", *flags],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")]
    assert "--model DIR" in refused()
    assert "no config.json" in refused(f"--model={tmp_path}", *ports)
    assert "--insecure" in refused("--engine=fake", "--listen=0.0.0.0:0")
    assert "HOST:PORT" in refused("--engine=fake", *ports, "--admin-listen=9000")
    assert "invalid choice" in refused("--engine=other")
    assert "max-batch-rollouts" in refused("--engine=fake", "--max-batch-rollouts=0")

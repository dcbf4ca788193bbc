"""A really trained model with tied embeddings, behind the command as a user starts it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from knapsack_genserver.engines.vllm.flags import parse
from knapsack_genserver.errors import ConfigError
from knapsack_trainer_client.errors import WeightUpdateFailed
from knapsack_trainer_client.rollouts import RolloutClient

from held_port import HeldPort
from smollm2 import convert
from vllm_models import greedy, unequal

COMMAND = [sys.executable, "-m", "knapsack_genserver.cli", "serve", "--engine=vllm"]
FLAGS = ["--dtype=float32", "--max-model-len=512", "--max-num-seqs", "64"]
CHAT = [[{"role": "user", "content": "What is the capital of France?"}]]
PROMPTS = ["The three primary colours are", "def add(a, b):\n", "Once upon a time"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model on disk, converted once per environment."""
    made = Path(sys.prefix) / "smollm2"
    convert(made)
    return made


@pytest.fixture(scope="module")
def serving(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The addresses of a served model, its process, and how ready it was while it loaded."""
    log = tmp_path_factory.mktemp("log") / "genserver.log"
    ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "health-listen", "http-listen")]
    port = HeldPort()
    admin = port.address
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*COMMAND, f"--model={folder}", f"--admin-listen={admin}", *ports, *FLAGS],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        ready = _until_it_answers(f"http://{admin}/readyz", process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-4000:]
        yield {**json.loads(line), "process": process, "ready": ready, "log": log}
    finally:
        running = process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True) if running else []
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        # The engine core must not outlive a server that was killed.
        _, alive = psutil.wait_procs(children, timeout=60)
        for child in alive:
            child.kill()
        port.close()
        assert not alive


def _until_it_answers(url: str, process: subprocess.Popen[str]) -> int:
    """Return the first status that a URL answers with."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            continue
    raise AssertionError("the server ended")


@pytest.fixture(scope="module")
def noisy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model whose embeddings, and so its output matrix, differ."""
    to = tmp_path_factory.mktemp("weights") / "noisy"
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    torch.manual_seed(1)
    tensors["model.embed_tokens.weight"] = (
        embedding + 0.3 * embedding.std() * torch.randn(embedding.shape)
    ).to(embedding.dtype)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def test_a_trained_model_and_its_update(serving, folder: Path, noisy: Path, tmp_path: Path) -> None:
    """Greedy tokens are Hugging Face's, on the old weights, the new ones and back."""
    assert serving["ready"] == 503
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(text) for text in PROMPTS]

    def generated(client: RolloutClient) -> list[list[int]]:
        groups = client.generate(prompts, [1] * 3, max_tokens=16, temperature=0)
        assert not groups.failed
        return [list(rollouts[0].token_ids) for rollouts in groups]

    with RolloutClient(serving["listen"]) as client:
        assert client.status().engine == "vllm"
        answer = client.generate(CHAT, [2], max_tokens=12, temperature=0)[0][0]
        assert "Paris" in answer.text
        before = generated(client)
        assert before == greedy(folder, prompts, 16)

        client.update_weights(noisy, 1)
        after = generated(client)
        assert after == greedy(noisy, prompts, 16)
        assert after != before
        groups = client.generate(["1 + 1 ="], [6], max_tokens=4, seed=2)
        assert [r.weight_version for r in groups[0]] == [1] * 6

        with pytest.raises(WeightUpdateFailed, match="the old weights serve on"):
            client.update_weights(tmp_path, 2)
        assert generated(client) == after
        client.update_weights(folder, 3)
        assert generated(client) == before
    log = serving["log"].read_text()
    assert "weights compared with their source" in log
    assert '"unproven": 0' in log
    assert "not all compared" not in log


def test_2048_unequal_rollouts_while_weights_change(serving, folder: Path, noisy: Path) -> None:
    """All of them, once each, and each says which weights made it: old, new or both."""
    sizes = unequal()
    half = threading.Event()
    came = 0

    def count(_rollout: Any) -> None:
        nonlocal came
        came += 1
        if came == 1_000:
            half.set()

    with RolloutClient(serving["listen"]) as client, ThreadPoolExecutor(1) as beside:
        # Prompts of one token and rollouts of two: a processor makes some 150 a second.
        call = beside.submit(
            client.generate, [[5 + k] for k in range(256)], sizes, max_tokens=2, on_rollout=count
        )
        assert half.wait(300)
        client.update_weights(noisy, 8)
        groups = call.result()
        client.update_weights(folder, 9)
    assert not groups.failed
    assert [len(rollouts) for rollouts in groups] == sizes
    for rollouts, size in zip(groups, sizes, strict=True):
        assert [r.rollout_index for r in rollouts] == list(range(size))
    ways = {tuple(v for v, _, _ in r.weight_versions) for rollouts in groups for r in rollouts}
    old = {version for way in ways for version in way} - {8}
    assert len(old) == 1
    assert ways >= {(old.pop(),), (8,)}


def test_it_ends_when_told_to(serving) -> None:
    """SIGTERM: no process is left, exit code 0."""
    process = serving["process"]
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_flags_that_cannot_be(folder: Path) -> None:
    """One line that names the flag, exit code 2, no traceback."""
    ports = [f"--{n}=127.0.0.1:0" for n in ("listen", "admin-listen", "health-listen")]
    done = subprocess.run(
        [*COMMAND, f"--model={folder}", *ports, "--http-listen=127.0.0.1:0", "--no-such-flag=1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    reason = "--no-such-flag=1: neither knapsack-genserver nor vLLM knows this flag"
    assert done.stderr.splitlines()[-1] == f"knapsack-genserver: {reason}"
    assert "Traceback" not in done.stderr
    for flag, reason in (
        ("--port=8001", "--port: --http-listen"),
        ("--max-num-seqs=many", "max-num-seqs"),
        ("--worker-extension-cls=a.b", "--worker-extension-cls: this server"),
        ("stray", "stray: is no flag"),
    ):
        with pytest.raises(ConfigError, match=reason):
            parse(folder, [flag], "json")

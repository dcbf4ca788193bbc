"""What is left when vLLM's engine, a process of its own, is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from knapsack_trainer_client.errors import GeneratorUnavailable
from knapsack_trainer_client.rollouts import Rollout, RolloutClient


def test_the_engine_is_killed_amid_a_burst(model_folder: Path, tmp_path: Path) -> None:
    """No rollout is missing without a word, and the process ends with 1, to be started anew."""
    names = ("listen", "admin-listen", "health-listen")
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "knapsack_genserver.cli", "serve", "--engine=vllm"]
            + [f"--model={model_folder}", "--http-listen=off", "--dtype=float32"]
            + [f"--{name}=127.0.0.1:0" for name in names],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    came: list[Rollout] = []

    def kill(rollout: Rollout) -> None:
        came.append(rollout)
        if len(came) == 100:
            psutil.Process(core).send_signal(signal.SIGKILL)

    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-4000:]
        children = psutil.Process(process.pid).children(recursive=True)
        core = max(children, key=lambda child: child.memory_info().rss).pid
        asked = 20_000
        with RolloutClient(json.loads(line)["listen"]) as client:
            try:
                groups = client.generate([[1, 2]], [asked], max_tokens=200, on_rollout=kill)
            except GeneratorUnavailable:
                # Those that vLLM had not been given: the call has ended for them.
                assert len(came) < asked
            else:
                assert len(groups[0]) + len(groups.failed) == asked
                assert len(groups.failed) > 1_000
        indices = [rollout.rollout_index for rollout in came]
        assert len(set(indices)) == len(indices)
        assert all("died" in r.error or "Dead" in r.error for r in came if r.error)
        assert process.wait(120) == 1
        assert "vLLM's engine has died" in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive

"""A Ray cluster with verl's parts in it, our two servers, and trainers on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from real_scheduler import outbox_folder, scheduler

__all__ = ["outbox_folder", "scheduler"]

os.environ.update(
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    TRANSFER_QUEUE_ENABLE="1",
    # Of the workers, which find our helpers where pytest does.
    PYTHONPATH=os.pathsep.join([*(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]),
    PYTHONWARNINGS="ignore",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_NUM_REDIS_GET_RETRIES="120",
    RAY_USAGE_STATS_ENABLED="0",
    VERL_ENGINE_DEVICE="cuda",
)


class World:
    """What the trainers of a session share: model, data, generation server, Ray, workers.

    Attributes:
        folder: of the model.
        generator: address of the generation server.
    """

    def __init__(self, folder: Path, generator: str) -> None:
        self.folder = folder
        self.generator = generator
        self._workers: list[Any] = []

    def trainer(self, config: Any, kind: Any = None) -> tuple[Any, Any]:
        """Return a trainer that is ready to fit, and its manager, as verl's runner does."""
        from knapsack_trainer_client.integrations.verl import BudgetedAgentLoopManager

        import tiny_verl

        trainer = (kind or tiny_verl.SyncOnCpu)(config)
        trainer.init()
        options = {
            "config": config,
            "llm_client": tiny_verl.ServedClient(self.generator),
            "teacher_client": None,
            "reward_loop_worker_handles": trainer.get_reward_handles(),
        }
        if not self._workers:
            manager = BudgetedAgentLoopManager.create(**options)
            self._workers = manager.agent_loop_workers
        else:
            # The workers are the first manager's, as each takes half a minute to start.
            manager = BudgetedAgentLoopManager(**options)
            manager.agent_loop_workers = self._workers
        return trainer, manager


def start_ray() -> None:
    """Start Ray, which gives its node 30 s and no more: a busy machine may need another try."""
    import ray

    for last in (False, False, True):
        try:
            # Not the cluster of somebody else on this machine, which Ray would join.
            ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200_000_000)
            return
        except Exception as error:
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                raise


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Ray, the TransferQueue and a generation server with a tiny model."""
    import ray
    import transfer_queue

    import tiny_verl

    folder = tmp_path_factory.mktemp("world")
    tiny_verl.write_model(folder / "model")
    log = (folder / "generator.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "knapsack_genserver.cli", "serve", f"--model={folder / 'model'}"]
        + [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line, (folder / "generator.log").read_text()
        start_ray()
        transfer_queue.init(tiny_verl.make_config(folder, folder, None).transfer_queue)
        yield World(folder, json.loads(line)["listen"])
    finally:
        if ray.is_initialized():
            transfer_queue.close()
            ray.shutdown()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        server.stdout.close()
        log.close()


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    """Leave nothing in the queue for the next test.

    A test that ends while rollouts are generated waits for them, or they come into the next one.
    """
    yield
    import ray

    if ray.is_initialized():
        import transfer_queue

        for partition, items in (transfer_queue.kv_list() or {}).items():
            if items:
                transfer_queue.kv_clear(keys=list(items), partition_id=partition)

"""verl's own FSDP engine on a CPU, by verl's registry of platforms.

verl registers its engines for CUDA and NPU; ``VERL_ENGINE_DEVICE=cuda`` takes that one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform

from knapsack_trainer_client import RolloutClient


class CpuPlatform(PlatformCUDA):
    """A platform without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module: Any = SimpleNamespace(
        max_memory_allocated=lambda *_: 0,
        max_memory_reserved=lambda *_: 0,
        memory_allocated=lambda *_: 0,
        memory_reserved=lambda *_: 0,
        mem_get_info=lambda *_: (0, 0),
        reset_peak_memory_stats=lambda *_: None,
        empty_cache=lambda: None,
        synchronize=lambda *_: None,
        set_device=lambda *_: None,
        current_device=lambda: "cpu",
        is_available=lambda: False,
        device_count=lambda: 0,
        get_device_name=lambda *_: "cpu",
    )

    def is_available(self) -> bool:
        """Return that it can be used."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Return that it can be used."""
        return True

    def current_device(self) -> Any:
        """Return the only device."""
        return "cpu"

    def device_count(self) -> int:
        """Return how many accelerators there are."""
        return 0

    def set_device(self, device_index: int) -> None:
        """Do nothing."""

    def synchronize(self, device_index: Any = None) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing."""

    def manual_seed(self, seed: int) -> None:
        """Do nothing; torch's own seed is set beside it."""

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing."""

    def communication_backend_name(self) -> str:
        """Return gloo."""
        return "gloo"

    def is_ipc_supported(self) -> bool:
        """Return that nothing is shared between devices."""
        return False


set_platform(CpuPlatform())

import ray  # noqa: E402
import torch  # noqa: E402
from verl.single_controller.base.decorator import Dispatch, register  # noqa: E402
from verl.single_controller.ray import (  # noqa: E402
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
)
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402


class CpuWorker(ActorRolloutRefWorker):
    """A worker of verl whose process group is gloo's."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> Any:
        """Build the engine."""
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo",
                rank=int(os.environ.get("RANK", 0)),
                world_size=int(os.environ.get("WORLD_SIZE", 1)),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return super().init_model()


def start_engine(config: Any) -> Any:
    """Return a worker group of one process with the actor's model in it."""
    group = RayWorkerGroup(
        resource_pool=RayResourcePool(process_on_nodes=[1], use_gpu=False, max_colocate_count=1),
        ray_cls_with_init=RayClassWithInitArgs(
            cls=ray.remote(CpuWorker), config=config.actor_rollout_ref, role="actor"
        ),
        device_name="cpu",
    )
    group.init_model()
    return group


class HandedOver:
    """In the place of the checkpoint engine: weights go to our server through a folder."""

    def __init__(self, engine: Any, folder: Path, generator: str) -> None:
        self._engine = engine
        self._folder = folder
        self._client = RolloutClient(generator)
        self.fingerprints: list[str] = []

    def update_weights(self, step: int = 0) -> None:
        """Serve the weights of a step."""
        path = self._folder / f"weights-{step}"
        self._engine.save_checkpoint(str(path), None, step)
        fingerprint = self._client.update_weights(path / "huggingface", step)
        self.fingerprints.append(fingerprint)
        shutil.rmtree(path)

    def sleep_replicas(self) -> None:
        """Do nothing: the server has memory of its own."""

"""What this package adds to vLLM's workers: weights of a folder, taken whole or not at all.

vLLM mixes ``WorkerExtension`` into its worker class, and the gate calls its methods in
every worker: ``knapsack_hold_weights`` with the folder that the model was loaded from;
then, for each update, ``knapsack_check_weights`` in all workers, which touches nothing,
and ``knapsack_take_weights``. When all have taken them, ``knapsack_release_weights`` lets go
of the old ones; if any has not, ``knapsack_restore_weights`` puts them back in all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from knapsack_genserver.engines.vllm.checkpoint import Checkpoint, CheckpointError
from knapsack_genserver.engines.vllm.cpu_seeds import mend
from knapsack_genserver.engines.vllm.proof import prove

if current_platform.is_cpu():
    # Imported into a worker before it makes its model runner.
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    mend(CPUModelRunner)


class Holder:
    """The folder that a worker serves, the next one, and during an update the old one.

    Args:
        worker: vLLM's.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._served: Checkpoint | None = None
        self._before: Checkpoint | None = None
        self._next: Checkpoint | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    def hold(self, folder: Path) -> dict[str, Any]:
        """Take a folder for the one that the model was loaded from, and prove it."""
        checkpoint = Checkpoint(folder)
        self._shapes = dict(checkpoint.shapes)
        self._served = checkpoint
        return self._proven(checkpoint)

    def check(self, folder: Path) -> None:
        """Open the next folder and refuse it if it is not whole or of another model."""
        self._drop_next()
        checkpoint = Checkpoint(folder)
        try:
            if self._shapes:
                checkpoint.require(self._shapes, self._tied())
            config = self._worker.vllm_config.parallel_config
            checkpoint.require_finite(self._worker.rank % config.world_size, config.world_size)
        except BaseException:
            checkpoint.close()
            raise
        self._next = checkpoint

    def take(self) -> dict[str, Any]:
        """Load the next folder and prove that the model computes with it."""
        if self._next is None:
            raise CheckpointError("no folder has been checked")
        if self._before is None:
            self._before = self._served
        elif self._served is not None:
            # The second folder of one update: what served before the update is kept.
            self._served.close()
        self._served, self._next = self._next, None
        self._load(self._served)
        found = self._proven(self._served)
        self._shapes = self._shapes or dict(self._served.shapes)
        return found

    def release(self) -> None:
        """Let go of the folder from before the update; if it was deleted, its disk is free."""
        if self._before is not None:
            self._before.close()
            self._before = None

    def restore(self) -> dict[str, Any]:
        """Load the folder that was served before the update."""
        self._drop_next()
        if self._before is not None:
            if self._served is not None:
                self._served.close()
            self._served, self._before = self._before, None
        if self._served is None:
            raise CheckpointError("the folder of the old weights is not known")
        self._load(self._served)
        return self._proven(self._served)

    def _drop_next(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None

    def _tied(self) -> frozenset[str]:
        config = self._worker.model_config.hf_text_config
        if not getattr(config, "tie_word_embeddings", False):
            return frozenset()
        names = {*self._shapes, "lm_head.weight"}
        return frozenset(name for name in names if name.endswith("lm_head.weight"))

    def _load(self, checkpoint: Checkpoint) -> None:
        worker = self._worker
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            worker.model_runner.reload_weights(weights_iterator=checkpoint.tensors())
            if current_platform.is_cpu():
                pack_heads(worker.get_model())

    def _proven(self, checkpoint: Checkpoint) -> dict[str, Any]:
        with set_current_vllm_config(self._worker.vllm_config):
            proof = prove(self._worker.get_model(), checkpoint.tensors())
        return {
            "fingerprint": checkpoint.fingerprint(),
            "proven": proof.proven,
            "unproven": proof.unproven,
        }


def pack_heads(model: torch.nn.Module) -> None:
    """Pack output matrices again: a reload leaves those that share the embedding's old."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


class WorkerExtension:
    """Mixed into vLLM's worker class; every name begins with knapsack."""

    def knapsack_hold_weights(self, folder: str) -> dict[str, Any]:
        """Return fingerprint and proof of the folder that the model was loaded from."""
        return self._knapsack_holder().hold(Path(folder))

    def knapsack_check_weights(self, folder: str) -> str:
        """Return why a folder cannot be served, empty if it can; touches nothing.

        What is raised instead is a failure of this side.
        """
        try:
            self._knapsack_holder().check(Path(folder))
        except CheckpointError as error:
            return str(error)
        return ""

    def knapsack_take_weights(self) -> dict[str, Any]:
        """Serve the folder that was checked; returns its fingerprint and proof."""
        return self._knapsack_holder().take()

    def knapsack_release_weights(self) -> None:
        """Let go of the folder from before the update."""
        self._knapsack_holder().release()

    def knapsack_restore_weights(self) -> dict[str, Any]:
        """Serve the folder from before the update again."""
        return self._knapsack_holder().restore()

    def _knapsack_holder(self) -> Holder:
        holder: Holder | None = self.__dict__.get("_knapsack_held")
        if holder is None:
            holder = self.__dict__["_knapsack_held"] = Holder(self)
        return holder

"""The weight transfer backend ``safetensors`` inside a vLLM worker; see ``plugin``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

from knapsack_genserver.engines.vllm.checkpoint import Checkpoint
from knapsack_genserver.engines.vllm.proof import prove
from knapsack_genserver.engines.vllm.worker import pack_heads


@dataclass
class FolderInit(WeightTransferInitInfo):
    """What a trainer says once.

    Attributes:
        root: folder that every folder of weights must lie in; None for anywhere.
    """

    root: str | None = None


@dataclass
class FolderUpdate(WeightTransferUpdateInfo):
    """What a trainer says at each update.

    Attributes:
        path: folder of safetensors on the worker's disk.
    """

    path: str


class FolderTransfer(WeightTransferEngine[FolderInit, FolderUpdate]):
    """Takes a folder at once in ``update_weights``.

    So a start that is never followed by an update leaves the model as it was.
    """

    init_info_cls = FolderInit
    update_info_cls = FolderUpdate
    supports_draft_weight_update = False
    _root: Path | None = None

    def init_transfer_engine(self, init_info: FolderInit) -> None:
        """Keep the root."""
        self._root = Path(init_info.root).resolve() if init_info.root else None

    def start_weight_update(self) -> None:
        """Nothing: the model is touched by an update only."""

    def finish_weight_update(self) -> None:
        """Nothing: the update has been finished."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Take a folder; needs no device to synchronise with."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FolderUpdate) -> None:
        """Take a folder and prove it."""
        folder = Path(update_info.path).resolve()
        if self._root and self._root not in (folder, *folder.parents):
            raise ValueError(f"path = {update_info.path!r}: must lie in {str(self._root)!r}")
        checkpoint = Checkpoint(folder)
        try:
            checkpoint.require_finite()
            with set_current_vllm_config(self.vllm_config), torch.no_grad():
                initialize_layerwise_reload(self.model)
                self.model.load_weights(checkpoint.tensors())
                finalize_layerwise_reload(self.model, self.model_config)
                if current_platform.is_cpu():
                    pack_heads(self.model)
                prove(self.model, checkpoint.tensors())
        finally:
            checkpoint.close()

"""The weight transfer backend ``safetensors``, for vLLM's own transfer API.

``register`` is a vLLM general plugin: vLLM calls it in each of its processes. With
``--weight-transfer-config '{"backend": "safetensors"}'`` a trainer updates weights through
init, start, update and finish as with any backend; its update info is ``{"path": FOLDER}``.
In this server the gate takes the folder itself, so that it is taken in all workers or in
none. In a plain ``vllm serve`` the classes below do it, worker by worker.
"""

from __future__ import annotations

NAME = "safetensors"


def register() -> None:
    """Make the backend known; may be called more than once."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            NAME, "knapsack_genserver.engines.vllm.transfer", "FolderTransfer"
        )

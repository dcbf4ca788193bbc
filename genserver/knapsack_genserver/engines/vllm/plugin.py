"""What vLLM loads of this package in each of its processes: ``register`` is a general plugin.

It makes the weight transfer backend ``safetensors`` known, for vLLM's own transfer API. With
``--weight-transfer-config '{"backend": "safetensors"}'`` a trainer updates weights through
init, start, update and finish as with any backend; its update info is ``{"path": FOLDER}``.
In this server the gate takes the folder itself, so that it is taken in all workers or in
none. In a plain ``vllm serve`` the classes below do it, worker by worker.

It also ends vLLM's processes with the one that started them, which vLLM leaves to that one: a
server that is killed would leave its engine behind, with all of the GPU's memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

NAME = "safetensors"


_ending = threading.Event()


def register() -> None:
    """Make the backend known, and end with the parent; may be called more than once."""
    if not _ending.is_set():
        _ending.set()
        end_with_parent()
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            NAME, "knapsack_genserver.engines.vllm.transfer", "FolderTransfer"
        )


def end_with_parent() -> None:
    """End this process when the one that started it by ``multiprocessing`` is gone.

    Does nothing in a process that was started otherwise, such as the server's own.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        # Nobody is left to be told, and an orderly end may wait for those who are gone.
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="ends with its parent", daemon=True).start()

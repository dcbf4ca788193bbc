"""Replicas on a Ray cluster as one engine."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from knapsack_genserver.engine import LoadedWeights, Tokenizer
from knapsack_genserver.engines.ray.replica import RayOptions, RayReplica
from knapsack_genserver.engines.ray.store import WeightStore
from knapsack_genserver.errors import ConfigError
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool

_LOG = logging.getLogger(__name__)
_TRIES = 10


class RayPool(ReplicaPool):
    """A pool whose replicas are actors; joins the cluster when it starts.

    Args:
        address: of the cluster; None takes $RAY_ADDRESS or the one of this machine.
        replicas: how many there should be. Those that find no room wait for it.
        arguments: of the command line, for the engine in each actor.
        resources: what each takes of one node.
        shared_disk: whether every node sees the folders that weights are updated from.
        pool: how replicas are used together.
        tokenizer: of the model, or None.
    """

    def __init__(
        self,
        address: str | None,
        replicas: int,
        arguments: Sequence[str],
        resources: Mapping[str, float],
        *,
        shared_disk: bool,
        pool: PoolOptions,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._store = None if shared_disk else WeightStore(ray.put)
        options = RayOptions(arguments, resources, self._store)

        def make() -> RayReplica:
            return RayReplica(options)

        super().__init__("ray", [make() for _ in range(replicas)], pool, tokenizer, make)
        self._address = address

    async def start(self) -> None:
        """Join the cluster and start the replicas.

        Raises:
            ConfigError: there is no cluster at the address, or a replica cannot start.
        """
        address = self._address or os.environ.get("RAY_ADDRESS") or "auto"
        await _reach(address)
        # Ray would have signals end this process; in another thread it cannot.
        await asyncio.to_thread(_join, address)
        await super().start()

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve other weights on every replica; see the class above."""
        if self._store is None:
            return await super().load_weights(path, version)
        async with self._store.update(path, version):
            return await super().load_weights(path, version)

    async def close(self) -> None:
        """End the replicas and leave the cluster."""
        await super().close()
        await asyncio.to_thread(ray.shutdown)


async def _reach(address: str) -> None:
    """Wait a little for a cluster that starts with this server.

    Ray itself would wait for minutes and then end the process.
    """
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        return
    error: Exception | None = None
    for attempt in range(_TRIES):
        if attempt:
            await asyncio.sleep(1.0)
        try:
            async with asyncio.timeout(5.0):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError) as failure:
            error = failure
            _LOG.warning("ray_address = %r: does not answer", address)
        else:
            writer.close()
            return
    raise _unreachable(address, error)


def _unreachable(address: str, error: Exception | None) -> ConfigError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    advice = "ray start --head begins a cluster on this machine"
    if "No node info found" in first:
        advice = (
            "Ray must run on this machine, where its processes can be seen from here: in a pod "
            "of several containers that takes shareProcessNamespace: true"
        )
    return ConfigError(f"ray_address = {address!r}: cannot be joined: {first}; {advice}")


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It says that it cannot handle signals here, which is what is wanted.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=address,
            namespace="knapsack-genserver",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreachable(address, error) from error

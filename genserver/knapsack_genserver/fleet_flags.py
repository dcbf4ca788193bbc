"""The command line's flags for engines of several replicas."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from knapsack_genserver.engine import Engine
from knapsack_genserver.errors import ConfigError
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.tokenizers import load_tokenizer

ENGINES = ("remote", "ray")


def add_flags(
    command: argparse.ArgumentParser, count: type, seconds: Callable[[str], float]
) -> None:
    """Add the flags.

    Args:
        command: that gets them.
        count: type of a whole number of at least 1.
        seconds: type of a time of more than 0.
    """
    fleet = command.add_argument_group("several replicas (--engine remote, --engine ray)")
    add = fleet.add_argument
    add(
        "--replica-rollouts",
        type=count,
        help="most rollouts that a replica holds at a time; none leaves it to the replica",
    )
    add(
        "--piece-rollouts",
        type=count,
        default=PoolOptions().piece_rollouts,
        help="most rollouts of a prompt that go to a replica in one piece",
    )
    add(
        "--update-seconds",
        type=seconds,
        default=PoolOptions().update_seconds,
        metavar="S",
        help="how long a replica may take over new weights; one that takes longer is left behind "
        "and started again",
    )
    add(
        "--remote",
        action="append",
        metavar="URL",
        help="a vLLM server, such as http://host:8000; once per server; "
        "$VLLM_API_KEY is sent to it",
    )
    add("--remote-model", metavar="NAME", help="name the model is served under; none: the first")
    add("--remote-connections", type=count, default=128, help="most connections per server")
    add(
        "--remote-init-info",
        type=_object,
        metavar="JSON",
        help="what the servers' weight transfer backend is prepared with; none: it is not",
    )
    add(
        "--remote-update-info",
        type=_object,
        default={"path": "{path}"},
        metavar="JSON",
        help="what it is sent at each update, with {path} and {version} filled in",
    )
    add(
        "--replicas",
        type=count,
        default=1,
        help="replicas on the Ray cluster; those without room wait and join when there is some",
    )
    add(
        "--replica-engine",
        choices=("vllm", "transformers", "fake"),
        default="vllm",
        help="what generates in each; gets all other flags",
    )
    add("--replica-cpus", type=float, default=1.0, help="CPUs of one node that a replica takes")
    add(
        "--replica-gpus",
        type=float,
        help="GPUs of one node that a replica takes; none: vLLM's --tensor-parallel-size times "
        "--pipeline-parallel-size, and 0 for other engines",
    )
    add("--ray-address", help="of the Ray cluster; none: $RAY_ADDRESS, or this machine's")
    add(
        "--ray-weights",
        choices=("disk", "store"),
        default="disk",
        help="how replicas get weights: from a folder that every node sees, or through "
        "Ray's object store",
    )


def engine(options: argparse.Namespace) -> Engine:
    """Return the engine that the flags ask for.

    Raises:
        ConfigError: names the flag and what is wrong with it.
    """
    pool = PoolOptions(
        options.piece_rollouts,
        options.replica_rollouts or 0,
        update_seconds=options.update_seconds,
    )
    if options.engine == "ray":
        return _ray(options, pool)
    return _remote(options, pool)


def _remote(options: argparse.Namespace, pool: PoolOptions) -> Engine:
    from knapsack_genserver.engines.remote.engine import RemoteOptions
    from knapsack_genserver.engines.remote.pool import remote_pool
    from knapsack_genserver.engines.remote.weights import WeightRoutes

    if options.remote_connections > 256:
        raise ConfigError(
            f"remote_connections = {options.remote_connections}: must be at most 256; "
            "vLLM's HTTP server breaks connections off beyond that"
        )
    return remote_pool(
        options.remote or [],
        RemoteOptions(
            "",
            model=options.remote_model,
            api_key=os.environ.get("VLLM_API_KEY", ""),
            connections=options.remote_connections,
            weight_version=options.weight_version,
            weights=WeightRoutes(options.remote_init_info, options.remote_update_info),
        ),
        pool,
        options.model,
    )


def _ray(options: argparse.Namespace, pool: PoolOptions) -> Engine:
    try:
        from knapsack_genserver.engines.ray.pool import RayPool
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine = 'ray': {error.name} is not installed; pip install 'knapsack-rl[ray]'"
        ) from None
    if options.replica_engine != "fake" and options.model is None:
        raise ConfigError("model: is needed; --model DIR names a folder with a causal model")
    return RayPool(
        options.ray_address,
        options.replicas,
        [*options.arguments, f"--engine={options.replica_engine}"],
        {"CPU": options.replica_cpus, "GPU": _gpus(options)},
        shared_disk=options.ray_weights == "disk",
        # A machine that is busy computing may be slow to answer.
        pool=replace(pool, check_seconds=10.0),
        tokenizer=None if options.model is None else load_tokenizer(options.model),
    )


def _gpus(options: argparse.Namespace) -> float:
    if options.replica_gpus is not None:
        return float(options.replica_gpus)
    if options.replica_engine != "vllm":
        return 0.0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    found, _ = parser.parse_known_args(options.engine_flags)
    return float(found.tensor_parallel_size * found.pipeline_parallel_size)


def _object(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_object.__name__ = "JSON object"

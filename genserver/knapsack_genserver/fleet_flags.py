"""The command line's flags for engines of several replicas."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from knapsack_genserver.engine import Engine
from knapsack_genserver.errors import ConfigError
from knapsack_genserver.member import PoolOptions

ENGINES = ("remote", "ray")


def add_flags(command: argparse.ArgumentParser, count: type) -> None:
    """Add the flags.

    Args:
        command: that gets them.
        count: type of a whole number of at least 1.
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


def engine(options: argparse.Namespace) -> Engine:
    """Return the engine that the flags ask for.

    Raises:
        ConfigError: names the flag and what is wrong with it.
    """
    pool = PoolOptions(options.piece_rollouts, options.replica_rollouts or 0)
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


def _object(text: str) -> Mapping[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_object.__name__ = "JSON object"

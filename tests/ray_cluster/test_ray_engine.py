"""The promises that every engine keeps, kept by replicas on Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray

from knapsack_genserver.engine import Engine
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.engines.ray.pool import RayPool
from knapsack_genserver.member import PoolOptions

import test_engines
from small_engines import all_of, group
from test_engines import *  # noqa: F403

test_engines.END_TOKENS["ray"] = test_engines.END_TOKENS["fake"]


@pytest.fixture
async def engine(nodes: Any) -> AsyncIterator[Engine]:
    """Two replicas of the engine without a model."""
    made = RayPool(
        nodes.address,
        2,
        ["serve", "--engine=fake"],
        {"CPU": 1.0},
        shared_disk=True,
        pool=PoolOptions(piece_rollouts=8, replica_rollouts=24),
        tokenizer=None,
    )
    await made.start()
    yield made
    await made.close()


async def test_actors_that_ray_kills_cost_what_had_not_arrived(engine: RayPool) -> None:
    """The same rollouts as without, each once."""
    groups = [group([k + 1], n, seed=k) for k, n in enumerate([2, 400, 7, 60])]
    streams = [engine.generate(each) for each in groups]
    found = []
    for at, stream in enumerate(streams):
        rollouts = []
        async for completion in stream:
            rollouts.append(completion)
            if len(rollouts) == 1 and at in (1, 3):
                member = next(iter(engine._serving().values()))
                ray.kill(member.engine._actor)
        found.append(sorted(rollouts, key=lambda c: c.index))
    assert found == await all_of(FakeEngine(), *groups)
    # Nothing is kept of what has been made.
    async with asyncio.timeout(20):
        while any(member.tasks for member in engine._members):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

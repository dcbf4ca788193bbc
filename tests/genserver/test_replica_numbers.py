"""Replicas that are added and taken away while a pool works: none of its rollouts is lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from knapsack_genserver.engine import EngineStatus, ReplicaState
from knapsack_genserver.errors import FailedPrecondition, Unavailable
from knapsack_genserver.replicas import ReplicaPool
from knapsack_genserver.server import Server, ServerOptions
from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc

from mortal_engine import MortalEngine
from small_engines import all_of, group
from test_replicas import GROUPS, QUICK, expected, until

SERVING, STARTING, DRAINING = ReplicaState.SERVING, ReplicaState.STARTING, ReplicaState.DRAINING


@pytest.fixture
async def replicas() -> list[MortalEngine]:
    """Those that the pool has made so far: two at first."""
    return [MortalEngine(), MortalEngine()]


@pytest.fixture
async def unstarted(replicas: list[MortalEngine]) -> ReplicaPool:
    """A pool that makes its replicas, and has two."""

    def make() -> MortalEngine:
        replicas.append(MortalEngine())
        return replicas[-1]

    return ReplicaPool("pool", list(replicas), QUICK, make=make)


@pytest.fixture
async def pool(unstarted: ReplicaPool) -> AsyncIterator[ReplicaPool]:
    """The pool, of whose replicas two serve."""
    await unstarted.start()
    await until(lambda: unstarted.status().replicas == 2)
    yield unstarted
    await unstarted.close()


def states(pool: ReplicaPool) -> dict[int, ReplicaState]:
    """Return where each replica is in its life, by number."""
    return {each.number: each.state for each in pool.status().members}


async def test_more_replicas_help_once_they_have_the_weights(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """What they make is of the version that serves, and takes its share of what waits."""
    await pool.load_weights(tmp_path, 3)
    for replica in replicas:
        replica.gate.clear()
    streams = [pool.generate(each) for each in GROUPS]
    await until(lambda: all(replica.held == 16 for replica in replicas))
    pool.set_replicas(4)
    assert pool.status().wanted_replicas == 4
    assert states(pool) == {1: SERVING, 2: SERVING, 3: STARTING, 4: STARTING}
    await until(lambda: pool.status().replicas == 4)
    assert [replica.loads for replica in replicas] == [[3]] * 4
    for replica in replicas:
        replica.gate.set()
    found = [sorted([c async for c in s], key=lambda c: c.index) for s in streams]
    assert [[c.index for c in rollouts] for rollouts in found] == [
        list(range(g.num_rollouts)) for g in GROUPS
    ]
    assert {s.version for rollouts in found for c in rollouts for s in c.weights} == {3}
    assert all(replica.asked for replica in replicas)
    assert {version for r in replicas for _, version in r.asked} == {3}


async def test_those_that_are_too_many_finish_what_they_hold(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """First those that do not serve leave, then those that hold least."""
    pool.set_replicas(3)
    await until(lambda: pool.status().replicas == 3)
    replicas[1].open = False
    replicas[1].die()
    pool._lose(pool._members[2], "it died")
    for replica in (replicas[0], replicas[2]):
        replica.gate.clear()
    streams = [pool.generate(each) for each in (group([1], 16), group([2], 4), group([3], 90))]
    await until(lambda: replicas[0].held == replicas[2].held == 16)
    (held,) = [each for each in pool.status().members if each.number == 3]
    assert (held.state, held.running) == (SERVING, 16)
    pool.set_replicas(2)
    assert states(pool) == {1: SERVING, 3: SERVING, 2: DRAINING}
    await until(lambda: set(states(pool)) == {1, 3})
    pool.set_replicas(1)
    assert states(pool) == {1: SERVING, 3: DRAINING}
    for replica in replicas:
        replica.gate.set()
    found = [sorted([c async for c in s], key=lambda c: c.index) for s in streams]
    assert found == await expected(group([1], 16), group([2], 4), group([3], 90))
    await until(lambda: set(states(pool)) == {1})
    assert sum(g.num_rollouts for g, _ in replicas[2].asked) == 16
    assert replicas[2].closed.is_set()
    assert (pool.status().redone_rollouts, pool.status().lost_replicas) == (0, 1)


async def test_a_replica_that_dies_on_its_way_out_costs_nothing(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """What it had not handed over is made elsewhere, and it is not started again."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 60))
    await until(lambda: all(replica.held == 16 for replica in replicas))
    pool.set_replicas(1)
    assert states(pool) == {1: SERVING, 2: DRAINING}
    replicas[1].die()
    await until(lambda: set(states(pool)) == {1})
    replicas[0].gate.set()
    found = sorted([c async for c in stream], key=lambda c: c.index)
    assert [found] == await expected(group([1], 60))
    assert replicas[1].lives == 1
    assert pool.status().redone_rollouts == 16


async def test_a_replica_that_hangs_on_its_way_out_is_found(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Its checks go on until it has left."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 60))
    await until(lambda: all(replica.held == 16 for replica in replicas))
    replicas[1].answers = False
    pool.set_replicas(1)
    await until(lambda: set(states(pool)) == {1})
    replicas[0].gate.set()
    assert len([c async for c in stream]) == 60
    assert pool.status().lost_replicas == 1


async def test_an_update_leaves_out_who_is_on_its_way_out(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """It finishes with the weights that it has, and its rollouts say so."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 60))
    await until(lambda: all(replica.held == 16 for replica in replicas))
    pool.set_replicas(1)
    replicas[1].hang = True
    await pool.load_weights(tmp_path, 2)
    assert (replicas[0].loads, replicas[1].loads) == ([2], [])
    for replica in replicas:
        replica.gate.set()
    assert {s.version async for c in stream for s in c.weights} == {0, 2}


async def test_closing_ends_those_on_their_way_out_too(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Whatever they hold; and nothing is started afterwards."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 60))
    await until(lambda: all(replica.held == 16 for replica in replicas))
    pool.set_replicas(1)
    async with asyncio.timeout(20):
        await pool.close()
    assert all(replica.closed.is_set() for replica in replicas)
    assert len([c async for c in stream]) == 60
    with pytest.raises(Unavailable):
        pool.set_replicas(3)
    assert len(replicas) == 2


async def test_numbers_that_change_at_every_moment(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Among deaths, all rollouts arrive, each once."""
    streams = [pool.generate(each) for each in GROUPS]
    found = []
    for at, stream in enumerate(streams):
        rollouts = []
        async for completion in stream:
            rollouts.append(completion)
            if len(rollouts) % 13 == 0:
                pool.set_replicas(1 + (len(rollouts) // 13 + at) % 4)
            if len(rollouts) % 29 == 0:
                replicas[len(rollouts) % len(replicas)].die()
        found.append(sorted(rollouts, key=lambda c: c.index))
    assert found == await expected(*GROUPS)
    wanted = pool.status().wanted_replicas
    await until(lambda: len(states(pool)) == pool.status().replicas == wanted)
    assert pool.status().running == pool.status().waiting == 0
    assert {each.running for each in pool.status().members} == {0}
    assert len(replicas) > 4


async def test_a_model_folder_that_has_changed_is_noticed(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """Before the first update a newcomer has what lies there, not what the others have."""

    def status(fingerprint: str) -> EngineStatus:
        return replace(EngineStatus("m", 0, 1, 0, 0, 0, 64), first_fingerprint=fingerprint)

    old, other, same = MortalEngine(), MortalEngine(), MortalEngine()
    old.status = same.status = lambda: status("a")  # type: ignore[method-assign]
    other.status = lambda: status("b")  # type: ignore[method-assign]
    third = ReplicaPool("pool", [old], QUICK)
    await third.start()
    third.add(other)
    third.add(same)
    await until(lambda: "not those of the other replicas" in third.problems().get(2, ""))
    await until(lambda: third.status().replicas == 2)
    assert not other.asked
    await third.load_weights(tmp_path, 1)
    await until(lambda: third.status().replicas == 3)
    assert other.loads == [1]
    await third.close()


async def test_replicas_that_others_start_are_not_ours_to_count() -> None:
    """It says what to do instead."""
    pool = ReplicaPool("pool", [MortalEngine()], QUICK)
    await pool.start()
    with pytest.raises(FailedPrecondition, match="servers that run already"):
        pool.set_replicas(2)
    assert pool.status().wanted_replicas == 1
    await pool.close()


async def test_an_operator_sees_and_sets_them(
    unstarted: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """By the real command line, of a server that runs, with the reason where one does not serve."""
    pool = unstarted
    server = Server(pool, ServerOptions(*["127.0.0.1:0"] * 3))
    await server.start()
    await until(lambda: pool.status().replicas == 2)
    address = server.addresses["listen"]

    async def replicas_command(*flags: str) -> tuple[int, list[str], str]:
        command = [sys.executable, "-m", "knapsack_genserver.cli", "replicas"]
        done = await asyncio.to_thread(
            subprocess.run,
            [*command, f"--address={address}", *flags],
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    replicas[1].open = False
    replicas[1].die()
    pool._lose(pool._members[2], "it died")
    await until(lambda: "switched off" in pool.problems().get(2, ""))
    code, lines, _ = await replicas_command()
    assert (code, lines[0]) == (
        0,
        "1 of 2 replicas serve weight version 0; 0 rollouts run, 0 wait",
    )
    assert lines[1].split() == ["replica", "state", "rollouts", "losses", "where", "why"]
    assert lines[2].split() == ["1", "serving", "0", "0", "-", "-"]
    assert lines[3].split()[:5] == ["2", "starting", "0", "1", "-"]
    assert lines[3].endswith("it is switched off")
    code, _, _ = await replicas_command("--set=4", "--wait=0.1")
    assert code == 1
    await until(lambda: pool.status().replicas == 3)
    _, lines, _ = await replicas_command()
    assert lines[0].split()[:3] == ["3", "of", "4"]
    code, lines, _ = await replicas_command("--set=3", "--wait=100")
    assert code == 0
    assert [line.split()[:2] for line in lines[2:]] == [
        ["1", "serving"],
        ["3", "serving"],
        ["4", "serving"],
    ]
    assert await replicas_command("--set=0") == (
        2,
        [],
        f"knapsack-genserver: {address}: replicas = 0: must be 1 to 4096\n",
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.RolloutGeneratorStub(channel)  # type: ignore[no-untyped-call]
        status = await stub.SetReplicas(pb.SetReplicasRequest(replicas=1))
        assert (status.wanted_replicas, len(status.members)) == (1, 3)
    assert await all_of(pool, *GROUPS) == await expected(*GROUPS)
    await server.stop(0.0)


async def test_an_engine_of_one_process_has_no_replicas_to_set(start_generator) -> None:
    """It is refused as what it is, and the server serves on."""
    address = start_generator("--engine=fake").addresses["listen"]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc.RolloutGeneratorStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.SetReplicas(pb.SetReplicasRequest(replicas=2))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "--engine ray" in str(refused.value.details())
        assert (await stub.GetStatus(pb.GetStatusRequest())).wanted_replicas == 1

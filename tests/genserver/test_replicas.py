"""Replicas that die, hang, join, leave and disagree: every rollout arrives exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from knapsack_genserver.engine import Completion, LoadedWeights
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.errors import ConfigError, FailedPrecondition, Unavailable
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool

from mortal_engine import MortalEngine
from small_engines import all_of, group

QUICK = PoolOptions(
    piece_rollouts=4,
    replica_rollouts=16,
    check_seconds=0.2,
    check_failures=2,
    retry_seconds=(0.001, 0.01),
)


@pytest.fixture
async def replicas() -> list[MortalEngine]:
    """Three replicas."""
    return [MortalEngine() for _ in range(3)]


@pytest.fixture
async def pool(replicas: list[MortalEngine]) -> AsyncIterator[ReplicaPool]:
    """A pool of them that has started."""
    made = ReplicaPool("pool", replicas, QUICK)
    await made.start()
    await until(lambda: made.status().replicas == 3)
    yield made
    await made.close()


async def until(holds: Callable[[], bool]) -> None:
    """Return when something holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def expected(*groups: object) -> list[list[Completion]]:
    """Return what a single engine makes of groups."""
    return await all_of(FakeEngine(), *groups)  # type: ignore[arg-type]


GROUPS = [group([k + 1], n, seed=k) for k, n in enumerate([2, 128, 7, 40, 3])]


async def test_a_death_costs_only_what_had_not_arrived(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """The rollouts are those that one engine makes, each of them once."""
    for replica in replicas:
        replica.gate.clear()
    streams = [pool.generate(each) for each in GROUPS]
    await until(lambda: all(replica.held for replica in replicas))
    victim = replicas[0]
    held = victim.held
    victim.die()
    await until(lambda: victim.lives == 2)
    for replica in replicas:
        replica.gate.set()
    found = [sorted([c async for c in s], key=lambda c: c.index) for s in streams]
    assert found == await expected(*GROUPS)
    asked = sum(g.num_rollouts for r in replicas for g, _ in r.asked)
    assert asked == 180 + held


async def test_deaths_at_every_moment(pool: ReplicaPool, replicas: list[MortalEngine]) -> None:
    """Whoever dies after whichever rollout, all arrive, none twice."""
    streams = [pool.generate(each) for each in GROUPS]
    found = []
    for stream in streams:
        rollouts = []
        async for completion in stream:
            rollouts.append(completion)
            if len(rollouts) % 17 == 0:
                replicas[len(rollouts) % 3].die()
        found.append(sorted(rollouts, key=lambda c: c.index))
    assert found == await expected(*GROUPS)
    assert sum(replica.lives for replica in replicas) > 3 + 5


async def test_no_replica_holds_more_than_it_may(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """All are kept busy, none above its bound."""
    streams = [pool.generate(each) for each in GROUPS]
    for replica in replicas:
        replica.gate.clear()
    await until(lambda: all(replica.held == 16 for replica in replicas))
    status = pool.status()
    assert (status.running, status.waiting) == (48, 132)
    for replica in replicas:
        replica.gate.set()
    assert sum([len([c async for c in stream]) for stream in streams]) == 180
    assert max(replica.most_held for replica in replicas) == 16


async def test_a_prompt_that_kills_is_given_up(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """After a few replicas it fails with the reason, and the others' rollouts arrive."""
    for replica in replicas:
        replica.deadly.add((9,))
    poison, good = await all_of(pool, group([9], 3), group([1], 50))
    assert [c.index for c in poison] == [0, 1, 2]
    for completion in poison:
        assert completion.error == "given up after 6 attempts, last: it died"
        assert completion.token_ids == []
    assert [good] == await expected(group([1], 50))


async def test_a_replica_that_fails_at_everything_leaves_a_burst_whole() -> None:
    """It is out after a few pieces; the others make the rest when they have room."""
    healthy, sick = MortalEngine(), MortalEngine()
    pool = ReplicaPool("pool", [healthy, sick], replace(QUICK, retry_seconds=(60.0, 60.0)))
    await pool.start()
    await until(lambda: pool.status().replicas == 2)
    healthy.gate.clear()
    sick.fails = True
    streams = [pool.generate(each) for each in GROUPS]
    await until(lambda: pool.status().replicas == 1)
    assert "it fails at all that it is asked for: 500" in "".join(pool.problems().values())
    healthy.gate.set()
    found = [sorted([c async for c in s], key=lambda c: c.index) for s in streams]
    assert found == await expected(*GROUPS)
    assert len(sick.asked) <= 6
    await pool.close()


async def test_a_replica_that_fails_keeps_what_it_makes() -> None:
    """It gets nothing more until a rollout of it arrives, and is not put out meanwhile."""
    replica = MortalEngine()
    pool = ReplicaPool("pool", [replica], QUICK)
    await pool.start()
    replica.gate.clear()
    long = pool.generate(group([1], 4))
    await until(lambda: replica.held == 4)
    replica.fails = True
    short = pool.generate(group([2], 4))
    await until(lambda: len(replica.asked) == 3)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(replica.asked) == 3
    replica.fails = False
    replica.gate.set()
    found = [sorted([c async for c in s], key=lambda c: c.index) for s in (long, short)]
    assert found == await expected(group([1], 4), group([2], 4))
    assert (replica.lives, len(replica.asked)) == (1, 4)
    await pool.close()


async def test_a_replica_that_starts_and_makes_nothing_waits_longer_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first rollout of a life makes the next pause the shortest again."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        if seconds >= 1:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", recorded)
    replica = MortalEngine()
    replica.fails = True
    pool = ReplicaPool("pool", [replica], replace(QUICK, retry_seconds=(1.0, 4.0)))
    await pool.start()
    stream = pool.generate(group([1], 4))
    await until(lambda: len(pauses) == 4)
    replica.fails = False
    assert len([c async for c in stream]) == 4
    replica.fails = True
    await all_of(pool, group([1], 4))
    assert pauses[:4] == [1.0, 2.0, 4.0, 4.0]
    assert 1.0 in pauses[4:]
    await pool.close()


async def test_a_replica_that_sends_twice_is_put_out(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Nobody receives a rollout twice."""
    replicas[0].repeats = True
    replicas[0].open = False
    assert await all_of(pool, *GROUPS) == await expected(*GROUPS)
    await until(lambda: pool.status().replicas == 2)


async def test_whoever_hangs_is_found_by_its_checks(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Its work is done elsewhere, and it serves again when it answers."""
    replicas[1].gate.clear()
    replicas[1].answers = replicas[1].open = False
    assert await all_of(pool, *GROUPS) == await expected(*GROUPS)
    await until(lambda: pool.status().replicas == 2)
    await until(lambda: "switched off" in "".join(pool.problems().values()))
    replicas[1].answers = replicas[1].open = True
    replicas[1].gate.set()
    await until(lambda: pool.status().replicas == 3)


async def test_work_waits_for_a_replica(pool: ReplicaPool, replicas: list[MortalEngine]) -> None:
    """With none left it waits, and whoever comes first does it."""
    for replica in replicas:
        replica.open = False
        replica.die()
    stream = pool.generate(group([1], 20))
    await until(lambda: pool.status().replicas == 0)
    with pytest.raises(Unavailable, match="no replica serves"):
        await pool.load_weights(Path("/"), 1)
    late = MortalEngine()
    pool.add(late)
    assert [sorted([c async for c in stream], key=lambda c: c.index)] == await expected(
        group([1], 20)
    )
    assert sum(g.num_rollouts for g, _ in late.asked) == 20


async def test_whoever_joins_has_the_weights_first(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """Newcomers and those that come back; also when the weights change meanwhile."""
    await pool.load_weights(tmp_path, 3)
    late = MortalEngine()
    pool.add(late)
    replicas[0].die()
    streams = [pool.generate(each) for each in GROUPS]
    await pool.load_weights(tmp_path, 4)
    await until(lambda: pool.status().replicas == 4)
    found = [c for stream in streams for c in [c async for c in stream]]
    assert len(found) == 180
    assert {s.version for c in found for s in c.weights} <= {3, 4}
    assert late.loads[-1] == replicas[0].loads[-1] == 4
    after = await all_of(pool, *GROUPS)
    assert {s.version for rollouts in after for c in rollouts for s in c.weights} == {4}
    for replica in (late, replicas[0]):
        assert all(version in (3, 4) for _, version in replica.asked[-3:])


async def test_a_replica_without_the_new_weights_leaves_until_it_has_them(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """Whether it refuses them or has others under the same version."""
    replicas[0].refuses.add(2)
    replicas[1].forges.add(2)
    replicas.append(MortalEngine())
    pool.add(replicas[3])
    await until(lambda: pool.status().replicas == 4)
    loaded = await pool.load_weights(tmp_path, 2)
    assert (loaded.version, loaded.fingerprint) == (2, "fake-2")
    (found,) = await all_of(pool, group([1], 60))
    assert {s.version for c in found for s in c.weights} == {2}
    await until(lambda: pool.status().replicas == 2)
    reasons = " ".join(pool.problems().values())
    assert "refuses" in reasons
    assert "not those of the other replicas" in reasons
    replicas[0].refuses.clear()
    replicas[1].forges.clear()
    await until(lambda: pool.status().replicas == 4)
    assert replicas[0].loads == replicas[1].loads == [2]


async def test_weights_that_nobody_takes_change_nothing(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """Every replica stays and serves the old ones."""
    await pool.load_weights(tmp_path, 1)
    for replica in replicas:
        replica.refuses.add(2)
    with pytest.raises(FailedPrecondition, match="it refuses"):
        await pool.load_weights(tmp_path, 2)
    assert pool.status().replicas == 3
    assert pool.status().weight_version == 1
    (found,) = await all_of(pool, group([1], 60))
    assert {s.version for c in found for s in c.weights} == {1}
    assert [replica.lives for replica in replicas] == [1, 1, 1]


async def test_an_update_does_not_wait_for_a_replica_that_hangs(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """It leaves when its checks fail; the others serve the new weights."""
    replicas[2].hang = True
    update = asyncio.ensure_future(pool.load_weights(tmp_path, 5))
    replicas[2].answers = replicas[2].open = False
    assert (await asyncio.wait_for(update, 20)).version == 5
    await until(lambda: pool.status().replicas == 2)


async def test_an_update_leaves_behind_who_takes_too_long() -> None:
    """Also if it answers its checks: its disk may hang, not its process."""
    quick, slow = MortalEngine(), MortalEngine()
    pool = ReplicaPool("pool", [quick, slow], replace(QUICK, update_seconds=0.2))
    await pool.start()
    await until(lambda: pool.status().replicas == 2)
    slow.hang = True
    slow.open = False
    assert (await asyncio.wait_for(pool.load_weights(Path("/"), 5), 20)).version == 5
    assert quick.loads == [5]
    await until(lambda: pool.status().replicas == 1)
    slow.hang, slow.open = False, True
    await until(lambda: pool.status().replicas == 2)
    assert slow.loads == [5]
    await pool.close()


async def test_a_replica_that_dies_in_an_update_dies_once(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """What its old life says of the update does not end the new one."""
    go = asyncio.Event()
    load = replicas[0].load_weights

    async def late(path: Path, version: int) -> LoadedWeights:
        await go.wait()
        return await load(path, version)

    replicas[0].load_weights = late  # type: ignore[method-assign]
    replicas[1].hang = True
    update = asyncio.ensure_future(pool.load_weights(tmp_path, 5))
    await until(lambda: replicas[2].loads == [5])
    pool._lose(pool._members[pool.numbers[1]], "it died")
    replicas[1].hang = False
    await until(lambda: replicas[1].lives == 2)
    go.set()
    await update
    await until(lambda: pool.status().replicas == 3)
    assert [replica.lives for replica in replicas] == [1, 2, 1]
    assert replicas[1].loads == [5]


async def test_a_replica_that_cannot_serve_after_an_update_leaves(
    pool: ReplicaPool, replicas: list[MortalEngine], tmp_path: Path
) -> None:
    """Those that refuse keep the old weights and stay; it is started anew."""
    replicas[1].refuses.add(5)
    replicas[2].refuses.add(5)

    async def torn(path: Path, version: int) -> LoadedWeights:
        raise Unavailable("no weights serve")

    replicas[0].load_weights = torn  # type: ignore[method-assign]
    with pytest.raises(FailedPrecondition, match="it refuses"):
        await pool.load_weights(tmp_path, 5)
    assert pool.status().replicas == 2
    await until(lambda: replicas[0].lives == 2)
    assert [replica.lives for replica in replicas] == [2, 1, 1]


async def test_a_replica_that_is_removed_finishes_what_it_holds(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """It takes nothing new, loses nothing, and is closed."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 100))
    await until(lambda: all(replica.held == 16 for replica in replicas))
    removal = asyncio.ensure_future(pool.remove(pool.numbers[0]))
    await asyncio.sleep(0)
    assert pool.status().replicas == 2
    for replica in replicas:
        replica.gate.set()
    found = sorted([c async for c in stream], key=lambda c: c.index)
    await removal
    assert [found] == await expected(group([1], 100))
    assert sum(g.num_rollouts for g, _ in replicas[0].asked) == 16
    assert sum(g.num_rollouts for r in replicas for g, _ in r.asked) == 100
    assert replicas[0].closed.is_set()
    assert replicas[0].lives == 1


async def test_closing_an_iterator_frees_every_replica(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """What waits is dropped, what runs is stopped."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 1000))
    await until(lambda: all(replica.held for replica in replicas))
    await stream.aclose()
    await until(lambda: not any(replica.held for replica in replicas))
    assert pool.status().running == pool.status().waiting == 0


async def test_a_caller_that_leaves_before_its_piece_begins_gives_back_the_place(
    pool: ReplicaPool,
) -> None:
    """At whichever step of the loop it leaves, nothing stays counted as running."""
    for turns in range(6):
        streams = [pool.generate(group([k], 16, request=k)) for k in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for stream in streams:
            await stream.aclose()
    await until(lambda: pool.status().running == pool.status().waiting == 0)
    assert await all_of(pool, *GROUPS) == await expected(*GROUPS)


async def test_a_replica_lost_before_its_piece_begins_loses_nothing(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Pieces whose tasks have not run wait again."""
    for turns in range(6):
        streams = [pool.generate(each) for each in GROUPS]
        for _ in range(turns):
            await asyncio.sleep(0)
        for member in pool._members:
            pool._lose(member, "it is lost")
            for task in member.tasks:
                task.cancel()
        async with asyncio.timeout(60):
            found = [sorted([c async for c in s], key=lambda c: c.index) for s in streams]
        assert found == await expected(*GROUPS)
        await until(lambda: pool.status().replicas == 3)
    assert pool.status().running == 0


async def test_a_pool_that_closes_tells_whoever_waits(
    pool: ReplicaPool, replicas: list[MortalEngine]
) -> None:
    """Each rollout arrives, the missing ones as failed."""
    for replica in replicas:
        replica.gate.clear()
    stream = pool.generate(group([1], 100, first_index=7))
    await until(lambda: all(replica.held for replica in replicas))
    await pool.close()
    found = [c async for c in stream]
    assert [c.index for c in found] == list(range(7, 107))
    assert {c.error for c in found} == {"the server is shutting down"}


async def test_a_replica_that_can_never_start_is_said_at_once() -> None:
    """A setting that is wrong ends the start."""

    class Wrong(MortalEngine):
        async def start(self) -> None:
            raise ConfigError("model: is wrong")

    pool = ReplicaPool("pool", [Wrong()], QUICK)
    with pytest.raises(ConfigError, match="model: is wrong"):
        await pool.start()
    await pool.close()

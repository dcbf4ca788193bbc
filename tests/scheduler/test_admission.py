"""Room for calls: never more than there is, all of it given back, nobody left waiting."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler.admission import GRACE_SECONDS, Admission
from knapsack_scheduler.errors import ResourceExhausted, TooSlow


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), callers=st.integers(1, 40))
async def test_room_is_kept_and_given_back(seed: int, callers: int) -> None:
    """Whoever comes, waits, gives up or is cancelled, at whatever moment."""
    draw, admission, held = random.Random(seed), Admission(10), [0]

    async def call(number: int) -> None:
        size = draw.randrange(1, 11)
        ticket = await admission.admit(size, f"peer-{number % 4}", draw.choice([0.0, 0.001, 30.0]))
        held[0] += size
        try:
            assert held[0] <= admission.capacity
            for _ in range(draw.randrange(4)):
                await asyncio.sleep(0)
        finally:
            held[0] -= size
            ticket.close()

    tasks = [asyncio.ensure_future(call(number)) for number in range(callers)]
    while any(not task.done() for task in tasks):
        await asyncio.sleep(0)
        if draw.random() < 0.3:
            draw.choice(tasks).cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, ResourceExhausted):
            await task
    assert admission.used == 0
    (await admission.admit(10, "after", 1.0)).close()


async def test_connections_are_served_in_turn() -> None:
    """One that asks for much does not keep the others waiting behind all of it."""
    admission, served = Admission(1), []
    first = await admission.admit(1, "greedy")

    async def call(peer: str) -> None:
        ticket = await admission.admit(1, peer)
        served.append(peer)
        ticket.close()

    tasks = [asyncio.ensure_future(call("greedy")) for _ in range(20)]
    tasks.append(asyncio.ensure_future(call("modest")))
    await asyncio.sleep(0)
    first.close()
    await asyncio.gather(*tasks)
    assert served.index("modest") <= 1


async def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    """The message says how much there is and how much is taken."""
    admission = Admission(100)
    ticket = await admission.admit(60, "a")
    with pytest.raises(ResourceExhausted, match="holds 60 of 100 bytes"):
        await admission.admit(50, "b", 0.001)
    with pytest.raises(ResourceExhausted, match="holds 60 of 100 bytes"):
        ticket.resize(101)
    ticket.resize(100)
    ticket.close()
    assert admission.used == 0


async def test_a_transfer_that_ends_by_itself_leaves_its_room_to_the_next() -> None:
    """A call that arrives in the turn in which the limit passes is let in, and none is lost."""
    admission = Admission(10)
    slow = await admission.admit(10, "slow")

    async def receive() -> None:
        async with slow.transfer(0.0, "the request did not arrive"):
            # Past its grace, so that whoever waits may end it.
            slow.since -= 2 * GRACE_SECONDS
            await asyncio.get_running_loop().create_future()

    async def stalled() -> None:
        with pytest.raises(TooSlow):
            await receive()
        slow.close()

    first = asyncio.create_task(stalled())
    await asyncio.sleep(0)
    second = asyncio.create_task(admission.admit(10, "next"))
    ticket = await second
    await first
    assert admission.used == 10
    ticket.close()
    assert admission.used == 0


async def test_time_in_which_the_loop_was_held_up_counts_against_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What arrived meanwhile is read first; who has sent nothing then gives way after all."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)
    admission, told = Admission(10), []
    slow = await admission.admit(10, "slow")
    slow.since, slow.give_way = now, lambda: told.append("slow")
    admission.watch(slow)
    waiting = asyncio.create_task(admission.admit(10, "next"))
    await asyncio.sleep(0)
    now += 5 * GRACE_SECONDS
    for _ in range(5):
        await asyncio.sleep(0)
    assert told == []
    # The look that came late was due a tenth after it began: nine more would be its grace.
    for _ in range(8):
        now += GRACE_SECONDS / 10
        for _ in range(5):
            await asyncio.sleep(0)
        assert told == []
    for _ in range(4):
        now += GRACE_SECONDS / 10
        for _ in range(5):
            await asyncio.sleep(0)
    assert told == ["slow"]
    slow.close()
    (await waiting).close()
    assert admission.used == 0

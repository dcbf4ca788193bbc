"""The engine is full, its memory is bounded, and nobody waits for somebody else's million."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from knapsack_genserver.admission import AdmissionLimits
from knapsack_genserver.engine import Completion, FinishReason, WeightSpan
from knapsack_genserver.errors import InvalidArgument, ResourceExhausted, Unavailable
from knapsack_genserver.events import Event, Events, RolloutsGivenUp, WaveCompleted
from knapsack_genserver.feeder import Feeding
from knapsack_genserver.service import GeneratorService
from knapsack_proto.v1 import generation_pb2 as pb

from manual_engine import ManualEngine


async def settle() -> None:
    """Let everything happen that can happen now."""
    for _ in range(20):
        await asyncio.sleep(0)


class Caller:
    """Reads a request's rollouts as far as it is told to."""

    def __init__(self, service: GeneratorService, sizes: list[int], **request: Any) -> None:
        self.rollouts: list[pb.Rollout] = []
        self.stream: AsyncGenerator[pb.Rollout, None] = service.generate(
            pb.GenerateRequest(
                prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[k % 60])) for k in range(len(sizes))],
                num_rollouts=sizes,
                sampling=pb.SamplingParams(max_tokens=5, seed=1),
                **request,
            )
        )
        self.reading: asyncio.Task[None] = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for rollout in self.stream:
            self.rollouts.append(rollout)

    async def leave(self) -> None:
        """Go away in the middle."""
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)
        await self.stream.aclose()


def service_of(engine: ManualEngine, **options: Any) -> tuple[GeneratorService, list[Event]]:
    """Return a service and the list of its events."""
    events, seen = Events(), list[Event]()
    events.listen(seen.append)
    return GeneratorService(engine, events, **options), seen


async def test_a_million_rollouts_are_one_entry_and_not_a_million() -> None:
    """The engine holds what it wants and one chunk, however many are asked for."""
    engine = ManualEngine(capacity=64)
    service, _ = service_of(engine)
    large = Caller(service, [100_000] * 10)
    await settle()
    assert 64 <= len(engine.held) < 64 + 32
    assert service.admitted_rollouts == 1_000_000
    assert service.status().waiting == 1_000_000 - len(engine.held)
    for _ in range(500):
        engine.finish()
        await settle()
        # Full at all times, up to the room that a whole chunk needs.
        assert len(engine.held) > 64 - 64 // 5
    assert engine.most_held < 64 + 32
    assert len(large.rollouts) == 500
    await large.leave()
    assert service.admitted_rollouts == service.status().waiting == len(engine.held) == 0


async def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    """It gets the next places, until both have as many."""
    engine = ManualEngine(capacity=64)
    service, _ = service_of(engine)
    large = Caller(service, [5000])
    await settle()
    small = Caller(service, [20, 12])
    await settle()
    before = len(engine.given)
    while len(engine.given) < before + 1:
        engine.finish()
        await settle()
    assert engine.given[before].num_rollouts == 64 // 5
    assert engine.given[before].request != engine.given[0].request
    finished = 0
    while not small.reading.done():
        engine.finish()
        await settle()
        finished += 1
    assert finished < 200
    assert len(small.rollouts) == 32
    await large.leave()


async def test_three_callers_have_equal_shares() -> None:
    """Of the places in the engine, whatever they have asked for, within a chunk."""
    engine = ManualEngine(capacity=90)
    service, _ = service_of(engine, feeding=Feeding(chunk_rollouts=5))
    callers = [Caller(service, sizes) for sizes in ([9000], [3] * 400, [200] * 5)]
    await settle()
    for _ in range(600):
        engine.finish()
        await settle()
    held: dict[int, int] = {}
    for group, _, _ in engine.held:
        held[group.request] = held.get(group.request, 0) + 1
    assert len(held) == 3
    assert max(held.values()) - min(held.values()) <= 10
    for caller in callers:
        await caller.leave()


async def test_what_is_expected_to_take_longest_begins_first() -> None:
    """Without a word about it, what may take longest; among those, the largest group."""
    engine = ManualEngine(capacity=1000)
    service, _ = service_of(engine)
    caller = Caller(service, [3, 9, 4, 2, 5], expected_tokens=[2, 1, 0, 5, 400])
    await settle()
    assert [g.prompt[0] for g in engine.given] == [4, 2, 3, 0, 1]
    await caller.leave()
    with pytest.raises(InvalidArgument, match=r"expected_tokens\[1\] = -1"):
        await Caller(service, [1, 1], expected_tokens=[1, -1]).reading
    with pytest.raises(InvalidArgument, match=r"one per prompt \(2\)"):
        await Caller(service, [1, 1], expected_tokens=[1]).reading


async def test_a_caller_that_does_not_read_holds_up_itself_only() -> None:
    """The engine makes no more for it than it may leave unread; another caller goes on."""
    engine = ManualEngine(capacity=16)
    feeding = Feeding(chunk_rollouts=4, unread_rollouts=50)
    service, _ = service_of(engine, feeding=feeding)
    # Reads one and no more, as a connection that is full does.
    stream = service.generate(
        pb.GenerateRequest(
            prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1]))],
            num_rollouts=[10_000],
            sampling=pb.SamplingParams(max_tokens=5),
        )
    )
    first = asyncio.ensure_future(anext(stream))
    await settle()
    while engine.held:
        engine.finish()
        await settle()
    await first
    assert 50 <= service.unread_rollouts <= 50 + 16 + 4
    other = Caller(service, [300])
    await settle()
    while not other.reading.done():
        engine.finish()
        await settle()
    assert len(other.rollouts) == 300
    assert not engine.held
    # It reads on, and is served on.
    for _ in range(10):
        await anext(stream)
    await settle()
    assert engine.held
    await stream.aclose()
    assert service.unread_rollouts == service.admitted_rollouts == 0


async def test_limits_are_named_and_nothing_is_left_behind() -> None:
    """Each limit says which flag it is, and the next caller that fits is served."""
    limits = AdmissionLimits(waiting_rollouts=60, call_rollouts=50, prompt_tokens=9, calls=2)
    engine = ManualEngine(capacity=1000)
    service, _ = service_of(engine, admission=limits)
    with pytest.raises(InvalidArgument, match=r"at most 50 \(max_call_rollouts\)"):
        await Caller(service, [30, 21]).reading
    with pytest.raises(ResourceExhausted, match=r"at most 9 tokens .*max_prompt_tokens"):
        await Caller(service, [1] * 10).reading
    first = Caller(service, [50])
    await settle()
    with pytest.raises(ResourceExhausted, match=r"at most 60 may \(max_waiting_rollouts\)"):
        await Caller(service, [11]).reading
    second = Caller(service, [10])
    await settle()
    with pytest.raises(ResourceExhausted, match=r"at most 2 may be \(max_calls\)"):
        await Caller(service, [1]).reading
    await first.leave()
    third = Caller(service, [50])
    await settle()
    for caller in (second, third):
        await caller.leave()
    assert service.admitted_rollouts == service.calls == len(engine.held) == 0


async def test_a_group_that_the_engine_fails_on_is_reported_by_rollout() -> None:
    """Those not finished arrive with the error, the others as they are; other groups go on."""

    class Failing(ManualEngine):
        def generate(self, group: Any) -> Any:
            if group.prompt[0] == 2:
                raise RuntimeError("cannot")
            stream = super().generate(group)
            return broken(stream) if group.prompt[0] == 1 else stream

    async def broken(stream: Any) -> Any:
        yield await anext(stream)
        # Twice the same, which nobody gets twice.
        yield Completion(0, [9], [-1.0], FinishReason.STOP)
        raise OSError("disk")

    engine = Failing(capacity=100)
    service, seen = service_of(engine)
    caller = Caller(service, [3, 4, 5, 0], request_id="r-1")
    await settle()
    while engine.held:
        engine.finish()
        await settle()
    await caller.reading
    found = {(r.prompt_index, r.rollout_index): r.error for r in caller.rollouts}
    assert len(found) == len(caller.rollouts) == 12
    assert [found[0, k] for k in range(3)] == [""] * 3
    assert [found[1, k] for k in range(4)] == ["", *["OSError: disk"] * 3]
    assert [found[2, k] for k in range(5)] == ["RuntimeError: cannot"] * 5
    (wave,) = [event for event in seen if isinstance(event, WaveCompleted)]
    assert (wave.request_id, wave.prompts, wave.rollouts, wave.failed) == ("r-1", 3, 12, 8)


async def test_an_engine_that_ends_early_leaves_nobody_waiting() -> None:
    """What it did not deliver arrives as failed."""

    class Short(ManualEngine):
        async def _two(self, group: Any) -> Any:
            for index in range(2):
                yield Completion(index, [1], [-1.0], FinishReason.STOP)

        def generate(self, group: Any) -> Any:
            return self._two(group)

    service, _ = service_of(Short())
    caller = Caller(service, [5])
    await caller.reading
    errors = [r.error for r in sorted(caller.rollouts, key=lambda r: r.rollout_index)]
    assert errors == ["", "", *["the engine ended without this rollout"] * 3]


async def test_an_engine_that_is_gone_ends_the_call() -> None:
    """With its own status, and without a rollout that looks like one."""
    engine = ManualEngine(capacity=10)
    service, seen = service_of(engine)
    caller = Caller(service, [50])
    await settle()
    engine.refuses = Unavailable("the engine is closing")
    while not caller.reading.done():
        engine.finish()
        await settle()
    with pytest.raises(Unavailable, match="closing"):
        await caller.reading
    assert not any(r.error for r in caller.rollouts)
    assert service.admitted_rollouts == len(engine.held) == 0
    (given_up,) = [event for event in seen if isinstance(event, RolloutsGivenUp)]
    assert given_up == RolloutsGivenUp(50 - len(caller.rollouts), "cancelled")


@pytest.mark.parametrize("places", [8, 16, 32, 64])
async def test_a_small_engine_does_not_run_dry(places: int) -> None:
    """While work waits, every place is taken; a fifth of the capacity is to spare."""
    engine = ManualEngine(capacity=places + places // 4)
    service, _ = service_of(engine)
    caller = Caller(service, [32] * 16)
    await settle()
    for _ in range(200):
        assert len(engine.held) >= places
        engine.finish()
        await settle()
    await caller.leave()


async def test_a_failed_call_that_is_not_read_gives_its_places_back() -> None:
    """It ends when it is read; until then others have the engine."""
    engine = ManualEngine(capacity=8)
    service, _ = service_of(engine)
    unread = service.generate(
        pb.GenerateRequest(
            prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[1]))],
            num_rollouts=[1000],
            sampling=pb.SamplingParams(max_tokens=5, seed=1),
        )
    )
    first = asyncio.ensure_future(anext(unread))
    await settle()
    engine.finish()
    await first
    engine.refuses = Unavailable("broken for a moment")
    while engine.held:
        engine.finish()
        await settle()
    engine.refuses = None
    other = Caller(service, [4])
    await settle()
    while engine.held:
        engine.finish()
        await settle()
    assert other.reading.done()
    assert len(other.rollouts) == 4
    with pytest.raises(Unavailable, match="broken for a moment"):
        async for _ in unread:
            pass


@pytest.mark.parametrize(
    "odd",
    [
        Completion(1, [2**31], [-1.0], FinishReason.STOP),
        Completion(1, [], [], FinishReason.ERROR, (), "the server says \ud800"),
        Completion(1, [5], [-1.0], FinishReason.STOP, (WeightSpan(0, 0, 2**40),)),
    ],
)
async def test_an_answer_that_no_message_can_carry_is_a_failed_rollout(odd: Completion) -> None:
    """It is accounted for like any other, and so is the rest of its group."""
    engine = ManualEngine(capacity=8)
    service, _ = service_of(engine)
    caller = Caller(service, [3])
    await settle()
    _, _, inbox = engine.held.pop(1)
    inbox.put([odd])
    engine.finish()
    engine.finish()
    await asyncio.wait_for(caller.reading, 20)
    failed = [r for r in caller.rollouts if r.error]
    assert [r.rollout_index for r in failed] == [1]
    assert failed[0].finish_reason == pb.FINISH_REASON_ERROR
    assert len(caller.rollouts) == 3
    assert service.admitted_rollouts == 0

"""Sessions against a simple model: every rollout asked for is accounted for, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from knapsack_genserver.admission import AdmissionLimits
from knapsack_genserver.errors import GeneratorError, InvalidArgument, Unavailable
from knapsack_genserver.events import Events
from knapsack_genserver.feeder import Feeding
from knapsack_genserver.seeds import group_seeds
from knapsack_genserver.service import GeneratorService
from knapsack_genserver.session import Patience
from knapsack_genserver.wire import Limits
from knapsack_proto.v1 import generation_pb2 as pb

from manual_engine import ManualEngine, tokens_of

SEED = 5
MOST = 6
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def opening(**sampling: Any) -> pb.GenerateSessionRequest:
    """Return the first request of a session."""
    params = pb.SamplingParams(**{"max_tokens": MOST, "seed": SEED, **sampling})
    return pb.GenerateSessionRequest(open=pb.OpenSession(request_id="s", sampling=params))


def adding(
    numbers: list[int], new: int = 0, indices: list[int] | None = None, **options: Any
) -> pb.GenerateSessionRequest:
    """Return a request for rollouts, of so many new prompts too."""
    prompts = [pb.Prompt(tokens=pb.TokenIds(ids=[k + 1])) for k in range(new)]
    add = pb.AddRollouts(
        prompts=prompts, num_rollouts=numbers, prompt_indices=indices or [], **options
    )
    return pb.GenerateSessionRequest(add=add)


def stopping(positions: list[int]) -> pb.GenerateSessionRequest:
    """Return a request to stop groups."""
    return pb.GenerateSessionRequest(stop=pb.StopGroups(prompt_indices=positions))


class Client:
    """The other end of a session, in the same loop."""

    def __init__(self, service: GeneratorService) -> None:
        self.requests: asyncio.Queue[pb.GenerateSessionRequest | None] = asyncio.Queue()
        self.rollouts: list[pb.Rollout] = []
        self.answers: list[pb.SessionAnswer] = []
        self.stream = service.generate_session(self._sent())
        self.reading = asyncio.ensure_future(self._read())

    async def _sent(self) -> AsyncIterator[pb.GenerateSessionRequest]:
        while (request := await self.requests.get()) is not None:
            yield request

    async def _read(self) -> None:
        async for response in self.stream:
            assert response.rollouts or response.answers
            self.rollouts += response.rollouts
            self.answers += response.answers

    async def settle(self) -> None:
        """Let everything happen that can happen now."""
        for _ in range(30):
            await asyncio.sleep(0)

    async def ask(self, request: pb.GenerateSessionRequest) -> pb.SessionAnswer:
        """Send a request and return its answer."""
        before = len(self.answers)
        self.requests.put_nowait(request)
        for _ in range(30):
            await asyncio.sleep(0)
            if len(self.answers) > before:
                break
        assert len(self.answers) == before + 1
        return self.answers[-1]


class SessionModel(RuleBasedStateMachine):
    """The model: how many were asked for of each prompt, and which of them were stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.engine = ManualEngine(capacity=6)
        self.asked: list[int] = []
        self.stopped: set[tuple[int, int]] = set()
        self.failed: set[tuple[int, int]] = set()

    def run(self, work: Any) -> Any:
        """Run some of the loop."""
        return self.loop.run_until_complete(work)

    @initialize()
    def open(self) -> None:
        """Open a session."""

        async def begin() -> None:
            self.service = GeneratorService(
                self.engine,
                Events(),
                limits=Limits(prompts=12, group=40),
                admission=AdmissionLimits(call_rollouts=60),
                feeding=Feeding(chunk_rollouts=4),
            )
            self.client = Client(self.service)
            self.client.requests.put_nowait(opening())
            await self.client.settle()

        self.run(begin())

    def left(self) -> int:
        """Return how many rollouts are not accounted for."""
        return sum(self.asked) - len(self.stopped) - len(self.client.rollouts)

    @rule(
        new=st.integers(0, 3),
        numbers=st.lists(st.integers(-1, 15), min_size=16, max_size=16),
        indices=st.none() | st.lists(st.integers(-1, 13), max_size=4),
    )
    def add(self, new: int, numbers: list[int], indices: list[int] | None) -> None:
        """Right or wrong; what is wrong changes nothing."""
        total = len(self.asked) + new
        positions = indices or list(range(total))
        numbers = numbers[: len(positions)]
        more = [0] * total
        right = 0 < total <= 12 and len(set(positions)) == len(positions)
        right = right and all(0 <= at < total for at in positions)
        if right:
            for at, n in zip(positions, numbers, strict=True):
                more[at] = n
            after = [n + m for n, m in zip([*self.asked, *[0] * new], more, strict=True)]
            right = all(m >= 0 for m in more) and max(after) <= 40
        answer = self.run(self.client.ask(adding(numbers, new, indices)))
        if not right:
            assert answer.code == INVALID, answer
            assert "add." in answer.error
        elif self.left() + sum(more) > 60:
            assert answer.code in (EXHAUSTED, INVALID)
            assert "max_call_rollouts" in answer.error
        else:
            assert (answer.code, answer.error) == (0, "")
            self.asked = after
        assert self.service.admitted_rollouts == self.left()

    @rule(positions=st.lists(st.integers(-1, 12), max_size=3))
    def stop(self, positions: list[int]) -> None:
        """What had not finished is named, once, and nothing of it comes any more."""
        right = len(set(positions)) == len(positions)
        right = right and all(0 <= at < len(self.asked) for at in positions)
        answer = self.run(self.client.ask(stopping(positions)))
        if not right:
            assert answer.code == INVALID
            return
        there = {(r.prompt_index, r.rollout_index) for r in self.client.rollouts}
        expected = {
            (at, index)
            for at in positions
            for index in range(self.asked[at])
            if (at, index) not in there | self.stopped
        }
        found = [(g.prompt_index, k) for g in answer.stopped_groups for k in g.rollout_indices]
        assert found == sorted(expected)
        self.stopped |= expected
        seeds = group_seeds(SEED, 0, 12)
        held = {(seeds.index(group.seed), index) for group, index, _ in self.engine.held}
        assert not held & self.stopped

    @precondition(lambda self: self.engine.held)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        """The engine finishes some rollout, in any order."""
        at = data.draw(st.integers(0, len(self.engine.held) - 1))

        async def one() -> None:
            self.engine.finish(at, "no luck" if fails else "")
            await self.client.settle()

        self.run(one())

    def check(self) -> None:
        """Each rollout is what it must be, and there is none that must not."""
        places = [(r.prompt_index, r.rollout_index) for r in self.client.rollouts]
        assert len(set(places)) == len(places)
        assert not set(places) & self.stopped
        seeds = group_seeds(SEED, 0, 12)
        for rollout in self.client.rollouts:
            assert 0 <= rollout.rollout_index < self.asked[rollout.prompt_index]
            if not rollout.error:
                seed = seeds[rollout.prompt_index]
                assert list(rollout.token_ids) == tokens_of(seed, rollout.rollout_index, MOST)
        assert not self.client.reading.done()

    def teardown(self) -> None:
        """Close; everything that is left comes, and the session ends."""
        if not hasattr(self, "client"):
            self.loop.close()
            return
        self.check()

        async def end() -> None:
            self.client.requests.put_nowait(None)
            await self.client.settle()
            while self.engine.held:
                assert len(self.engine.held) <= 6 + 4
                self.engine.finish(0)
                await self.client.settle()
            assert self.client.reading.done()
            self.client.reading.result()

        self.run(end())
        places = {(r.prompt_index, r.rollout_index) for r in self.client.rollouts}
        assert len(places) == len(self.client.rollouts)
        assert not places & self.stopped
        assert places | self.stopped == {
            (at, k) for at, n in enumerate(self.asked) for k in range(n)
        }
        assert self.service.admitted_rollouts == self.service.calls == 0
        self.loop.close()


TestSessionModel = SessionModel.TestCase
TestSessionModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "request = 'none': must be open"),
        ([adding([1], 1)], "request = 'add': must be open"),
        ([opening(), opening()], "request = 'open': must be the first only"),
        ([opening(), pb.GenerateSessionRequest()], "request = 'none': must be add or stop"),
        ([opening(top_p=2.0)], "sampling.top_p = 2.0"),
    ],
    ids=str,
)
async def test_who_does_not_speak_the_contract_is_told(requests: list[Any], message: str) -> None:
    """The session ends, with nothing left of it."""
    service = GeneratorService(ManualEngine(), Events())
    client = Client(service)
    for request in [*requests, None]:
        client.requests.put_nowait(request)
    with pytest.raises(InvalidArgument) as refused:
        await client.reading
    assert message in str(refused.value)
    assert service.calls == 0


async def test_a_session_that_is_left_frees_the_engine() -> None:
    """In the middle of rollouts, with answers and rollouts unread."""
    engine = ManualEngine(capacity=20)
    service = GeneratorService(engine, Events())
    client = Client(service)
    client.requests.put_nowait(opening())
    await client.ask(adding([50, 50], 2))
    assert engine.held
    client.reading.cancel()
    await asyncio.gather(client.reading, return_exceptions=True)
    await client.stream.aclose()
    assert service.admitted_rollouts == service.calls == len(engine.held) == 0


async def test_a_server_that_drains_finishes_what_it_has_and_takes_no_more() -> None:
    """An addition is refused, what runs comes, and an idle session is told."""
    engine = ManualEngine()
    service = GeneratorService(engine, Events())
    client, idle = Client(service), Client(service)
    for each in (client, idle):
        each.requests.put_nowait(opening())
    await client.ask(adding([3], 1))
    service.drain()
    answer = await client.ask(adding([1]))
    assert answer.code == grpc.StatusCode.UNAVAILABLE.value[0]
    with pytest.raises(Unavailable):
        await idle.reading
    for _ in range(3):
        engine.finish()
    with pytest.raises(Unavailable):
        await client.reading
    assert len(client.rollouts) == 3
    with pytest.raises(GeneratorError, match="shutting down"):
        await anext(service.generate(pb.GenerateRequest()))


async def test_a_client_that_reads_no_answers_is_not_read_any_more() -> None:
    """Requests wait on its side of the wire and not in our memory."""
    service = GeneratorService(ManualEngine(), Events())
    requests: asyncio.Queue[pb.GenerateSessionRequest] = asyncio.Queue()
    for request in [opening(), adding([0], 1), *[stopping([])] * 500]:
        requests.put_nowait(request)

    async def sent() -> AsyncIterator[pb.GenerateSessionRequest]:
        while True:
            yield await requests.get()

    stream = service.generate_session(sent())
    await anext(stream)
    for _ in range(2000):
        await asyncio.sleep(0)
    assert requests.qsize() > 300
    await stream.aclose()


async def test_a_session_that_asks_for_nothing_is_ended() -> None:
    """Others may have its place; one with rollouts under way is waited for."""
    engine = ManualEngine()
    patience = Patience(opening_seconds=0.3, idle_seconds=0.3)
    service = GeneratorService(engine, Events(), patience=patience)
    busy = Client(service)
    busy.requests.put_nowait(opening())
    await busy.ask(adding([1], new=1))
    idle = Client(service)
    idle.requests.put_nowait(opening())
    with pytest.raises(Unavailable, match="nothing was asked"):
        await asyncio.wait_for(idle.reading, 20)
    with pytest.raises(InvalidArgument, match="must come within"):
        await asyncio.wait_for(Client(service).reading, 20)
    assert service.calls == 1
    engine.finish()
    with pytest.raises(Unavailable, match="nothing was asked"):
        await asyncio.wait_for(busy.reading, 20)
    assert len(busy.rollouts) == 1
    assert service.calls == 0


async def test_additions_of_one_prompt_are_bounded() -> None:
    """What is not finished costs by the addition, so there are only so many."""
    engine = ManualEngine(capacity=1)
    service = GeneratorService(engine, Events(), limits=Limits(waves=3))
    client = Client(service)
    client.requests.put_nowait(opening())
    assert (await client.ask(adding([1, 1], new=2))).code == 0
    assert (await client.ask(adding([1, 1]))).code == 0
    assert (await client.ask(adding([1], indices=[0]))).code == 0
    refused = await client.ask(adding([1, 1]))
    assert refused.code == EXHAUSTED
    assert "prompt 0" in refused.error
    assert service.admitted_rollouts == 5
    engine.finish()
    await client.settle()
    assert (await client.ask(adding([1], indices=[1]))).code == 0
    client.reading.cancel()
    await asyncio.gather(client.reading, return_exceptions=True)
    await client.stream.aclose()

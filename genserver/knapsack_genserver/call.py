"""The rollouts of one call: asked for in waves, given to the engine, waiting to be read.

Every rollout asked for is accounted for once: handed out, finished or failed, or named
among those that were stopped.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from knapsack_genserver import wire
from knapsack_genserver.backlog import Backlog
from knapsack_genserver.engine import Completion, FinishReason, Group, Tokenizer
from knapsack_genserver.errors import GeneratorError
from knapsack_genserver.events import Events, GroupCompleted, RolloutDelivered, WaveCompleted
from knapsack_proto.v1 import generation_pb2 as pb

_LOG = logging.getLogger(__name__)
_MESSAGE_TOKENS = 100_000
"""Tokens after which a reader gets what there is: some 700 KB on the wire."""


@dataclass(slots=True, eq=False)
class _Wave:
    """Rollouts that were asked for together, and what became of them."""

    start: float
    prompts: int
    rollouts: int
    left: int
    failed: int = 0
    stopped: int = 0
    tokens: int = 0
    error: str = ""
    seconds_to_95: float = 0.0


@dataclass(slots=True, eq=False)
class _Part:
    """A prompt's rollouts in one wave."""

    wave: _Wave
    first: int
    rollouts: int
    left: int


@dataclass(slots=True, eq=False)
class Chunk:
    """Rollouts of one prompt that the engine was given together.

    Attributes:
        position: of the prompt in its call.
        stream: the engine's answer.
        missing: indices of the rollouts that have not come out of the engine.
        reader: the task that reads the stream.
    """

    position: int
    part: _Part
    stream: AsyncIterator[Completion]
    missing: set[int]
    reader: asyncio.Task[None] | None = field(default=None)


class Call:
    """See the module. Used on the event loop only.

    Args:
        number: tells calls apart in the engine.
        request_id: as given by the caller.
        tokenizer: of the model, or None.
        events: told what happens.
        accounted: told of rollouts that are accounted for, in numbers.

    Attributes:
        request_id: as given by the caller.
        prompts: of the call, by position.
        asked: rollouts asked for so far of each; the next one has this index.
        backlog: what the engine has not been given.
        chunks: what it has been given and has not finished.
        in_engine: rollouts that the engine has been given and has not finished.
        left: rollouts asked for and not accounted for.
        prompt_tokens: of its prompts.
        unread_tokens: tokens of rollouts that the caller has not read.
        served: when the engine was last given work of this call, as a count.
    """

    def __init__(
        self,
        number: int,
        request_id: str,
        tokenizer: Tokenizer | None,
        events: Events,
        accounted: Callable[[int], None],
    ) -> None:
        self.request_id = request_id
        self.prompts: list[wire.AskedPrompt] = []
        self.asked: list[int] = []
        self.backlog = Backlog()
        self.chunks: set[Chunk] = set()
        self.in_engine = 0
        self.left = 0
        self.prompt_tokens = 0
        self.unread_tokens = 0
        self.served = 0
        self._number = number
        self._tokenizer = tokenizer
        self._events = events
        self._accounted = accounted
        self._parts: dict[int, list[_Part]] = {}
        self._outbox: deque[pb.Rollout | pb.SessionAnswer] = deque()
        self._changed = asyncio.Event()
        self._failure: GeneratorError | None = None

    @property
    def unread(self) -> int:
        """Rollouts and answers that the caller has not read."""
        return len(self._outbox)

    @property
    def has_failed(self) -> bool:
        """Whether the call ends with an error once it has been read."""
        return self._failure is not None

    def unfinished_waves(self, position: int) -> int:
        """Return how many waves of a prompt have rollouts that are not accounted for."""
        return len(self._parts.get(position, ()))

    def add(
        self,
        prompts: Sequence[wire.AskedPrompt],
        wanted: Sequence[wire.Wanted],
        prompt_tokens: int,
    ) -> None:
        """Take new prompts, with so many tokens, and ask for rollouts as one wave."""
        self.prompts.extend(prompts)
        self.prompt_tokens += prompt_tokens
        self.asked.extend([0] * len(prompts))
        total = sum(want.rollouts for want in wanted)
        wave = _Wave(time.perf_counter(), len(wanted), total, total)
        for want in wanted:
            at, first = want.position, self.asked[want.position]
            self._parts.setdefault(at, []).append(_Part(wave, first, want.rollouts, want.rollouts))
            most = self.prompts[at].sampling.max_tokens
            self.backlog.add(at, first, want.rollouts, min(want.expected_tokens or most, most))
            self.asked[at] += want.rollouts
        self.left += total
        self._changed.set()

    def next_group(self, most: int) -> tuple[Group, int]:
        """Return what the engine should be given next, and the position of its prompt."""
        position, first, count = self.backlog.take(most)
        prompt = self.prompts[position]
        tokens = list(prompt.tokens)
        return Group(tokens, count, prompt.sampling, prompt.seed, first, self._number), position

    def begin(self, group: Group, position: int, stream: AsyncIterator[Completion]) -> Chunk:
        """Note that the engine works on a group."""
        first = group.first_index
        part = next(p for p in self._parts[position] if p.first <= first < p.first + p.rollouts)
        chunk = Chunk(position, part, stream, set(range(first, first + group.num_rollouts)))
        self.chunks.add(chunk)
        self.in_engine += group.num_rollouts
        return chunk

    def put(self, chunk: Chunk, completion: Completion) -> None:
        """Take a rollout from the engine, once; whoever reads the call finds it."""
        try:
            message = wire.rollout_message(chunk.position, completion, self._tokenizer)
        except Exception as failure:
            # A token id that no integer holds, half a character in an error: whoever waits
            # for the rollout must hear of it all the same.
            _LOG.exception("an answer of the engine does not go into a message")
            error = ascii(completion.error or failure)
            completion = Completion(completion.index, [], [], FinishReason.ERROR, (), error)
            message = wire.rollout_message(chunk.position, completion, None)
        chunk.missing.discard(completion.index)
        self.in_engine -= 1
        self._outbox.append(message)
        tokens = len(completion.token_ids)
        self.unread_tokens += tokens
        self._changed.set()
        wave = chunk.part.wave
        wave.tokens += tokens
        if completion.error:
            wave.failed += 1
            wave.error = wave.error or completion.error
        reason = FinishReason.ERROR if completion.error else completion.reason
        self._events.emit(RolloutDelivered(reason, tokens))
        self._account(chunk.position, chunk.part, 1)

    def stop(self, positions: set[int]) -> dict[int, list[int]]:
        """Give up what is unfinished of these prompts; returns its indices, ascending.

        The chunks in the engine that this leaves without a rollout are to be ended.
        """
        stopped: dict[int, list[int]] = {}
        for position, ranges in self.backlog.drop(positions).items():
            stopped[position] = [index for part in ranges for index in part]
        for chunk in self.chunks:
            if chunk.position in positions and chunk.missing:
                stopped.setdefault(chunk.position, []).extend(chunk.missing)
                self.in_engine -= len(chunk.missing)
                chunk.missing.clear()
        for position, indices in stopped.items():
            indices.sort()
            parts = list(self._parts[position])
            for part in parts:
                count = sum(part.first <= index < part.first + part.rollouts for index in indices)
                if count:
                    part.wave.stopped += count
                    self._account(position, part, count)
        return stopped

    def abandon(self) -> int:
        """Account for everything that is left as given up; returns how many rollouts."""
        abandoned, self.left = self.left, 0
        self._accounted(abandoned)
        return abandoned

    def answer(self, answer: pb.SessionAnswer) -> None:
        """Put an answer behind the rollouts that have finished."""
        self._outbox.append(answer)
        self._changed.set()

    def fail(self, chunk: Chunk, error: GeneratorError) -> int:
        """End the call with an error that a chunk met, after what there is to read.

        Returns how many rollouts the engine does not hold any more.
        """
        self._failure = self._failure or error
        self._changed.set()
        lost = len(chunk.missing)
        chunk.missing.clear()
        self.in_engine -= lost
        return lost

    def wake(self) -> None:
        """Let the reader look again."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait until there is something to read, or something else has happened."""
        await self._changed.wait()

    def take(self) -> tuple[list[pb.Rollout], list[pb.SessionAnswer]]:
        """Return what there is to read: rollouts, and the answers that follow them.

        Raises:
            GeneratorError: the call has failed, and there is nothing left to read.
        """
        outbox = self._outbox
        rollouts: list[pb.Rollout] = []
        answers: list[pb.SessionAnswer] = []
        tokens = 0
        while outbox and tokens < _MESSAGE_TOKENS:
            item = outbox[0]
            if isinstance(item, pb.SessionAnswer):
                answers.append(item)
            elif answers:
                break
            else:
                rollouts.append(item)
                tokens += len(item.token_ids)
            outbox.popleft()
        self.unread_tokens -= tokens
        if not rollouts and not answers:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
        return rollouts, answers

    def _account(self, position: int, part: _Part, count: int) -> None:
        """Note that some rollouts of a part are accounted for."""
        self.left -= count
        self._accounted(count)
        wave = part.wave
        wave.left -= count
        part.left -= count
        seconds = time.perf_counter() - wave.start
        if wave.seconds_to_95 == 0.0 and 20 * wave.left <= wave.rollouts:
            wave.seconds_to_95 = seconds
        if part.left == 0:
            parts = self._parts[position]
            parts.remove(part)
            if not parts:
                del self._parts[position]
            self._events.emit(GroupCompleted(part.rollouts, seconds))
        if wave.left == 0:
            self._events.emit(
                WaveCompleted(
                    self.request_id,
                    wave.prompts,
                    wave.rollouts,
                    wave.failed,
                    wave.stopped,
                    wave.tokens,
                    seconds,
                    wave.seconds_to_95,
                    wave.error,
                )
            )

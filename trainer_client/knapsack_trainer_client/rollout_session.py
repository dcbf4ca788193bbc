"""Rollouts asked for wave by wave, and groups that are stopped when they have said enough.

with rollouts.session(max_tokens=512, seed=step) as session:
    allocation = budget.allocate(prompt_ids, 2048, step=step, waves=2)
    session.add(allocation.num_rollouts, prompts)
    while True:
        wave = session.collect()
        budget.report(allocation, rewards_of(wave), policy_version=step)
        if not allocation.remaining_rollouts:
            break
        allocation = budget.extend(allocation)
        session.add(allocation.num_rollouts)
    groups = session.groups
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import grpc

from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc
from knapsack_trainer_client.closing import AsyncClosing, Closing
from knapsack_trainer_client.errors import (
    ClientMisuse,
    GeneratorBusy,
    GeneratorUnavailable,
    InvalidRequest,
)
from knapsack_trainer_client.rollout_wire import (
    MESSAGE_BYTES,
    PromptLike,
    Rollout,
    RolloutGroups,
    prompt_messages,
    raise_status,
    rollout_of,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class RolloutSession(Closing):
    """See the module; ``RolloutClient.session`` opens one.

    Iterate over it for each rollout as it finishes, failed ones too; the iteration ends
    when everything asked for so far is there, and may be begun again after ``add``.
    Rollouts of a prompt are numbered through all waves, and rollout k is the same in
    whichever wave it was asked for.

    For one thread at a time; ``cancel`` may be called from any. Weights may change during
    a session: every rollout says which versions made it.

    Attributes:
        groups: everything that has been read so far, of every prompt of the session.
        outstanding: rollouts asked for that have not been read and were not stopped.

    Raises:
        GeneratorUnavailable: from any method: the server has gone, or was told to, before
            the last rollout. ``groups`` keeps what came; the session is over.
    """

    def __init__(
        self,
        stub: rpc.RolloutGeneratorStub,
        address: str,
        opening: pb.OpenSession,
        timeout: float | None,
    ) -> None:
        self.groups = RolloutGroups(0)
        self.outstanding = 0
        self._address = address
        self._requests: queue.SimpleQueue[pb.GenerateSessionRequest | None] = queue.SimpleQueue()
        self._requests.put(pb.GenerateSessionRequest(open=opening))
        self._call = stub.GenerateSession(iter(self._requests.get, None), timeout=timeout)
        self._came: deque[Rollout] = deque()
        self._answers: deque[pb.SessionAnswer] = deque()
        self._wave = RolloutGroups(0)
        self._over = False

    def add(
        self,
        num_rollouts: Sequence[int],
        prompts: Sequence[PromptLike] = (),
        *,
        prompt_indices: Sequence[int] | None = None,
        expected_tokens: Sequence[int] = (),
        prompt_ids: Sequence[str] = (),
    ) -> None:
        """Ask for rollouts, of the session's prompts and of new ones.

        Args:
            num_rollouts: beyond those asked for before, 0 or more of each prompt of the
                session, the new ones last; such as ``allocation.num_rollouts``.
            prompts: new ones, which get the next positions.
            prompt_indices: positions that ``num_rollouts`` is of, in place of all.
            expected_tokens: as ``RolloutClient.generate``, one per number.
            prompt_ids: names of the new prompts, for the server's logs.

        Raises:
            InvalidRequest: an argument the server refuses; nothing was added, and the
                session goes on.
            GeneratorBusy: the server's queue is full; the same.
        """
        if prompt_indices is not None and not prompt_indices:
            if len(num_rollouts) or len(prompts):
                raise InvalidRequest("prompt_indices = []: must be one per number")
            return
        request = pb.AddRollouts(
            prompts=prompt_messages(prompts, prompt_ids),
            prompt_indices=prompt_indices or (),
            num_rollouts=num_rollouts,
            expected_tokens=expected_tokens,
        )
        self._ask(pb.GenerateSessionRequest(add=request))
        for groups in (self.groups, self._wave):
            groups.extend([] for _ in prompts)
        self.outstanding += sum(num_rollouts)

    def stop(self, prompt_indices: Sequence[int]) -> int:
        """Give up what is unfinished of some prompts; returns how many rollouts that is.

        They are listed in ``groups.stopped``. What had finished still comes.

        Raises:
            InvalidRequest: a position that is not the session's; nothing was stopped.
        """
        request = pb.StopGroups(prompt_indices=prompt_indices)
        answer = self._ask(pb.GenerateSessionRequest(stop=request))
        stopped = [
            (group.prompt_index, index)
            for group in answer.stopped_groups
            for index in group.rollout_indices
        ]
        for groups in (self.groups, self._wave):
            groups.stopped.extend(stopped)
        self.outstanding -= len(stopped)
        return len(stopped)

    def __iter__(self) -> Iterator[Rollout]:
        for rollout in self.pass_on():
            self._keep(rollout)
            yield rollout

    def pass_on(self) -> Iterator[Rollout]:
        """Yield each rollout as iteration does, and keep none in ``groups``."""
        while self.outstanding:
            while not self._came:
                self._read()
            self.outstanding -= 1
            yield self._came.popleft()

    def collect(self) -> RolloutGroups:
        """Wait for everything asked for; returns what came since the last ``collect``.

        A list per prompt of the session, empty where nothing came.
        """
        for _ in self:
            pass
        wave, self._wave = self._wave, RolloutGroups(len(self.groups))
        for groups in (self.groups, wave):
            groups.sort_groups()
        return wave

    def cancel(self) -> None:
        """Give up everything, from any thread; whoever waits gets GeneratorUnavailable."""
        self._call.cancel()
        self._requests.put(None)

    def close(self) -> None:
        """End the session; what is outstanding is given up."""
        if self._over:
            return
        self._over = True
        if self.outstanding:
            self.cancel()
            return
        self._requests.put(None)
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            # Everything asked for had come before.
            self.cancel()

    def _ask(self, request: pb.GenerateSessionRequest) -> pb.SessionAnswer:
        """Send a request and return its answer; rollouts that come before it are kept."""
        if self._over:
            raise ClientMisuse("the session is over")
        if request.ByteSize() > MESSAGE_BYTES:
            raise InvalidRequest(
                f"prompts = {request.ByteSize():,} bytes: must be at most {MESSAGE_BYTES:,} in one "
                "request; add them to a session in parts"
            )
        self._requests.put(request)
        while not self._answers:
            self._read()
        answer = self._answers.popleft()
        if answer.error:
            if answer.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]:
                raise InvalidRequest(answer.error)
            if answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]:
                raise GeneratorBusy(answer.error)
            raise GeneratorUnavailable(f"{self._address}: {answer.error}")
        return answer

    def _read(self) -> None:
        """Wait for what the server says next."""
        if self._over:
            raise GeneratorUnavailable(
                f"{self._address}: the session is over; {self.outstanding} rollouts are missing"
            )
        try:
            response = next(self._call)
        except StopIteration:
            self._over = True
            self._requests.put(None)
            raise GeneratorUnavailable(
                f"{self._address} ended the session; {self.outstanding} rollouts are missing"
            ) from None
        except grpc.RpcError as error:
            self._over = True
            self._requests.put(None)
            left = self.outstanding - len(self._came)
            raise_status(error, self._address, f"; {left} rollouts are missing" if left else "")
        self._came.extend(map(rollout_of, response.rollouts))
        self._answers.extend(response.answers)

    def _keep(self, rollout: Rollout) -> None:
        self.groups.put(rollout)
        self._wave.put(rollout)


class AsyncRolloutSession(AsyncClosing):
    """``RolloutSession`` for code that is asynchronous; the same promises and errors.

    Cancelling a call ends the session and its work on the server.
    """

    def __init__(self, session: RolloutSession) -> None:
        self._session = session

    @property
    def groups(self) -> RolloutGroups:
        """Everything that has been read so far, of every prompt of the session."""
        return self._session.groups

    @property
    def outstanding(self) -> int:
        """Rollouts asked for that have not been read and were not stopped."""
        return self._session.outstanding

    async def add(
        self, num_rollouts: Sequence[int], prompts: Sequence[PromptLike] = (), **options: Any
    ) -> None:
        """Ask for rollouts; options as ``RolloutSession.add``."""
        await self._in_thread(self._session.add, num_rollouts, prompts, **options)

    async def stop(self, prompt_indices: Sequence[int]) -> int:
        """Give up what is unfinished of some prompts; returns how many rollouts that is."""
        return await self._in_thread(self._session.stop, prompt_indices)

    async def __aiter__(self) -> AsyncIterator[Rollout]:
        session = self._session
        while session.outstanding:
            while not session._came:
                await self._in_thread(session._read)
            session.outstanding -= 1
            rollout = session._came.popleft()
            session._keep(rollout)
            yield rollout

    async def collect(self) -> RolloutGroups:
        """Wait for everything asked for; returns what came since the last ``collect``."""
        return await self._in_thread(self._session.collect)

    async def close(self) -> None:
        """End the session; what is outstanding is given up."""
        await asyncio.to_thread(self._session.close)

    async def _in_thread(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        try:
            return await asyncio.to_thread(function, *args, **options)
        except asyncio.CancelledError:
            self._session.cancel()
            raise

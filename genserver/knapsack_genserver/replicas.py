"""Several engines as one: shares groups among replicas that come and go.

- A replica that is lost costs what it had not yet handed over; that is asked for again
  elsewhere. Its rollouts are those of its group's seed and their indices, so it does not
  matter who makes them. A rollout that has been handed out is never handed out again.
- A replica that fails at several pieces in a row gets nothing more until it has made a
  rollout; if it holds nothing that it could make, it counts as lost.
- A replica that was lost is started again for as long as the pool lives, with a growing
  pause. It serves once it holds the weights that the pool serves; see ``pool_weights``.
- Replicas may be added and taken away meanwhile; see ``membership``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from knapsack_genserver.dispatch import Dispatch, Piece
from knapsack_genserver.engine import (
    Completion,
    Engine,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    Tokenizer,
)
from knapsack_genserver.errors import GeneratorError, ReplicaLost, Unavailable
from knapsack_genserver.inbox import Inbox
from knapsack_genserver.member import Member, PoolOptions, reason_of
from knapsack_genserver.membership import Membership
from knapsack_genserver.pool_weights import PoolWeights

_LOG = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    """A group on its way through the pool."""

    key: int
    group: Group
    inbox: Inbox
    # One byte per rollout: whether it has been handed out.
    settled: bytearray
    left: int
    tasks: set[asyncio.Task[str]] = field(default_factory=set)


class ReplicaPool:
    """An engine made of engines; see the module.

    Args:
        name: of the engine.
        engines: not started. More may be added while it runs.
        options: how they are used.
        tokenizer: of their model; None takes that of the first engine that serves.
        make: returns one more engine, not started, for ``set_replicas``; None if only the
            caller knows how to make them.
    """

    def __init__(
        self,
        name: str,
        engines: Sequence[Engine],
        options: PoolOptions | None = None,
        tokenizer: Tokenizer | None = None,
        make: Callable[[], Engine] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._options = options or PoolOptions()
        self._first = list(engines)
        self._members = Membership(self._options, make, self._admit, self._retire)
        self._plan = Dispatch(self._options.piece_rollouts)
        self._jobs: dict[int, _Job] = {}
        self._names = 0
        self._weights = PoolWeights(self._options, self._members, self._lose_life)
        self._changed = asyncio.Event()
        self._known = EngineStatus("", 0, 0, 0, 0, 0, 0)
        self._filling = False
        self._closing = False

    async def start(self) -> None:
        """Start every replica; return when the first serves.

        Raises:
            ConfigError: a replica cannot start as it is; says why.
        """
        for engine in self._first:
            self.add(engine)
        while not self._serving():
            for member in self._members:
                if member.refused is not None:
                    raise member.refused
            self._changed.clear()
            await self._changed.wait()

    def add(self, engine: Engine) -> int:
        """Add a replica, not started; returns its number. It serves when it is ready."""
        return self._members.add(engine)

    async def remove(self, number: int) -> None:
        """Let a replica finish what it holds, and close it."""
        await self._members.remove(number)

    def set_replicas(self, wanted: int) -> None:
        """Have so many replicas; see ``engine.Scalable``."""
        self._members.set(wanted)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the replicas there are, oldest first."""
        return self._members.numbers

    def problems(self) -> dict[int, str]:
        """Return why replicas that do not serve do not, by number."""
        return self._members.problems()

    async def close(self) -> None:
        """End all work; whoever waits is told."""
        self._closing = True
        jobs = list(self._jobs.values())
        for job in jobs:
            self._plan.forget(job.key)
        await self._members.end()
        for job in jobs:
            first = job.group.first_index
            left = [first + at for at, settled in enumerate(job.settled) if not settled]
            self._settle(job, _failed(left, "the server is shutting down"))

    def status(self) -> EngineStatus:
        """Return how the replicas are together."""
        members = list(self._serving().values())
        serving = [member.engine.status() for member in members]
        if serving:
            limits = [s.max_model_tokens for s in serving if s.max_model_tokens]
            self._known = replace(
                serving[0],
                max_model_tokens=min(limits, default=0),
                vocabulary_size=min(s.vocabulary_size for s in serving),
                # A quarter more than they hold, for whoever is done first.
                capacity=sum(map(self._room, members)) * 5 // 4,
                prefix_queried_tokens=sum(s.prefix_queried_tokens for s in serving),
                prefix_hit_tokens=sum(s.prefix_hit_tokens for s in serving),
            )
        version = self._weights.version
        return replace(
            self._known,
            weight_version=self._known.weight_version if version is None else version,
            replicas=len(serving),
            running=self._plan.running,
            waiting=self._plan.waiting,
            wanted_replicas=self._members.wanted,
            members=self._members.statuses(),
            lost_replicas=self._members.losses,
            redone_rollouts=self._plan.redone,
        )

    # Replicas.

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve other weights on every replica; see the module for what may go wrong."""
        return await self._weights.load(path, version)

    async def _admit(self, member: Member) -> None:
        """Give a replica what the pool serves, and let it serve in the same moment."""
        await self._weights.give(member, lambda: self._serve(member))

    def _serve(self, member: Member) -> None:
        member.life = self._next_name()
        self.tokenizer = self.tokenizer or member.engine.tokenizer
        self._plan.join(member.life, self._room(member))
        self._changed.set()
        self._fill_soon()

    def _retire(self, member: Member) -> None:
        if member.life is not None:
            self._plan.leave(member.life)
            member.life = None
        self._changed.set()

    def _room(self, member: Member) -> int:
        return self._options.replica_rollouts or max(member.engine.status().capacity, 1)

    def _lose(self, member: Member, reason: str) -> None:
        """Take a replica out of service now, before anything else is handed to it."""
        member.lose(reason)
        self._retire(member)

    def _lose_life(self, life: int, reason: str) -> None:
        """Take a replica out of service, unless it has been lost since that life began."""
        member = self._serving().get(life)
        if member is not None:
            self._lose(member, reason)

    def _serving(self) -> dict[int, Member]:
        return self._members.serving()

    # Groups.

    def generate(self, group: Group) -> Inbox:
        """Queue a group; return the iterator of its rollouts."""
        if self._closing:
            raise Unavailable("the engine is closing")
        inbox = Inbox(group.num_rollouts, lambda: self._cancel(job))
        rollouts = group.num_rollouts
        job = _Job(self._next_name(), group, inbox, bytearray(rollouts), rollouts)
        self._jobs[job.key] = job
        self._plan.ask(
            job.key,
            group.request,
            rollouts,
            len(group.prompt) + group.sampling.max_tokens,
            group.priority,
            group.first_index,
            hash(tuple(group.prompt)),
        )
        self._fill_soon()
        return inbox

    def _cancel(self, job: _Job) -> None:
        self._forget(job)
        for task in job.tasks:
            task.cancel()

    def _forget(self, job: _Job) -> None:
        self._jobs.pop(job.key, None)
        self._plan.forget(job.key)

    def _fill_soon(self) -> None:
        """Hand out pieces after this callback of the loop, so that all that came is seen."""
        if not self._filling:
            self._filling = True
            asyncio.get_running_loop().call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        serving = self._serving()
        while (piece := self._plan.next_piece()) is not None:
            member, job = serving[piece.replica], self._jobs[piece.group]
            missing = set(range(piece.first, piece.first + piece.count))
            member.held += piece.count
            task = asyncio.get_running_loop().create_task(self._run(member, job, piece, missing))
            for tasks in (member.tasks, job.tasks):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            # A task that is cancelled before its first step runs nothing but this.
            task.add_done_callback(partial(self._ended, member, job, piece, missing))

    async def _run(self, member: Member, job: _Job, piece: Piece, missing: set[int]) -> str:
        """See one piece through on one replica; return why some of it has not arrived."""
        problem = ""
        try:
            await self._read(member, job, piece, missing)
        except ReplicaLost as error:
            problem = str(error)
            self._lose(member, problem)
        except Unavailable as error:
            problem = str(error)
        except GeneratorError as error:
            self._deliver(member, job, piece, missing, _failed(sorted(missing), str(error)))
        except Exception as error:
            problem = reason_of(error)
            _LOG.exception("replica %d fails", member.number)
            self._lose(member, problem)
        return problem

    def _ended(
        self, member: Member, job: _Job, piece: Piece, missing: set[int], task: asyncio.Task[str]
    ) -> None:
        """Give back a piece's place; what has not arrived waits again, or is given up."""
        problem = "" if task.cancelled() else task.result()
        member.held -= len(missing)
        lives = member.life == piece.replica
        if missing and lives and not task.cancelled():
            member.failures += 1
            member.problem = problem
        given_up = self._plan.ended(piece, missing, lost=not lives and not member.failing)
        attempts = piece.losses + piece.failures + 1
        why = f"given up after {attempts} attempts, last: {problem or member.problem}"
        self._settle(job, _failed(given_up, why))
        if lives and member.failing:
            self._plan.rest(piece.replica, True)
            if not member.tasks:
                self._lose(member, f"it fails at all that it is asked for: {member.problem}")
        self._fill_soon()

    def _proved(self, member: Member) -> None:
        """Trust a replica that has made a rollout."""
        if member.failing and member.life is not None:
            self._plan.rest(member.life, False)
            self._fill_soon()
        member.failures, member.proved = 0, True

    async def _read(self, member: Member, job: _Job, piece: Piece, missing: set[int]) -> None:
        part = replace(job.group, num_rollouts=piece.count, first_index=piece.first)
        stream = member.engine.generate(part)
        try:
            async for completion in stream:
                if completion.index not in missing:
                    raise ReplicaLost(f"it sent rollout {completion.index} unasked or twice")
                if not completion.error:
                    self._proved(member)
                self._deliver(member, job, piece, missing, [completion])
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        if missing:
            raise ReplicaLost(f"it ended a stream with {len(missing)} rollouts missing")

    def _deliver(
        self,
        member: Member,
        job: _Job,
        piece: Piece,
        missing: set[int],
        completions: Sequence[Completion],
    ) -> None:
        member.held -= len(completions)
        missing.difference_update([completion.index for completion in completions])
        self._plan.delivered(piece, len(completions))
        self._settle(job, completions)
        if self._plan.waiting:
            self._fill_soon()

    def _settle(self, job: _Job, completions: Sequence[Completion]) -> None:
        """Hand rollouts out, and forget the group after its last."""
        first = job.group.first_index
        new = [c for c in completions if not job.settled[c.index - first]]
        for completion in new:
            job.settled[completion.index - first] = 1
        job.inbox.put(new)
        job.left -= len(new)
        if job.left == 0:
            self._forget(job)

    def _next_name(self) -> int:
        self._names += 1
        return self._names


def _failed(indices: Sequence[int], error: str) -> list[Completion]:
    return [Completion(index, [], [], FinishReason.ERROR, (), error) for index in indices]

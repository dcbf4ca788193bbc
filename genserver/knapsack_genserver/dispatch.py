"""Which rollouts go to which replica: pure.

Groups are cut into pieces. A piece goes to the replica with the least to do, and comes
from the request with the least under way, so that requests share fairly. Within a request
the replica first continues a group whose prompt it holds already; then it begins the
group with the most work left; and only when no group is left to begin, it helps with the
largest one that another replica holds. So a prompt stays where its prefix is cached
until that replica is what the end of the step waits for, and comes back there in a later
wave.

A replica holds a bounded number of rollouts at a time. What it has not taken waits here,
where every other replica can take it.

What was lost with its replica is redone first. What was lost so often that it may be the
cause gets a replica to itself, so that it takes nothing else with it, and is given up
when that has not helped either. What a replica failed to make and outlived may be the fault
of either: it is redone too, more often, and keeps nobody waiting meanwhile.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_PROMPTS = 65_536
"""Prompts of which it is remembered where they are cached."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rollouts ``first .. first + count - 1`` of a group, for one replica.

    Attributes:
        group: key of the group.
        first, count: which rollouts.
        replica: where.
        request: that the group belongs to.
        tokens: that one of the rollouts is expected to take.
        losses: how often a replica has been lost with them.
        failures: how often a replica has failed to make them, and was not lost.
    """

    group: int
    first: int
    count: int
    replica: int
    request: int
    tokens: int
    losses: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class _Range:
    """Rollouts of a group that wait; see ``Piece``."""

    first: int
    count: int
    losses: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Group:
    key: int
    request: int
    tokens: int
    priority: int
    # What waits; what has been lost comes first.
    ranges: deque[_Range]
    # Replicas that hold the prompt; shared by all groups of the prompt.
    homes: set[int]
    waiting: int = 0

    def order(self) -> tuple[bool, int, int]:
        """Lost ones first, then the most work, then as they came."""
        first = self.ranges[0]
        return (first.losses + first.failures == 0, -self.waiting * self.tokens, self.key)


@dataclass(slots=True)
class _Replica:
    capacity: int
    held: int = 0
    tokens: int = 0
    # It holds what may be the end of it, and gets nothing beside that.
    alone: bool = False
    # It gets nothing more for now.
    resting: bool = False


class _Request:
    """Groups of one request with work left: those no replica holds, and those of each.

    Heaps keep entries of groups that have changed since; the reader puts them right.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._heaps: dict[int | None, list[tuple[bool, int, int]]] = {}

    def put(self, group: _Group) -> None:
        for home in group.homes or (None,):
            heapq.heappush(self._heaps.setdefault(home, []), group.order())

    def best(self, groups: dict[int, _Group], replica: int) -> _Group | None:
        """Return the group that a replica should take from."""
        own = self._top(groups, replica)
        if own is not None:
            return own
        fresh = self._top(groups, None)
        if fresh is not None:
            return fresh
        others = [self._top(groups, home) for home in list(self._heaps)]
        return min((g for g in others if g is not None), key=_Group.order, default=None)

    def _top(self, groups: dict[int, _Group], home: int | None) -> _Group | None:
        heap = self._heaps.get(home, [])
        while heap:
            group = groups.get(heap[0][2])
            if group is None or not group.waiting:
                heapq.heappop(heap)
            elif not _is_home(group, home):
                heapq.heappop(heap)
                self.put(group)
            elif group.order() != heap[0]:
                heapq.heapreplace(heap, group.order())
            else:
                return group
        self._heaps.pop(home, None)
        return None


class Dispatch:
    """Groups that wait and replicas that take from them.

    Every rollout is in one of three places: waiting, in a piece that was handed out and
    has not ended, or settled.

    Args:
        piece_rollouts: most rollouts of a piece, 1 or more.
        shared_losses: after how many losses a rollout gets a replica to itself.
        max_losses: after how many it is given up at the next one.
        max_failures: after how many failures it is given up at the next one.

    Attributes:
        waiting: rollouts that no replica has.
        redone: how often a rollout has come to wait again.
    """

    def __init__(
        self,
        piece_rollouts: int = 32,
        shared_losses: int = 3,
        max_losses: int = 5,
        max_failures: int = 20,
    ) -> None:
        self._piece = piece_rollouts
        self._shared_losses = shared_losses
        self._max_losses = max_losses
        self._max_failures = max_failures
        self._groups: dict[int, _Group] = {}
        self._classes: dict[int, dict[int, _Request]] = {}
        self._replicas: dict[int, _Replica] = {}
        self._under_way: Counter[int] = Counter()
        self._homes: OrderedDict[int, set[int]] = OrderedDict()
        self.waiting = 0
        self.redone = 0

    @property
    def running(self) -> int:
        """Rollouts in pieces that have not ended."""
        return self._under_way.total()

    def held(self, replica: int) -> int:
        """Return how many rollouts a replica holds."""
        return self._replicas[replica].held

    def join(self, replica: int, capacity: int) -> None:
        """Let a replica take up to ``capacity`` rollouts at a time, 1 or more.

        Its name must be new: one that was lost and is back is another replica.
        """
        self._replicas[replica] = _Replica(capacity)

    def leave(self, replica: int) -> None:
        """Give a replica nothing more. Its pieces are still to be ended one by one."""
        self._replicas.pop(replica, None)
        for homes in self._homes.values():
            homes.discard(replica)
        for group in self._groups.values():
            group.homes.discard(replica)
            if group.waiting:
                self._request(group).put(group)

    def rest(self, replica: int, resting: bool) -> None:
        """Give a replica nothing more until this is taken back; it keeps what it holds."""
        if replica in self._replicas:
            self._replicas[replica].resting = resting

    def ask(
        self,
        key: int,
        request: int,
        rollouts: int,
        tokens: int,
        priority: int = 0,
        first: int = 0,
        prompt: int | None = None,
    ) -> None:
        """Add a group.

        Args:
            key: its name here, larger than those before.
            request: equal for groups of one request.
            rollouts: how many are wanted, 1 or more.
            tokens: that one of them is expected to take.
            priority: lower is sooner.
            first: index of the first rollout.
            prompt: equal for groups of one prompt; None if no other has it.
        """
        ranges = deque([_Range(first, rollouts)])
        homes = set() if prompt is None else self._homes_of(prompt)
        group = _Group(key, request, max(tokens, 1), priority, ranges, homes)
        self._groups[key] = group
        self._add(group, rollouts)

    def forget(self, key: int) -> None:
        """Drop a group and what waits of it; its pieces are still to be ended."""
        group = self._groups.pop(key, None)
        if group is not None and group.waiting:
            self._take(group, group.waiting)

    def next_piece(self) -> Piece | None:
        """Hand out the next piece; None if nothing waits or no replica has room for it."""
        if not self.waiting:
            return None
        by_load = sorted(self._replicas.items(), key=lambda item: _load(*item))
        for name, replica in by_load:
            if replica.resting or replica.alone or replica.held >= replica.capacity:
                continue
            group = self._group_for(name)
            if group is None:
                return None
            some = group.ranges[0]
            count = min(self._piece, some.count, replica.capacity)
            alone = some.losses >= self._shared_losses
            if replica.held + count > replica.capacity or (alone and replica.held):
                continue
            replica.alone = alone
            group.ranges.popleft()
            if some.count > count:
                group.ranges.appendleft(
                    dataclasses.replace(some, first=some.first + count, count=some.count - count)
                )
            self._take(group, count)
            if name not in group.homes:
                group.homes.add(name)
                if group.waiting:
                    self._request(group).put(group)
            replica.held += count
            replica.tokens += count * group.tokens
            self._under_way[group.request] += count
            return Piece(
                group.key,
                some.first,
                count,
                name,
                group.request,
                group.tokens,
                some.losses,
                some.failures,
            )
        return None

    def delivered(self, piece: Piece, rollouts: int = 1) -> None:
        """Say that rollouts of a piece have arrived and take no more room."""
        replica = self._replicas.get(piece.replica)
        if replica is not None:
            replica.held -= rollouts
            replica.tokens -= rollouts * piece.tokens
            replica.alone = replica.alone and replica.held > 0
        self._under_way[piece.request] -= rollouts
        if not self._under_way[piece.request]:
            del self._under_way[piece.request]

    def ended(self, piece: Piece, missing: Iterable[int], lost: bool = True) -> list[int]:
        """End a piece of which some rollouts have not arrived; they wait again.

        Args:
            piece: that was handed out.
            missing: indices of those rollouts.
            lost: whether its replica was lost with it, or failed and may not be to blame.

        Returns:
            Those that are given up, because that has happened to them too often.
        """
        indices = sorted(missing)
        if not indices:
            return []
        self.delivered(piece, len(indices))
        group = self._groups.get(piece.group)
        if group is None:
            return []
        losses, failures = piece.losses + lost, piece.failures + (not lost)
        if losses > self._max_losses or failures > self._max_failures:
            return indices
        for first, count in reversed(list(_runs(indices))):
            group.ranges.appendleft(_Range(first, count, losses, failures))
        self._add(group, len(indices))
        self.redone += len(indices)
        return []

    def _group_for(self, replica: int) -> _Group | None:
        soonest = self._classes[min(self._classes)]
        request = min(soonest, key=lambda name: (self._under_way[name], name))
        return soonest[request].best(self._groups, replica)

    def _homes_of(self, prompt: int) -> set[int]:
        homes = self._homes.setdefault(prompt, set())
        self._homes.move_to_end(prompt)
        if len(self._homes) > _PROMPTS:
            self._homes.popitem(last=False)
        return homes

    def _request(self, group: _Group) -> _Request:
        return self._classes.setdefault(group.priority, {}).setdefault(group.request, _Request())

    def _add(self, group: _Group, rollouts: int) -> None:
        group.waiting += rollouts
        self.waiting += rollouts
        request = self._request(group)
        request.waiting += rollouts
        request.put(group)

    def _take(self, group: _Group, rollouts: int) -> None:
        group.waiting -= rollouts
        self.waiting -= rollouts
        request = self._request(group)
        request.waiting -= rollouts
        if request.waiting == 0:
            self._classes[group.priority].pop(group.request)
            if not self._classes[group.priority]:
                del self._classes[group.priority]


def _is_home(group: _Group, home: int | None) -> bool:
    return not group.homes if home is None else home in group.homes


def _load(name: int, replica: _Replica) -> tuple[float, int]:
    return (replica.tokens / replica.capacity, name)


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of every run of consecutive numbers."""
    first = last = indices[0]
    for index in indices[1:]:
        if index != last + 1:
            yield first, last - first + 1
            first = index
        last = index
    yield first, last - first + 1

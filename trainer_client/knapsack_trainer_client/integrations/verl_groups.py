"""Groups that verl is generating: what they were allocated, and what came of them.

verl knows a group by the ``uid`` that it makes for it. Pure: nothing of verl, no call.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from knapsack_trainer_client.arguments import AllocationAsk
from knapsack_trainer_client.fallback import uniform_allocation
from knapsack_trainer_client.nouns import Allocation


@dataclass(slots=True)
class FinishedGroup:
    """The finished rollouts of a group.

    Attributes:
        uid: verl's name of the group.
        sessions: verl's numbers of its rollouts.
        rewards, completion_tokens: of each.
        policy_version: the oldest step whose weights began one of them.
        prompt_id, step: name and step for a group that was allocated before a restart.
    """

    uid: str
    sessions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)
    policy_version: int = 0
    prompt_id: str = ""
    step: int = 0

    @property
    def is_effective(self) -> bool:
        """Whether the rewards are not all equal."""
        return len(set(self.rewards)) > 1


@dataclass(frozen=True, slots=True)
class GroupReport:
    """Rollouts of one allocation and one policy version, in the shape of the allocation."""

    allocation: Allocation
    policy_version: int
    rewards: list[list[float]]
    completion_tokens: list[list[int]]


class OpenGroups:
    """Remembers of every group under way its place in an allocation.

    A group leaves when it is closed, so this holds as many as are being generated.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._places: dict[str, tuple[Allocation, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, uid: str) -> bool:
        return uid in self._places

    def open(self, uids: Sequence[str], allocation: Allocation) -> None:
        """Remember the groups of an allocation, by position."""
        for position, uid in enumerate(uids):
            self._places[uid] = (allocation, position)

    def close(self, uids: Iterable[str], finished: Iterable[FinishedGroup]) -> list[GroupReport]:
        """Forget groups; return what is to be reported of them, one report for many groups.

        Groups that are not known, being those of an earlier process, are reported by
        prompt id and step.
        """
        reports: dict[tuple[int, int], GroupReport] = {}
        strangers: dict[tuple[int, int], list[FinishedGroup]] = {}
        for group in finished:
            if not group.rewards:
                continue
            place = self._places.get(group.uid)
            if place is None:
                strangers.setdefault((group.step, group.policy_version), []).append(group)
                continue
            allocation, position = place
            # One object per allocation, held here, so its identity is its name.
            key = (id(allocation), group.policy_version)
            if key not in reports:
                reports[key] = _empty(allocation, group.policy_version)
            reports[key].rewards[position] += group.rewards
            reports[key].completion_tokens[position] += group.completion_tokens
        for uid in uids:
            self._places.pop(uid, None)
        late = [self._late(step, groups) for (step, _), groups in strangers.items()]
        return [*reports.values(), *late]

    def _late(self, step: int, groups: Sequence[FinishedGroup]) -> GroupReport:
        ids = tuple(group.prompt_id for group in groups)
        sizes = tuple(len(group.rewards) for group in groups)
        # Bounds that leave no choice: the allocation of exactly these rollouts.
        ask = AllocationAsk(ids, sum(sizes), step, sizes, sizes)
        return GroupReport(
            uniform_allocation(ask, self._run_id),
            groups[0].policy_version,
            [group.rewards for group in groups],
            [group.completion_tokens for group in groups],
        )


def lone_rollouts(sessions: Mapping[str, Sequence[int]]) -> set[tuple[str, int]]:
    """Return the rollouts that are alone in their group, as (uid, session).

    Others of the group failed. In verl their advantage would be their raw reward.
    """
    return {(uid, numbers[0]) for uid, numbers in sessions.items() if len(numbers) == 1}


def surplus_rollouts(sessions: Mapping[str, Sequence[int]], limit: int) -> set[tuple[str, int]]:
    """Return rollouts to leave out so that ``limit`` remain, as (uid, session).

    The last sessions of the largest groups, so that rewards have no part in it; groups
    keep two. Ties go to the lower uid.
    """
    left = {uid: sorted(numbers) for uid, numbers in sessions.items()}
    excess = sum(map(len, left.values())) - limit
    heap = [(-len(numbers), uid) for uid, numbers in left.items() if len(numbers) > 2]
    heapq.heapify(heap)
    dropped = set()
    while excess > 0 and heap:
        size, uid = heapq.heappop(heap)
        dropped.add((uid, left[uid].pop()))
        excess -= 1
        if -size - 1 > 2:
            heapq.heappush(heap, (size + 1, uid))
    return dropped


def group_metrics(groups: Sequence[FinishedGroup]) -> dict[str, float]:
    """Return the shares of groups and rollouts that teach, and the largest group."""
    sizes = [len(group.rewards) for group in groups]
    if not sum(sizes):
        return {}
    effective = [len(group.rewards) for group in groups if group.is_effective]
    return {
        "knapsack/effective_group_rate": len(effective) / Counter(map(bool, sizes))[True],
        "knapsack/effective_rollout_rate": sum(effective) / sum(sizes),
        "knapsack/largest_group": float(max(sizes)),
    }


def _empty(allocation: Allocation, policy_version: int) -> GroupReport:
    count = len(allocation.prompt_ids)
    return GroupReport(
        allocation, policy_version, [[] for _ in range(count)], [[] for _ in range(count)]
    )

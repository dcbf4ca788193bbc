"""Which rollouts go to which replica: none lost, none twice, nobody idle or overfull."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from knapsack_genserver.dispatch import Dispatch, Piece

PIECE = 4
SHARED = 1
LOSSES = 2
FAILURES = 2


class Fleet(RuleBasedStateMachine):
    """Groups come and go, replicas take pieces, deliver them in any order, and die."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Dispatch(PIECE, SHARED, LOSSES, FAILURES)
        self.keys = 0
        self.names = 0
        self.capacity: dict[int, int] = {}
        self.wanted: Counter[tuple[int, int]] = Counter()
        self.settled: Counter[tuple[int, int]] = Counter()
        self.priority: dict[int, int] = {}
        self.under_way: dict[Piece, set[int]] = {}
        self.losses: Counter[tuple[int, int]] = Counter()
        self.failures: Counter[tuple[int, int]] = Counter()
        self.resting: set[int] = set()

    @rule(
        request=st.integers(0, 2),
        rollouts=st.integers(1, 30),
        tokens=st.integers(1, 50),
        priority=st.integers(0, 1),
        first=st.integers(0, 5),
        prompt=st.none() | st.integers(0, 3),
    )
    def ask(
        self,
        request: int,
        rollouts: int,
        tokens: int,
        priority: int,
        first: int,
        prompt: int | None,
    ) -> None:
        """A group arrives."""
        self.plan.ask(self.keys, request, rollouts, tokens, priority, first, prompt)
        self.wanted.update((self.keys, first + k) for k in range(rollouts))
        self.priority[self.keys] = priority
        self.keys += 1

    @rule(capacity=st.integers(1, 12))
    def join(self, capacity: int) -> None:
        """A replica joins."""
        self.plan.join(self.names, capacity)
        self.capacity[self.names] = capacity
        self.names += 1

    @rule()
    def hand_out(self) -> None:
        """Everything that can start does; then no replica is idle while anything waits."""
        waiting = self.waiting()
        while (piece := self.plan.next_piece()) is not None:
            indices = {(piece.group, piece.first + k) for k in range(piece.count)}
            assert 1 <= piece.count <= PIECE
            assert indices <= set(waiting)
            soonest = min(self.priority[group] for group, _ in waiting)
            assert self.priority[piece.group] == soonest
            assert {self.losses[name] for name in indices} == {piece.losses}
            assert {self.failures[name] for name in indices} == {piece.failures}
            assert piece.replica not in self.resting
            waiting -= Counter(indices)
            self.under_way[piece] = {index for _, index in indices}
            beside = [p for p in self.under_way if p.replica == piece.replica]
            assert len(beside) == 1 or all(p.losses < SHARED for p in beside)
        if waiting:
            suspects = any(self.losses[name] >= SHARED for name in waiting)
            for name, capacity in self.capacity.items():
                if name in self.resting:
                    continue
                held = self.plan.held(name)
                assert held > 0
                alone = any(p.losses >= SHARED for p in self.under_way if p.replica == name)
                assert suspects or alone or capacity - held < min(PIECE, capacity)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Some rollouts of a piece arrive."""
        piece = data.draw(st.sampled_from(sorted(self.under_way, key=str)))
        left = self.under_way[piece]
        index = data.draw(st.sampled_from(sorted(left)))
        left.discard(index)
        self.plan.delivered(piece)
        self.settled[piece.group, index] += 1
        if not left:
            del self.under_way[piece]
            self.plan.ended(piece, ())

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A replica fails at a piece and lives on."""
        self.end(data.draw(st.sampled_from(sorted(self.under_way, key=str))), lost=False)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data(), resting=st.booleans())
    def rest(self, data: st.DataObject, resting: bool) -> None:
        """A replica gets nothing more, or something again."""
        name = data.draw(st.sampled_from(sorted(self.capacity)))
        self.plan.rest(name, resting)
        (self.resting.add if resting else self.resting.discard)(name)

    @precondition(lambda self: self.capacity)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A replica dies with all that it holds."""
        name = data.draw(st.sampled_from(sorted(self.capacity)))
        del self.capacity[name]
        self.plan.leave(name)
        for piece in [p for p in self.under_way if p.replica == name]:
            self.end(piece, lost=True)

    @precondition(lambda self: self.priority)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """Nobody wants a group any more."""
        key = data.draw(st.sampled_from(sorted(self.priority)))
        self.plan.forget(key)
        del self.priority[key]
        for name in [name for name in self.wanted if name[0] == key]:
            del self.wanted[name]
        for piece in [p for p in self.under_way if p.group == key]:
            assert self.plan.ended(piece, self.under_way.pop(piece)) == []

    def end(self, piece: Piece, lost: bool) -> None:
        """End a piece; what has been lost too often is given up, and no sooner."""
        missing = self.under_way.pop(piece)
        given_up = self.plan.ended(piece, missing, lost)
        often = piece.losses == LOSSES if lost else piece.failures == FAILURES
        assert set(given_up) == (missing if often else set())
        self.settled.update((piece.group, index) for index in given_up)
        counts = self.losses if lost else self.failures
        counts.update((piece.group, index) for index in missing)

    def waiting(self) -> Counter[tuple[int, int]]:
        """Return what must be waiting: wanted, not under way, not settled."""
        under_way = Counter((p.group, i) for p, left in self.under_way.items() for i in left)
        return self.wanted - self.settled - under_way

    @invariant()
    def every_rollout_is_in_one_place(self) -> None:
        """Nothing is settled twice, and the counts agree."""
        assert all(n == 1 for n in self.settled.values())
        assert self.plan.waiting == self.waiting().total()
        assert self.plan.running == sum(map(len, self.under_way.values()))
        for name, capacity in self.capacity.items():
            held = [len(left) for p, left in self.under_way.items() if p.replica == name]
            assert self.plan.held(name) == sum(held) <= capacity

    def teardown(self) -> None:
        """With a replica that stays, everything that is wanted is settled in the end."""
        self.plan.join(self.names, 5)
        self.capacity[self.names] = 5
        while self.waiting() or self.under_way:
            for piece, left in list(self.under_way.items()):
                for index in sorted(left):
                    self.plan.delivered(piece)
                    self.settled[piece.group, index] += 1
                del self.under_way[piece]
                self.plan.ended(piece, ())
            self.hand_out()
        assert self.plan.waiting == self.plan.running == 0
        assert not self.wanted - self.settled


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def pieces(plan: Dispatch) -> list[tuple[int, int, int, int]]:
    """Return (replica, group, first, count) of all that is handed out now."""
    found = []
    while (piece := plan.next_piece()) is not None:
        found.append((piece.replica, piece.group, piece.first, piece.count))
    return found


def test_a_prompt_stays_where_its_prefix_is() -> None:
    """Each replica goes on with its own groups, the largest begun first."""
    plan = Dispatch(4)
    plan.join(1, 8)
    plan.join(2, 8)
    for key, size in enumerate([3, 8, 2, 8]):
        plan.ask(key, 0, size, 10)
    assert pieces(plan) == [(1, 1, 0, 4), (2, 3, 0, 4), (1, 1, 4, 4), (2, 3, 4, 4)]


def test_a_later_wave_goes_where_its_prompts_are() -> None:
    """Also if the groups of a prompt come one by one, and elsewhere once that is gone."""
    plan = Dispatch(4)
    plan.join(1, 8)
    plan.join(2, 8)
    for key, prompt in enumerate([50, 60, 50, 60]):
        plan.ask(key, 0, 4, 10, prompt=prompt)
    assert pieces(plan) == [(1, 0, 0, 4), (2, 1, 0, 4), (1, 2, 0, 4), (2, 3, 0, 4)]
    plan = Dispatch(4)
    for name in (1, 2, 3):
        plan.join(name, 8)
    plan.ask(0, 0, 4, 10, prompt=50)
    plan.ask(1, 0, 4, 10, prompt=60)
    first = [plan.next_piece(), plan.next_piece()]
    for piece in first:
        assert piece is not None
        plan.delivered(piece, 4)
        plan.ended(piece, ())
    plan.leave(1)
    plan.ask(2, 1, 4, 10, prompt=50)
    plan.ask(3, 1, 4, 10, prompt=60)
    assert pieces(plan) == [(2, 3, 0, 4), (3, 2, 0, 4)]


def test_a_large_group_spreads_when_there_is_nothing_else() -> None:
    """A replica with nothing to begin helps with the one that has the most left."""
    plan = Dispatch(4)
    for name in range(4):
        plan.join(name, 4)
    plan.ask(0, 0, 12, 10)
    plan.ask(1, 0, 2, 10)
    assert pieces(plan) == [(0, 0, 0, 4), (1, 1, 0, 2), (2, 0, 4, 4), (3, 0, 8, 4)]


def test_what_was_lost_is_redone_first_and_elsewhere() -> None:
    """Only what had not arrived, before anything that has yet to begin."""
    plan = Dispatch(4)
    plan.join(1, 4)
    plan.ask(0, 0, 4, 10)
    plan.ask(1, 0, 40, 10)
    plan.ask(2, 0, 4, 99)
    assert pieces(plan) == [(1, 1, 0, 4)]
    plan.join(2, 4)
    lost = plan.next_piece()
    assert lost is not None
    assert (lost.replica, lost.group) == (2, 2)
    plan.delivered(lost, 2)
    plan.leave(2)
    assert plan.ended(lost, [0, 3]) == []
    plan.join(3, 4)
    assert pieces(plan) == [(3, 2, 0, 1), (3, 2, 3, 1)]


def test_requests_share_replicas() -> None:
    """A small request is not behind a large one that came before."""
    plan = Dispatch(4)
    plan.join(1, 16)
    plan.ask(0, 7, 1000, 10)
    plan.ask(1, 8, 8, 10)
    assert [p[1] for p in pieces(plan)] == [0, 1, 0, 1]


def test_the_longest_work_goes_to_the_replica_with_the_least() -> None:
    """Loads are expected tokens for the room there is, not numbers of rollouts."""
    plan = Dispatch(4)
    plan.join(1, 8)
    plan.join(2, 16)
    for key, tokens in enumerate([10, 100, 20, 30]):
        plan.ask(key, 0, 4, tokens)
    assert pieces(plan) == [(1, 1, 0, 4), (2, 3, 0, 4), (2, 2, 0, 4), (2, 0, 0, 4)]

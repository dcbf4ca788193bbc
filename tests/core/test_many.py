"""Large batches get the very vector that dividing one by one gives, by whatever short cut.

The short cuts are forced on small batches, with tables so small that states collide and
bins so wide that most are unclear.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler import InfeasibleBudget, solve, solve_posterior
from knapsack_scheduler.core import bins, knapsack, many, states, sweep
from knapsack_scheduler.core.catalogue import OBJECTIVES, POINTWISE, find_objective
from knapsack_scheduler.core.chains import Chain, Marginals
from knapsack_scheduler.core.many import divide_alike
from knapsack_scheduler.core.objective import EFFECTIVE, PAPER, VARIANCE, Objective
from knapsack_scheduler.core.problem import Begun, Levels, Posterior, tie_keys
from knapsack_scheduler.core.states import find_states
from knapsack_scheduler.core.ties import fill_lowest, lowest_keys

NEVER = 10**9
RATES = [0.0, -0.0, 1.0, 0.5, 0.125, 0.375, 0.875, 1e-17, 5e-324, 1 - 2**-53, 1e-3, 1e-200]


class Paths:
    """Which short cuts are taken, and how often each was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.taken = {"states": 0, "split": 0, "exchanges": 0, "bins": 0}

    def one_by_one(self) -> None:
        """Take none."""
        self._patch.setattr(many, "MANY_PROMPTS", NEVER)
        self._patch.setattr(knapsack, "_LARGE_BATCH", NEVER)

    def short(self, rng: np.random.Generator, repeated: float) -> None:
        """Take all that apply, with tables, bins and samples of any size.

        Args:
            rng: draws the sizes.
            repeated: part of the positions that may be states of their own; above 1 every
                batch is divided by states, below 0 none is.
        """
        self._patch.setattr(many, "MANY_PROMPTS", 0)
        self._patch.setattr(states, "_REPEATED", repeated)
        self._patch.setattr(states, "_REPEATED_OFTEN", repeated)
        self._patch.setattr(states, "_BITS", int(rng.choice([5, 16])))
        self._patch.setattr(states, "_CHUNK", int(rng.choice([3, 64, 1 << 15])))
        self._patch.setattr(bins, "_BINS", int(rng.choice([256, 1024, 16384])))
        self._patch.setattr(bins, "_CHUNK", int(rng.choice([3, 1 << 15])))
        self._patch.setattr(bins, "_WINDOWS", (0.02, 0.9, 0.99999))
        self._patch.setattr(knapsack, "_LARGE_BATCH", 16)
        self._patch.setattr(knapsack, "_SAMPLE", 8)
        # Above 1 the guess is too high, and the sweep is done again.
        self._patch.setattr(knapsack, "_SAFETY", float(rng.choice([0.5, 0.8, 1.5])))
        self._patch.setattr(sweep, "_CHUNK", int(rng.choice([1, 7, 100])))

    def count(self, module: object, name: str, path: str) -> None:
        """Count the answers of a function that are not None."""
        function = getattr(module, name)

        def counted(*arguments: object) -> object:
            answer = function(*arguments)
            self.taken[path] += answer is not None
            return answer

        self._patch.setattr(module, name, counted)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[Paths]:
    """Return the switch, which counts too."""
    from knapsack_scheduler.core import multiples

    switch = Paths(monkeypatch)
    switch.count(many, "find_states", "states")
    switch.count(many, "divide_by_bins", "bins")
    switch.count(multiples, "_split", "split")
    switch.count(multiples, "exchanges", "exchanges")
    return switch


def random_case(
    rng: np.random.Generator, prompts: int
) -> tuple[np.ndarray, int | np.ndarray, int | np.ndarray, int]:
    """Draw rates, bounds (of all, or of each), and a total that the bounds hold."""
    p = [
        rng.random(prompts),
        rng.beta(0.5, 0.5, prompts),
        rng.choice(RATES, prompts),
        rng.integers(0, 9, prompts) / 8,
        np.full(prompts, rng.random()),
    ][rng.integers(5)]
    low: int | np.ndarray = int(rng.integers(0, 4))
    high: int | np.ndarray = low + int(rng.integers(0, 40))
    kind = rng.integers(4)
    if kind == 0:
        low = rng.integers(0, 4, prompts)
        high = low + rng.integers(0, 9, prompts)
    elif kind == 1:
        low = np.zeros(prompts, int)
        high = 2 + (rng.random(prompts) < 0.2) * rng.integers(0, 3, prompts)
    lows, highs = np.broadcast_to(low, prompts), np.broadcast_to(high, prompts)
    least, most = int(lows.sum()), int(np.where((lows == 0) & (highs == 1), 0, highs).sum())
    totals = [least, most, least + prompts, most - prompts, rng.integers(least, most + 1)]
    return p, low, high, int(np.clip(totals[rng.integers(5)], least, most))


def answer_of(call: object, *arguments: object, **named: object) -> list[int] | str:
    """Return the vector, or the refusal's words."""
    try:
        return call(*arguments, **named).tolist()  # type: ignore[operator, no-any-return]
    except InfeasibleBudget as refusal:
        return str(refusal)


@pytest.mark.parametrize("repeated", [2.0, 0.75, -1.0])
def test_rates_get_the_same_vector(paths: Paths, repeated: float) -> None:
    """Success rates of all kinds and every pointwise objective, ties and refusals included."""
    rng = np.random.default_rng(int(10 * repeated) + 20)
    for _ in range(600):
        prompts = int(rng.choice([1, 2, 5, 30, 200, 600]))
        p, low, high, total = random_case(rng, prompts)
        name = str(rng.choice(sorted(POINTWISE)))
        ids = [f"p{k}" for k in rng.integers(0, 500, prompts)] if rng.random() < 0.5 else None
        paths.one_by_one()
        straight = answer_of(solve, p, total, low, high, name, prompt_ids=ids)
        paths.short(rng, repeated)
        assert answer_of(solve, p, total, low, high, name, prompt_ids=ids) == straight
    expected = {"states", "split", "exchanges"} if repeated > 1 else {"bins"}
    assert all(paths.taken[path] > 10 for path in expected), paths.taken


def test_posteriors_get_the_same_vector(paths: Paths) -> None:
    """Posteriors of few counts, or of any numbers."""
    rng = np.random.default_rng(5)
    for _ in range(400):
        prompts = int(rng.choice([1, 5, 30, 200, 600]))
        _, low, high, total = random_case(rng, prompts)
        alpha = 0.5 + rng.integers(0, 5, prompts)
        beta = rng.choice([0.02, 0.5, 2.5], prompts)
        if rng.random() < 0.3:
            alpha = rng.exponential(2.0, prompts) + 1e-3
        name = str(rng.choice(sorted(POINTWISE)))
        paths.one_by_one()
        straight = answer_of(solve_posterior, alpha, beta, total, low, high, name)
        paths.short(rng, float(rng.choice([2.0, 0.75])))
        assert answer_of(solve_posterior, alpha, beta, total, low, high, name) == straight
    assert paths.taken["states"] > 100


@pytest.mark.parametrize("levels", [None, 4])
def test_gains_of_any_origin_get_the_same_vector(paths: Paths, levels: int | None) -> None:
    """Groups begun, of two rewards or of several levels: whatever tells gains apart counts."""
    rng = np.random.default_rng(10)
    for _ in range(80):
        prompts = int(rng.choice([5, 30, 200]))
        shares = None
        level = np.full(prompts, -1)
        delivered = rng.integers(0, 3, prompts)
        successes = rng.integers(0, delivered + 1)
        mixed = (successes > 0) & (successes < delivered)
        if levels is not None:
            weights = rng.integers(1, 3, (prompts, levels)) * 0.5
            shares = Levels(weights, np.arange(levels) >= levels // 2)
            level = np.where(mixed | (delivered == 0), -1, rng.integers(0, levels, prompts))
        alpha, beta = rng.integers(1, 3, (2, prompts)) * 0.5
        if shares is not None:
            alpha = shares.concentration[:, shares.success].sum(axis=1)
            beta = shares.concentration[:, ~shares.success].sum(axis=1)
        marginals = PAPER.conditional(
            Posterior(alpha, beta, shares),
            Begun(delivered, successes, mixed, rng.integers(0, 2, prompts), level),
        )
        capacity = rng.integers(0, 5, prompts)
        arguments = (
            marginals,
            delivered,
            capacity,
            int(rng.integers(0, capacity.sum() + 1)),
            rng.integers(0, 9, prompts).astype(np.uint64),
        )
        paths.one_by_one()
        straight = divide_alike(*arguments)
        paths.short(rng, 2.0)
        short = divide_alike(*arguments)
        assert short.num_rollouts.tolist() == straight.num_rollouts.tolist()
        assert short.price == straight.price
    assert paths.taken["states"] > 40


def test_states_know_the_second_factor_of_a_gain(paths: Paths) -> None:
    """Gains that begin alike and differ by their level's share only are two states."""
    rng = np.random.default_rng(11)
    one = np.ones(50)
    share = (rng.choice([0.5, 1.5], 50), 2 * one)
    gains = Marginals((Chain(one, one, 2 * one, 1, share),))
    arguments = (gains, np.zeros(50, int), np.full(50, 9), 200, np.arange(50, dtype=np.uint64))
    paths.one_by_one()
    straight = divide_alike(*arguments).num_rollouts
    paths.short(rng, 2.0)
    assert divide_alike(*arguments).num_rollouts.tolist() == straight.tolist()
    assert paths.taken["states"] == 1


def test_every_pointwise_objective_is_one(paths: Paths) -> None:
    """The gains of a prompt are the same bits alone and among others; coba's are not."""
    rng = np.random.default_rng(6)
    p = rng.random(64)
    alpha, beta = rng.exponential(3.0, (2, 64)) + 0.1
    for name in OBJECTIVES:
        rule = find_objective(name)
        apart = []
        for of_all, of_one in (
            (rule.at_rates(p), [rule.at_rates(p[[k]]) for k in range(64)]),
            (
                rule.expected(alpha, beta),
                [rule.expected(alpha[[k]], beta[[k]]) for k in range(64)],
            ),
        ):
            apart += [of_all.first[k] != one.first[0] for k, one in enumerate(of_one)]
        if name in POINTWISE:
            assert not any(apart), name
    assert "coba" not in POINTWISE


@pytest.mark.parametrize("objective", [PAPER, EFFECTIVE, VARIANCE, Objective("other", 3, 0)])
def test_bins_hold_the_gains_of_their_rates(objective: Objective) -> None:
    """The bits of every gain lie between those of the two ends of its bin."""
    rng = np.random.default_rng(7)
    p = np.concatenate([rng.random(300), rng.beta(0.1, 0.1, 300), np.abs(RATES)])
    low = np.minimum(np.floor(p * 64), 64) / 64
    high = np.minimum(low + 1 / 64, 1.0)
    gains = objective.at_rates(p)
    for level in range(1, 40):
        exact = gains.advanced(np.full(p.size, level - 1)).first
        ends = [
            sum(bins._first(objective, rate, miss, level))
            for rate, miss in ((low, 1.0 - high), (p, 1.0 - p), (high, 1.0 - low))
        ]
        assert (ends[0] <= exact).all()
        assert (ends[1] == exact).all()
        assert (exact <= ends[2]).all()


COLUMNS = st.lists(
    st.tuples(st.sampled_from([0.0, -0.0, 0.5, 1.0, 5e-324]), st.integers(0, 2)), min_size=1
)


@given(COLUMNS, st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_states_are_those_of_equal_bits(rows: list[tuple[float, int]], bits: int) -> None:
    """Two positions share a state if all their numbers do, whatever collides in the table."""
    numbers = np.array([value for value, _ in rows])
    bounds = np.array([bound for _, bound in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "_BITS", bits)
        patch.setattr(states, "_MORE_BITS", bits)
        patch.setattr(states, "_REPEATED", 2.0)
        patch.setattr(states, "_REPEATED_OFTEN", 2.0)
        patch.setattr(states, "_CHUNK", 4)
        found = find_states([numbers, bounds])
    if found is None:
        # Too many collisions for so small a table.
        return
    mine = found.spread(np.arange(len(found)))
    names = [(value.hex(), bound) for value, bound in rows]
    assert len(set(names)) == len(found)
    assert [names[row] for row in found.rows[mine]] == names
    assert found.counts.tolist() == np.bincount(mine).tolist()


@pytest.mark.parametrize("repeat", [True, False])
def test_two_hundred_thousand_prompts(paths: Paths, repeat: bool) -> None:
    """The same vector at size, with memory for a few numbers per prompt and no more."""
    rng = np.random.default_rng(8)
    count = 200_000
    p = rng.beta(0.5, 0.5, count)
    if repeat:
        p = rng.binomial(16, p) / 16
    tracemalloc.start()
    try:
        answer = solve(p, 8 * count)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert paths.taken["states" if repeat else "bins"] == 1
    # Sixteen bytes are the answer and what it is made from.
    assert peak < 40 * count
    paths.one_by_one()
    assert (solve(p, 8 * count) == answer).all()


def test_names_are_hashed_where_a_tie_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only there: a million names would take longer than all the rest."""
    from knapsack_scheduler.core import solve as module

    hashed = []
    monkeypatch.setattr(module, "tie_keys", lambda ids: hashed.append(len(ids)) or tie_keys(ids))
    p = np.repeat([0.25, 0.5, 0.9], 2000)
    ids = [f"prompt-{k}" for k in range(6000)]

    answer = solve(p, 40_500, prompt_ids=ids)

    # Only the state at the price is.
    assert hashed == [2000]
    names = np.array(ids)
    order = np.random.default_rng(9).permutation(6000)
    shuffled = solve(p[order], 40_500, prompt_ids=names[order].tolist())
    assert (shuffled == answer[order]).all()


KEYS = st.lists(st.integers(0, 5), max_size=30)


@given(KEYS, st.integers(0, 32))
@settings(max_examples=200, deadline=None)
def test_lowest_keys_are_the_first_of_a_stable_sort(keys: list[int], count: int) -> None:
    """In any order; equal keys are told apart by position."""
    expected = sorted(np.argsort(keys, kind="stable")[:count].tolist()) if keys else []
    assert sorted(lowest_keys(np.array(keys, np.uint64), count).tolist()) == expected


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), min_size=1),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_lowest_groups_are_filled_one_at_a_time(
    groups: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """As if every rollout went to the lowest group that has room, and then to the lowest key."""
    low, room, keys = (np.array(column) for column in zip(*groups, strict=True))
    rollouts = data.draw(st.integers(0, int(room.sum())))
    sizes = low.copy()
    for _ in range(rollouts):
        open_ = [k for k in range(low.size) if sizes[k] < low[k] + room[k]]
        sizes[min(open_, key=lambda k: (sizes[k], keys[k], k))] += 1

    given_ = fill_lowest(low, low + room, rollouts, keys.astype(np.uint64))

    assert (low + given_).tolist() == sizes.tolist()

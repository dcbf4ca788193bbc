"""The solver against exact answers: never worse, always within its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_scheduler import InfeasibleBudget, solve, solve_posterior

from oracles import value

DEGENERATE = [0.0, 1.0, 0.5, 0.125, 0.375, 0.875, 1e-17, 5e-324, 1 - 2**-53, 1e-3, 1e-200]
OBJECTIVES = ["paper", "effective", "variance"]


def assert_within(
    num_rollouts: np.ndarray, total: int, minimum: np.ndarray, maximum: np.ndarray
) -> None:
    """Assert that the counts add up, keep within the bounds and make no group of one."""
    assert num_rollouts.sum() == total
    assert (num_rollouts >= minimum).all()
    assert (num_rollouts <= maximum).all()
    assert not ((num_rollouts == 1) & (minimum == 0)).any()


def test_batch_of_usual_size_against_dynamic_program() -> None:
    """256 prompts, 2,048 rollouts, bounds 2..128: the exact optimum."""
    rng = np.random.default_rng(7)
    p = np.round(rng.beta(0.5, 0.5, 256) * 16) / 16
    p[::5] = rng.random(len(p[::5]))

    answer = solve(p, 2048)

    assert_within(answer, 2048, np.full(256, 2), np.full(256, 128))
    worth = sum(value(int(n), float(x), "paper") for n, x in zip(answer, p, strict=True))
    best = dense_dynamic_program(p, 2048, 2, 128)
    assert worth == pytest.approx(best, rel=1e-12)


def dense_dynamic_program(p: np.ndarray, total: int, low: int, high: int) -> float:
    """Return the optimum of the paper's objective for one pair of bounds, by NumPy."""
    best = np.full(total + 1, -np.inf)
    best[0] = 0.0
    for x in p:
        following = np.full(total + 1, -np.inf)
        worth = 0.0
        weight = x * x * (1 - x) ** 3
        for n in range(2, high + 1):
            worth += weight * (x ** (n - 2) + (1 - x) ** (n - 2))
            if n >= low:
                np.maximum(following[n:], best[: total + 1 - n] + worth, out=following[n:])
        best = following
    return float(best[total])


PROMPTS = st.lists(st.one_of(st.sampled_from(DEGENERATE), st.floats(0, 1)), min_size=1, max_size=12)


@given(PROMPTS, st.data())
@settings(max_examples=200, deadline=None)
def test_spends_exactly_the_budget_within_the_bounds(p: list[float], data: st.DataObject) -> None:
    """Whatever the rates and bounds, the counts add up and keep within them."""
    minimum = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(p), max_size=len(p))))
    room = np.array(data.draw(st.lists(st.integers(0, 40), min_size=len(p), max_size=len(p))))
    total = data.draw(st.integers(int(minimum.sum()), int((minimum + room).sum())))

    answer = solve(p, total, minimum, minimum + room)

    assert_within(answer, total, minimum, minimum + room)


@given(PROMPTS, st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=100, deadline=None)
def test_does_not_depend_on_the_order_of_prompts(
    p: list[float], random: object, skip: bool
) -> None:
    """The same prompts in another order get the same rollouts each."""
    ids = [f"prompt-{k}" for k in range(len(p))]
    order = list(range(len(p)))
    random.shuffle(order)  # type: ignore[attr-defined]
    low = 0 if skip else 2
    total = 5 * len(p) + 1

    straight = solve(p, total, low, 40, prompt_ids=ids)
    shuffled = solve([p[k] for k in order], total, low, 40, prompt_ids=[ids[k] for k in order])

    assert [int(straight[k]) for k in order] == shuffled.tolist()


def test_ties_go_to_the_smallest_groups_and_then_by_the_hash_of_the_id() -> None:
    """Equal prompts share evenly, and what is left over goes to the lowest hashes."""
    from knapsack_scheduler.core.problem import tie_key

    ids = [f"p{k}" for k in range(10)]
    answer = solve([0.5] * 10, 33, prompt_ids=ids)

    lucky = sorted(ids, key=tie_key)[:3]
    assert answer.tolist() == [4 if k in lucky else 3 for k in ids]


def test_vector_is_the_same_on_every_machine() -> None:
    """Literal answers, with ties at the price: made with +, * and / only."""
    p = [k / 8 for k in range(9)]
    ids = [f"prompt-{k}" for k in range(9)]

    assert solve(p, 60, prompt_ids=ids).tolist() == [2, 14, 11, 8, 7, 7, 7, 2, 2]
    assert solve(p, 61, min_rollouts=0, prompt_ids=ids).tolist() == [0, 16, 12, 8, 7, 7, 8, 3, 0]
    assert solve_posterior(
        [0.5 + k for k in range(9)], [8.5 - k for k in range(9)], 60, prompt_ids=ids
    ).tolist() == [5, 10, 10, 8, 7, 7, 6, 5, 2]


def test_known_numbers() -> None:
    """By hand: gains at p = 1/2 are 1/32, 1/64 .. of the paper's value, at p = 1 none."""
    assert solve([0.5, 1.0], 6).tolist() == [4, 2]
    assert solve([0.5, 1.0, 0.0], 9).tolist() == [5, 2, 2]
    # All gains equal 0: the rest is levelled.
    assert solve([1.0, 0.0], 7).tolist() == [4, 3]
    # Skipping: two solved prompts give everything to the third.
    assert solve([1.0, 0.5, 0.0], 6, min_rollouts=0).tolist() == [0, 6, 0]


def test_hard_prompts_get_many() -> None:
    """A batch of mostly solved prompts sends its rollouts to the hard ones, up to the cap."""
    p = [1 / 16] * 16 + [0.5] * 16 + [1.0] * 224

    answer = solve(p, 2048)

    assert answer[:16].min() > 60
    assert answer[32:].max() == 2


def test_duplicate_prompts_are_counted_apart() -> None:
    """Positions of the same prompt share evenly."""
    answer = solve([0.3, 0.3, 0.3], 11, prompt_ids=["a", "a", "a"])

    assert sorted(answer.tolist()) == [3, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"success_rates": [0.5, 1.5], "total_rollouts": 4}, "success_rates = 1.5"),
        ({"success_rates": [0.5, float("nan")], "total_rollouts": 4}, r"success_rates\[1\] = nan"),
        ({"success_rates": [[0.5]], "total_rollouts": 4}, "one-dimensional"),
        ({"success_rates": [0.5], "total_rollouts": 4, "min_rollouts": -1}, "min_rollouts = -1"),
        ({"success_rates": [0.5], "total_rollouts": 4, "min_rollouts": 1.5}, "whole numbers"),
        ({"success_rates": [0.5], "total_rollouts": 4.5}, "total_rollouts = 4.5"),
        (
            {"success_rates": [0.5], "total_rollouts": 4, "min_rollouts": 5, "max_rollouts": 4},
            r"max_rollouts\[0\] = 4: must be at least",
        ),
        ({"success_rates": [0.5], "total_rollouts": 4, "objective": "x"}, "paper, effective"),
        ({"success_rates": [0.5], "total_rollouts": 4, "prompt_ids": ["a", "b"]}, "prompt_ids"),
        ({"success_rates": [0.5], "total_rollouts": 4, "costs": [0.0]}, "costs = 0.0"),
        ({"success_rates": [0.5], "total_rollouts": 4, "costs": [1.0, 2.0]}, "costs"),
        ({"success_rates": [0.5, 0.5], "total_rollouts": 3}, "from 4, .* to 256"),
        ({"success_rates": [0.5, 0.5], "total_rollouts": 257}, "from 4, .* to 256"),
        ({"success_rates": [0.5], "total_rollouts": 9, "costs": [5.0]}, "at least 10.0"),
    ],
)
def test_refusals_name_the_argument(arguments: dict[str, object], message: str) -> None:
    """A bad argument is refused with its name, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        solve(**arguments)  # type: ignore[arg-type]


def test_no_prompts() -> None:
    """Nothing is divided among nobody; anything more is infeasible."""
    assert solve([], 0).tolist() == []
    with pytest.raises(InfeasibleBudget):
        solve([], 1)


@pytest.mark.parametrize("prompts", [5, 40])
def test_costs_do_not_depend_on_the_order_of_prompts(prompts: int) -> None:
    """Searched exactly or not, the same prompts in another order get the same each."""
    rng = np.random.default_rng(prompts)
    names = [f"p{k}" for k in range(prompts)]
    for _ in range(60):
        p = rng.integers(0, 9, prompts) / 8
        costs = rng.integers(1, 4, prompts) * 1.0
        low = int(rng.integers(0, 3))
        budget = float(rng.uniform(low * costs.sum() + 2 * costs.max(), 7 * costs.sum()))
        order = rng.permutation(prompts)

        straight = solve(p, budget, low, 7, costs=costs, prompt_ids=names)
        shuffled = solve(
            p[order], budget, low, 7, costs=costs[order], prompt_ids=[names[k] for k in order]
        )

        assert shuffled.tolist() == straight[order].tolist()


def test_equal_costs_are_the_plain_problem() -> None:
    """With one cost for all, the budget in costs buys the plain optimum."""
    rng = np.random.default_rng(3)
    p = rng.uniform(0.05, 0.95, 64)

    by_cost = solve(p, 7.0 * 512, 2, 128, costs=np.full(64, 7.0))

    plain = solve(p, 512, 2, 128)
    worth = [
        sum(value(int(n), x, "paper") for n, x in zip(v, p, strict=True)) for v in (by_cost, plain)
    ]
    assert by_cost.sum() == 512
    assert worth[0] == pytest.approx(worth[1], rel=1e-13)

"""Plans: what the bounds force, what the waves know, and the reasons given."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from knapsack_scheduler.core.policy import POLICIES, plan_allocation, plan_extension
from knapsack_scheduler.core.problem import (
    Bounds,
    Budget,
    Decision,
    InfeasibleBudget,
    WaveOutcomes,
)

from oracles import posterior_value
from small_beliefs import beliefs


def bounds(count: int, low: int = 2, high: int = 128) -> Bounds:
    """Return the same bounds for every prompt."""
    return Bounds(np.full(count, low), np.full(count, high))


def outcomes(
    allocated: list[int], delivered: list[int], successes: list[int], mixed: list[bool]
) -> WaveOutcomes:
    """Return what became of earlier waves."""
    return WaveOutcomes(
        np.array(allocated), np.array(delivered), np.array(successes), np.array(mixed)
    )


def adds_up(decision: Decision, budget: Budget, spent: int = 0) -> bool:
    """Return whether every rollout of the budget is accounted for."""
    total = decision.allocated + decision.remaining + decision.unallocated + spent
    return total == budget.total_rollouts and decision.allocated == decision.num_rollouts.sum()


BELIEFS = beliefs([0.5, 2.5, 8.5, 0.5], [8.5, 6.5, 0.5, 0.5])


def test_uniform_divides_evenly() -> None:
    """The baseline gives everybody the same, and the rest by the tie rule."""
    decision = plan_allocation("uniform", "paper", BELIEFS, bounds(4), Budget(34))

    assert sorted(decision.num_rollouts.tolist()) == [8, 8, 9, 9]
    assert decision.reasons.value == pytest.approx(decision.reasons.uniform_value)
    assert decision.reasons.value_upper_bound > decision.reasons.value


def test_uniform_keeps_within_bounds() -> None:
    """Where bounds bind, the others share what is left evenly."""
    limits = Bounds(np.array([2, 2, 2, 20]), np.array([4, 128, 128, 128]))

    decision = plan_allocation("uniform", "paper", BELIEFS, limits, Budget(44))

    assert decision.num_rollouts.tolist() == [4, 10, 10, 20]


def test_posterior_beats_uniform_and_reports_what_it_expects() -> None:
    """Value, rates, bound and largest group are those of the plan, computed apart."""
    decision = plan_allocation("posterior", "paper", BELIEFS, bounds(4), Budget(40))

    def expected(counts: list[int], name: str) -> list[float]:
        return [
            posterior_value(n, a, b, name)
            for n, a, b in zip(counts, BELIEFS.posterior.alpha, BELIEFS.posterior.beta, strict=True)
        ]

    counts = decision.num_rollouts.tolist()
    effective = expected(counts, "effective")
    reasons = decision.reasons
    assert adds_up(decision, Budget(40))
    assert reasons.value == pytest.approx(sum(expected(counts, "paper")))
    assert reasons.uniform_value == pytest.approx(sum(expected([10] * 4, "paper")))
    assert reasons.value > reasons.uniform_value
    assert reasons.value_upper_bound == pytest.approx(reasons.value)
    assert reasons.effective_group_rate == pytest.approx(sum(effective) / 4)
    assert reasons.effective_rollout_rate == pytest.approx(
        sum(e * n for e, n in zip(effective, counts, strict=True)) / 40
    )
    assert reasons.largest_group == max(counts)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("total", [7, 513])
def test_infeasible_budgets_are_refused_with_the_three_numbers(policy: str, total: int) -> None:
    """What was asked for, the sum of the minimums and the sum of the maximums."""
    with pytest.raises(
        InfeasibleBudget, match=rf"total_rollouts = {total}: must be from 8.* to 512"
    ):
        plan_allocation(policy, "paper", BELIEFS, bounds(4), Budget(total))


@pytest.mark.parametrize(("total", "given", "left_over"), [(7, 8, -1), (600, 512, 88)])
def test_partial_budgets_give_the_closest_total(total: int, given: int, left_over: int) -> None:
    """The closest total that the bounds hold, and how many were not given."""
    budget = Budget(total, allow_partial=True)

    decision = plan_allocation("posterior", "paper", BELIEFS, bounds(4), budget)

    assert (decision.allocated, decision.unallocated) == (given, left_over)
    assert adds_up(decision, budget)


def test_odd_budget_on_pairs_only() -> None:
    """Prompts of none or two cannot share 5: refused, or 4 with allow_partial."""
    limits = bounds(4, 0, 2)

    with pytest.raises(InfeasibleBudget, match="group of one"):
        plan_allocation("posterior", "paper", BELIEFS, limits, Budget(5))
    decision = plan_allocation("posterior", "paper", BELIEFS, limits, Budget(5, allow_partial=True))

    assert (decision.allocated, decision.unallocated) == (4, 1)


def test_first_wave_is_a_share_and_never_less_than_the_minimums() -> None:
    """Half of 40 is 20; a hundredth is raised to the minimums."""
    half = plan_allocation("posterior", "paper", BELIEFS, bounds(4), Budget(40, 0, 0.5))
    least = plan_allocation("posterior", "paper", BELIEFS, bounds(4), Budget(40, 0, 0.01))

    assert (half.allocated, half.remaining, half.unallocated) == (20, 20, 0)
    assert (least.allocated, least.remaining) == (8, 32)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(0, 9),
    st.booleans(),
)
@example([(0, 1), (0, 1), (2, 2)], 2, False)
@settings(max_examples=80, deadline=None)
def test_second_wave_is_the_best_division_of_what_is_left(
    groups: list[tuple[int, int]], left: int, skip: bool
) -> None:
    """Against every division, valued by exact conditional expectations."""
    delivered = [max(pair) for pair in groups]
    successes = [min(pair) for pair in groups]
    mixed = [0 < k < n for n, k in zip(delivered, successes, strict=True)]
    alpha = [0.4 + k for k in successes]
    beta = [0.9 + n - k for n, k in zip(delivered, successes, strict=True)]
    low = 0 if skip else 2
    limits = bounds(len(groups), low, 9)
    total = sum(delivered) + left
    forced = sum(max(low - n, 0) for n in delivered)
    if forced > left or total > 9 * len(groups):
        return
    states = list(zip(alpha, beta, delivered, successes, mixed, strict=True))
    values = [[posterior_value_given(n, *state) for n in range(left + 1)] for state in states]

    decision = plan_extension(
        "posterior",
        "paper",
        beliefs(alpha, beta),
        limits,
        Budget(total, allow_partial=True),
        outcomes(delivered, delivered, successes, mixed),
        keep_outstanding=False,
    )

    def worth(counts: tuple[int, ...]) -> float:
        return sum(of[n] - of[0] for of, n in zip(values, counts, strict=True))

    def allowed(counts: tuple[int, ...]) -> bool:
        return all(
            # A group left with one rollout by losses may stay so where no minimum forbids it.
            max(low - n, 0) <= more <= 9 - n and (n + more != 1 or more == 0)
            for n, more in zip(delivered, counts, strict=True)
        )

    some = product(range(min(left, 9) + 1), repeat=len(groups) - 1)
    divisions = [(*counts, decision.allocated - sum(counts)) for counts in some]
    choices = [counts for counts in divisions if min(counts) >= 0 and allowed(counts)]
    assert tuple(decision.num_rollouts.tolist()) in choices
    assert decision.allocated in (left, left - 1)
    assert worth(tuple(decision.num_rollouts.tolist())) == pytest.approx(
        max(map(worth, choices)), rel=1e-9, abs=1e-15
    )


NODES = np.polynomial.legendre.leggauss(400)


def posterior_value_given(
    further: int, alpha: float, beta: float, delivered: int, successes: int, mixed: bool
) -> float:
    """Return the expected paper value of a begun group after further rollouts, by quadrature."""
    nodes, weights = NODES
    # Substituting p = sin^2 removes the singularities of the density at 0 and 1.
    angle = (nodes + 1) * np.pi / 4
    p, q = np.sin(angle) ** 2, np.cos(angle) ** 2
    density = weights * np.sin(angle) ** (2 * alpha - 1) * np.cos(angle) ** (2 * beta - 1)
    if mixed:
        chance = np.ones_like(p)
    elif delivered == 0:
        chance = 1 - p**further - q**further if further else np.zeros_like(p)
    else:
        chance = 1 - (p if successes else q) ** further
    return float((density * chance * p * q * q).sum() / density.sum())


def test_lost_rollouts_are_given_again() -> None:
    """Of 20 given 15 came back: the second wave has 25 to give, not 20."""
    decision = plan_extension(
        "posterior",
        "paper",
        BELIEFS,
        bounds(4),
        Budget(40),
        outcomes([5, 5, 5, 5], [5, 5, 0, 5], [0, 2, 0, 5], [False, True, False, False]),
        keep_outstanding=False,
    )

    assert adds_up(decision, Budget(40), spent=15)
    assert decision.allocated == 25
    assert decision.num_rollouts[2] >= 2


def test_outstanding_rollouts_can_be_kept() -> None:
    """Rollouts still running count as spent."""
    decision = plan_extension(
        "posterior",
        "paper",
        BELIEFS,
        bounds(4),
        Budget(40),
        outcomes([5, 5, 5, 5], [5, 5, 0, 5], [0, 2, 0, 5], [False, True, False, False]),
        keep_outstanding=True,
    )

    assert decision.allocated == 20
    assert adds_up(decision, Budget(40), spent=20)


def test_effective_groups_get_nothing_while_others_may_become_effective() -> None:
    """A mixed group gains nothing under this objective; failed ones share the rest."""
    decision = plan_extension(
        "posterior",
        "paper",
        beliefs([1.5, 0.5, 0.5], [4.5, 5.5, 5.5]),
        bounds(3),
        Budget(30),
        outcomes([5, 5, 5], [5, 5, 5], [1, 0, 0], [True, False, False]),
        keep_outstanding=False,
    )

    assert decision.num_rollouts[0] == 0
    assert sorted(decision.num_rollouts[1:].tolist()) == [7, 8]


def test_nothing_left_gives_nothing() -> None:
    """Extending a spent allocation answers zeros."""
    decision = plan_extension(
        "posterior",
        "paper",
        BELIEFS,
        bounds(4),
        Budget(20),
        outcomes([5] * 4, [5] * 4, [1] * 4, [True] * 4),
        keep_outstanding=False,
    )

    assert decision.num_rollouts.tolist() == [0, 0, 0, 0]
    assert (decision.allocated, decision.remaining) == (0, 0)


def test_late_rollouts_never_make_the_budget_negative() -> None:
    """More delivered than the budget holds, because lost rollouts came late after all."""
    decision = plan_extension(
        "posterior",
        "paper",
        BELIEFS,
        bounds(4),
        Budget(20),
        outcomes([9] * 4, [9] * 4, [1] * 4, [True] * 4),
        keep_outstanding=False,
    )

    assert decision.allocated == 0
    assert decision.remaining == 0


def test_three_waves_spend_the_budget() -> None:
    """A second wave may be a share of the whole too."""
    budget = Budget(40, 0, 0.25)
    decision = plan_extension(
        "posterior",
        "paper",
        BELIEFS,
        bounds(4),
        budget,
        outcomes([5] * 4, [5] * 4, [0, 2, 5, 0], [False, True, False, False]),
        keep_outstanding=False,
    )

    assert (decision.allocated, decision.remaining) == (10, 10)


def test_token_budget_is_kept() -> None:
    """Expected tokens stay within the budget, dear prompts get fewer rollouts."""
    cheap = beliefs([2.5] * 4, [6.5] * 4, tokens=10.0)
    uneven = replace(cheap, expected_tokens=np.array([10.0, 10.0, 40.0, 40.0]))

    decision = plan_allocation("posterior", "paper", uneven, bounds(4), Budget(0, 1000))

    assert decision.reasons.expected_tokens <= 1000
    assert decision.reasons.expected_tokens > 1000 - 40
    assert decision.num_rollouts[0] > decision.num_rollouts[2]
    assert decision.reasons.value <= decision.reasons.value_upper_bound
    with pytest.raises(InfeasibleBudget, match="total_tokens = 100: must be at least 200"):
        plan_allocation("posterior", "paper", uneven, bounds(4), Budget(0, 100))


@pytest.mark.parametrize(("rollouts", "tokens"), [(20, 10_000), (60, 500), (30, 560)])
def test_both_caps_are_kept(rollouts: int, tokens: int) -> None:
    """Rollouts bind, tokens bind, or both: neither is passed, and one is nearly used up."""
    uneven = replace(
        beliefs([2.5] * 6, [6.5] * 6), expected_tokens=np.array([5.0, 10, 20, 20, 40, 40])
    )
    decision = plan_allocation("posterior", "paper", uneven, bounds(6, 0), Budget(rollouts, tokens))

    assert decision.allocated <= rollouts
    assert decision.reasons.expected_tokens <= tokens
    assert decision.allocated >= rollouts - 3 or decision.reasons.expected_tokens > tokens - 40
    assert decision.reasons.value >= 0.85 * decision.reasons.value_upper_bound


def test_unknown_names_are_refused() -> None:
    """A policy or objective that does not exist is named with those that do."""
    with pytest.raises(ValueError, match="policy = 'best': must be one of posterior, uniform"):
        plan_allocation("best", "paper", BELIEFS, bounds(4), Budget(40))
    with pytest.raises(ValueError, match="objective = 'best': must be one of paper"):
        plan_allocation("posterior", "best", BELIEFS, bounds(4), Budget(40))

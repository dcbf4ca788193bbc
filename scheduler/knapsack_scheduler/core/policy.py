"""The method on one screen: beliefs, bounds and a budget become counts and reasons.

A policy is a choice of marginals. ``posterior`` takes the expected gains of the
objective under each prompt's posterior, ``uniform`` takes no gain anywhere, so that the
tie rule (lowest group first) divides evenly. Everything after that is the same: what
the bounds force, the exact division of the rest, the reasons. ``paper`` is the rule of
the paper's release, from point estimates; see ``core/paper.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from knapsack_scheduler.core.catalogue import POINTWISE, find_objective
from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.costs import divide_within
from knapsack_scheduler.core.firstwave import first_wave
from knapsack_scheduler.core.knapsack import Solution
from knapsack_scheduler.core.many import MANY_PROMPTS, divide_alike
from knapsack_scheduler.core.multiples import divide_states
from knapsack_scheduler.core.objective import EFFECTIVE, Objective, Rule
from knapsack_scheduler.core.paper import paper_sizes
from knapsack_scheduler.core.problem import (
    Begun,
    Beliefs,
    BoolArray,
    Bounds,
    Budget,
    Decision,
    FloatArray,
    InfeasibleBudget,
    IntArray,
    KeyArray,
    Posterior,
    Reasons,
    WaveOutcomes,
)
from knapsack_scheduler.core.states import States, find_states, numbered_states
from knapsack_scheduler.core.ties import fill_lowest
from knapsack_scheduler.core.worth import Worth

POLICIES = ("posterior", "uniform", "paper")
"""The rules that divide a budget."""

HALF = 0.5
"""Share of the first of two waves where it is not known what would be best."""


def plan_allocation(
    policy: str, objective: str, beliefs: Beliefs, bounds: Bounds, budget: Budget
) -> Decision:
    """Return how many rollouts each position gets in the first wave.

    With ``budget.waves`` of 2 the wave is as large as makes both worth most; see
    ``core/firstwave.py``. It is half of the budget where that is in tokens, where the policy
    is not "posterior", and where the objective looks at sizes only.

    Args:
        policy: one of ``POLICIES``.
        objective: a name in ``catalogue.OBJECTIVES``.
        beliefs: posteriors of the positions' prompts.
        bounds: of whole groups, all waves.
        budget: of all waves, and the share of this one.

    Raises:
        InfeasibleBudget: the bounds cannot hold the budget and it is not partial.
        ValueError: an unknown policy or objective, or no newest rewards for "paper",
            which knows neither waves nor tokens nor minimums of 0.
    """
    forced = bounds.minimum
    least = int(forced.sum())
    total = _held_total(bounds, budget)
    planned = None
    if budget.waves == 2:
        rule = find_objective(objective)
        if policy == "posterior" and isinstance(rule, Objective) and not budget.total_tokens:
            planned = first_wave(rule, beliefs.posterior, bounds, total)
        else:
            budget = replace(budget, wave_fraction=HALF)
    wave = _share(total, total, budget.wave_fraction, least)
    if planned is not None:
        wave = int(planned[0].sum())
    tokens = budget.total_tokens * (budget.wave_fraction or 1.0)
    least_tokens = float((beliefs.expected_tokens * forced).sum())
    if budget.total_tokens and least_tokens > tokens:
        if least_tokens > budget.total_tokens and not budget.allow_partial:
            raise InfeasibleBudget(
                "total_tokens",
                budget.total_tokens,
                f"must be at least {least_tokens:.0f}, the expected tokens of min_rollouts",
            )
        tokens = least_tokens
    begun = Begun.nothing(forced.shape[0])
    wanted = _Wanted(wave, tokens if budget.total_tokens else None, total, budget.allow_partial)
    return _plan(policy, objective, beliefs, bounds, begun, forced, wanted, budget, planned)


def plan_extension(
    policy: str,
    objective: str,
    beliefs: Beliefs,
    bounds: Bounds,
    budget: Budget,
    outcomes: WaveOutcomes,
    keep_outstanding: bool,
) -> Decision:
    """Return how many further rollouts each position gets in the next wave.

    Groups that are already effective gain nothing from another rollout, groups that
    only failed or only passed gain what they may still become; see
    ``conditional_marginals``. Never gives more than the budget has left: where lost
    rollouts leave too little for every minimum, minimums give way to marginals.

    Args:
        policy, objective, beliefs, bounds: as in ``plan_allocation``; the posteriors
            know the outcomes of the earlier waves.
        budget: of all waves; its wave_fraction is this wave's share of the whole.
        outcomes: of the earlier waves.
        keep_outstanding: rollouts not delivered are still running and count as spent;
            else they are lost and their budget is spent again.

    Raises:
        ValueError: an unknown policy or objective.
    """
    begun = begun_groups(outcomes, keep_outstanding)
    budget = replace(budget, allow_partial=True)
    total = _held_total(bounds, budget)
    left = max(total - int(begun.size.sum()), 0)
    cost = beliefs.expected_tokens
    tokens = max(budget.total_tokens - float((cost * begun.size).sum()), 0.0)
    if budget.wave_fraction:
        tokens = min(tokens, budget.total_tokens * budget.wave_fraction)
    forced = np.maximum(bounds.minimum - begun.size, 0)
    if (budget.total_rollouts and int(forced.sum()) > left) or (
        budget.total_tokens and float((cost * forced).sum()) > tokens
    ):
        forced = np.zeros_like(forced)
    wave = _share(total, left, budget.wave_fraction, int(forced.sum()))
    wanted = _Wanted(wave, tokens if budget.total_tokens else None, left, True)
    return _plan(policy, objective, beliefs, bounds, begun, forced, wanted, budget)


def begun_groups(outcomes: WaveOutcomes, keep_outstanding: bool) -> Begun:
    """Return what groups have before their next wave; see ``plan_extension``."""
    missing = np.maximum(outcomes.allocated - outcomes.delivered, 0)
    return Begun(
        outcomes.delivered,
        outcomes.successes,
        outcomes.mixed,
        missing if keep_outstanding else np.zeros_like(missing),
        outcomes.level,
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What this wave is to spend.

    Attributes:
        rollouts: of this wave, the forced ones among them.
        tokens: cap on their expected tokens; None for no cap. With one, ``rollouts``
            is a cap too, or 0 for none.
        left: rollouts left in the budget, this wave's among them.
        partial: one less may be given where the exact number cannot.
    """

    rollouts: int
    tokens: float | None
    left: int
    partial: bool


def _held_total(bounds: Bounds, budget: Budget) -> int:
    """Return the total that the bounds hold; 0 if rollouts are not what is budgeted."""
    total = budget.total_rollouts
    if total == 0 and budget.total_tokens:
        return 0
    least, most = int(bounds.minimum.sum()), int(bounds.most.sum())
    if budget.total_tokens:
        total = min(total, most)
    if not least <= total <= most and not budget.allow_partial:
        raise InfeasibleBudget(
            "total_rollouts",
            total,
            f"must be from {least}, the sum of min_rollouts, to {most}, the sum of "
            "max_rollouts, or allow_partial must be set",
        )
    return min(max(total, least), most)


def _share(total: int, left: int, fraction: float, forced: int) -> int:
    """Return the rollouts of a wave: its share of the total, and what is forced."""
    wanted = int(total * fraction + 0.5) if fraction else left
    return max(min(wanted, left), min(forced, left))


def _plan(
    policy: str,
    objective_name: str,
    beliefs: Beliefs,
    bounds: Bounds,
    begun: Begun,
    forced: IntArray,
    wanted: _Wanted,
    budget: Budget,
    planned: tuple[IntArray, float] | None = None,
) -> Decision:
    """Return the decision; ``planned`` are the sizes and the price where these are known."""
    objective = find_objective(objective_name)
    states = None
    if wanted.tokens is None and objective_name in POINTWISE:
        states = _alike(beliefs.posterior, bounds, begun)
    problem = _problem(objective, beliefs, bounds, begun, forced, states)
    chosen = problem if policy == "posterior" else problem.levelled()
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: must be one of {', '.join(POLICIES)}")
    rest = max(wanted.rollouts - int(forced.sum()), 0)
    if wanted.tokens is not None:
        tokens = wanted.tokens - float((beliefs.expected_tokens * forced).sum())
        cap = rest if budget.total_rollouts else None
        given, price, slack = chosen.within_tokens(beliefs, max(tokens, 0.0), cap)
    elif planned is not None:
        given, price, slack = planned[0] - forced, planned[1], 0.0
    else:
        given, price = chosen.exactly(beliefs, rest, wanted)
        slack = 0.0
    if policy == "paper" and not begun.size.any():
        if beliefs.recent is None:
            raise ValueError("beliefs.recent = None: policy 'paper' needs newest rewards")
        total = int((forced + given).sum())
        given = paper_sizes(beliefs.recent, bounds, total, beliefs.tie_keys) - forced
    new = forced + given
    allocated = int(new.sum())
    last = wanted.rollouts >= wanted.left
    remaining = 0 if last or not budget.total_rollouts else max(wanted.left - allocated, 0)
    unallocated = 0
    if wanted.tokens is None:
        left = max(budget.total_rollouts - int(begun.size.sum()), 0)
        unallocated = left - allocated - remaining
    worth = Worth.of(objective, beliefs.posterior, begun, states)
    chances, value = worth.of_wave(new)
    level = fill_lowest(
        problem.size, problem.size + problem.room, int(given.sum()), beliefs.tie_keys
    )
    values = value, worth.total(forced + level)
    reasons = _reasons(policy, objective, beliefs, begun, new, chances, values, price)
    bound = reasons.value + slack
    if (policy != "posterior" or planned is not None) and wanted.tokens is None:
        best, _ = problem.exactly(beliefs, int(given.sum()), wanted)
        bound = worth.total(forced + best)
    reasons = replace(reasons, value_upper_bound=max(bound, reasons.value))
    return Decision(new, allocated, remaining, unallocated, chances, reasons)


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is left to divide after the bounds have forced their part.

    Attributes:
        marginals: of each position, or of each state.
        size, room, pairs: of each position, as in ``knapsack.divide``.
        states: which positions are alike; None where that is not known.
    """

    marginals: Marginals
    size: IntArray
    room: IntArray
    pairs: BoolArray | None
    states: States | None

    def levelled(self) -> _Problem:
        """Return the problem in which nothing gains anything, so that ties decide."""
        nobody = np.zeros(len(self.marginals), np.bool_)
        return replace(self, marginals=self.marginals.only(nobody))

    def exactly(self, beliefs: Beliefs, rollouts: int, wanted: _Wanted) -> tuple[IntArray, float]:
        """Return the division of ``rollouts``, or of the nearest number that divides."""
        rollouts = min(rollouts, int(self.room.sum()))
        spare = wanted.left - wanted.rollouts
        attempts = [rollouts]
        attempts += [rollouts + 1] if spare > 0 and rollouts < int(self.room.sum()) else []
        attempts += [rollouts - 1] if rollouts > 0 and (wanted.partial or spare > 0) else []
        for attempt in attempts:
            try:
                solution = self._divided(attempt, beliefs.tie_keys)
            except InfeasibleBudget:
                if attempt == attempts[-1]:
                    raise
            else:
                return solution.num_rollouts, solution.price
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _divided(self, rollouts: int, tie_keys: KeyArray) -> Solution:
        if self.states is None:
            return divide_alike(
                self.marginals, self.size, self.room, rollouts, tie_keys, self.pairs
            )
        rows = self.states.rows
        return divide_states(
            self.marginals,
            self.size[rows],
            self.room[rows],
            rollouts,
            self.states,
            tie_keys.__getitem__,
            None if self.pairs is None else self.pairs[rows],
        )

    def within_tokens(
        self, beliefs: Beliefs, tokens: float, most_rollouts: int | None
    ) -> tuple[IntArray, float, float]:
        """Return a division within both caps, its price, and what it may be short of."""
        costs = np.maximum(beliefs.expected_tokens, 1.0)
        solution = divide_within(
            self.marginals,
            self.size,
            self.room,
            costs,
            tokens,
            beliefs.tie_keys,
            self.pairs,
            most_rollouts,
        )
        return solution.num_rollouts, solution.price, solution.upper_bound - solution.gain


def _alike(posterior: Posterior, bounds: Bounds, begun: Begun) -> States | None:
    """Return which new groups are alike in all that decides; None if few are.

    None too where a group is begun or rewards have levels, which seldom leaves many alike.
    """
    kinds = posterior.kinds
    few = kinds is None and posterior.alpha.size < MANY_PROMPTS
    if posterior.levels is not None or few or begun.size.any():
        return None
    of_bounds = [each for each in (bounds.minimum, bounds.maximum) if (each != each[0]).any()]
    if kinds is None:
        return find_states([posterior.alpha, posterior.beta, *of_bounds])
    return find_states([kinds, *of_bounds]) if of_bounds else numbered_states(kinds)


def _problem(
    objective: Rule,
    beliefs: Beliefs,
    bounds: Bounds,
    begun: Begun,
    forced: IntArray,
    states: States | None,
) -> _Problem:
    size = begun.size + forced
    room = np.maximum(bounds.most - size, 0)
    pairs = (size == 0) & (room >= 2)
    posterior, fresh, maximum = beliefs.posterior, begun.size == 0, bounds.maximum
    if states is not None:
        rows = states.rows
        posterior = Posterior(posterior.alpha[rows], posterior.beta[rows])
        begun = Begun.nothing(rows.size)
        fresh, maximum, forced = fresh[rows], maximum[rows], forced[rows]
    marginals = objective.conditional(posterior, begun)
    # Marginals of a new group begin at its second rollout, those of others at the next.
    marginals = marginals.advanced(np.where(fresh, np.maximum(forced - 1, 0), forced))
    # A lone rollout cannot differ from anything.
    marginals = marginals.only(~fresh | (maximum >= 2))
    return _Problem(marginals, size, room, pairs if pairs.any() else None, states)


def effective_chances(posterior: Posterior, begun: Begun, new: IntArray) -> FloatArray:
    """Return the chance that each whole group is effective once ``new`` rollouts came.

    Args:
        posterior: of the outcomes, at the time of the decision.
        begun: what the groups had before.
        new: rollouts given to each, int64[M].
    """
    return Worth.of(EFFECTIVE, posterior, begun).of_wave(new)[0]


def _reasons(
    policy: str,
    objective: Rule,
    beliefs: Beliefs,
    begun: Begun,
    new: IntArray,
    chances: FloatArray,
    values: tuple[float, float],
    price: float,
) -> Reasons:
    """Return the reasons; ``values`` are of the decision, and of the same total levelled."""
    sizes = begun.size + new
    groups = max(int(np.count_nonzero(sizes)), 1)
    return Reasons(
        policy=policy,
        objective=objective.name,
        effective_group_rate=float(chances.sum()) / groups,
        effective_rollout_rate=float((chances * sizes).sum()) / max(int(sizes.sum()), 1),
        value=values[0],
        uniform_value=values[1],
        value_upper_bound=0.0,
        price=price,
        unseen_prompts=int(np.count_nonzero(beliefs.unseen)),
        largest_group=int(sizes.max(initial=0)),
        expected_tokens=float((beliefs.expected_tokens * new).sum()),
    )

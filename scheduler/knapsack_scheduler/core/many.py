"""Exact division of so many prompts that looking at each one alone is what takes time.

A million prompts have few different success rates, or, where the rates are not counted
but real numbers, one pair of bounds. Either is divided in a few passes over the batch,
with the same answer as ``knapsack.divide``: positions that are alike as one state, rates
that are close together as one bin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from knapsack_scheduler.core.bins import divide_by_bins
from knapsack_scheduler.core.catalogue import POINTWISE, find_objective
from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.knapsack import Solution, divide
from knapsack_scheduler.core.multiples import divide_states
from knapsack_scheduler.core.objective import Objective
from knapsack_scheduler.core.problem import BoolArray, Bounds, FloatArray, IntArray, KeyArray
from knapsack_scheduler.core.states import find_states

MANY_PROMPTS = 1 << 11
"""Fewer are divided as fast one by one."""


def open_problem(
    marginals: Marginals, bounds: Bounds
) -> tuple[Marginals, IntArray, BoolArray | None]:
    """Return what is to be divided once everybody has the minimum.

    Args:
        marginals: gains of the second and further rollouts.
        bounds: of whole groups.

    Returns:
        Gains, capacity and pairs, as ``knapsack.divide`` takes them.
    """
    base = bounds.minimum
    room = bounds.most - base
    pairs = (base == 0) & (room >= 2)
    # Two rollouts are the least that can differ: a lone one gains nothing.
    gains = marginals.only(bounds.maximum >= 2).advanced(np.maximum(base - 1, 0))
    return gains, room, pairs if pairs.any() else None


def divide_alike(
    marginals: Marginals,
    size: IntArray,
    capacity: IntArray,
    rollouts: int,
    tie_keys: KeyArray,
    pairs: BoolArray | None = None,
) -> Solution:
    """Return the same as ``knapsack.divide``, sooner where many positions are alike.

    Args, raises: as there.
    """
    if capacity.size >= MANY_PROMPTS:
        columns: list[FloatArray | IntArray] = [size, capacity]
        for chain in marginals.chains:
            columns += chain.columns
        if pairs is not None:
            columns.append(pairs.astype(np.int64))
        states = find_states(columns)
        if states is not None:
            rows = states.rows
            return divide_states(
                marginals.take(rows),
                size[rows],
                capacity[rows],
                rollouts,
                states,
                tie_keys.__getitem__,
                None if pairs is None else pairs[rows],
            )
    return divide(marginals, size, capacity, rollouts, tie_keys, pairs)


def divide_many(
    objective: str,
    evidence: Sequence[FloatArray],
    low: IntArray,
    high: IntArray,
    total: int,
    keys_of: Callable[[IntArray], KeyArray],
) -> IntArray | None:
    """Return the rollouts of each position, int64[M], or None to have it done one by one.

    Args:
        objective: a name in ``catalogue.OBJECTIVES``.
        evidence: the success rates, or alpha and beta, float64[M] each.
        low, high: bounds of each position, int64[M], or of all, int64[].
        total: rollouts of all positions, which the bounds hold.
        keys_of: returns the tie keys of some positions.

    Raises:
        InfeasibleBudget: no division without a group of one has that sum.
    """
    count = evidence[0].size
    if count < MANY_PROMPTS or objective not in POINTWISE:
        return None
    rule = find_objective(objective)
    states = find_states([*evidence, *_bound_columns(low, high)])
    if states is not None:
        numbers = [column[states.rows] for column in evidence]
        bounds = Bounds(_at(low, states.rows), _at(high, states.rows))
        marginals = rule.at_rates(*numbers) if len(numbers) == 1 else rule.expected(*numbers)
        gains, room, pairs = open_problem(marginals, bounds)
        base = bounds.minimum
        rest = total - int(states.counts @ base)
        return divide_states(
            gains, base, room, rest, states, keys_of, pairs, whole=True
        ).num_rollouts
    uniform = low.ndim == 0 and high.ndim == 0 and low >= 1 and high >= 2
    if uniform and len(evidence) == 1 and isinstance(rule, Objective):
        least, most = int(low), int(high)
        by_bins = divide_by_bins(rule, evidence[0], least, most, total - least * count, keys_of)
        if by_bins is not None:
            by_bins += least
        return by_bins
    return None


def _bound_columns(low: IntArray, high: IntArray) -> list[IntArray]:
    """Return the bounds that differ between positions, two in one column."""
    if not low.ndim or not high.ndim:
        return [bound for bound in (low, high) if bound.ndim]
    both = high << 32
    both |= low
    return [both]


def _at(bound: IntArray, rows: IntArray) -> IntArray:
    return bound[rows] if bound.ndim else np.full(rows.shape, bound)

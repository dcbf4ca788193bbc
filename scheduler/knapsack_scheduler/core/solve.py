"""The solver as a function of numbers, for use without a service and without a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.costs import divide_by_cost
from knapsack_scheduler.core.knapsack import divide
from knapsack_scheduler.core.problem import (
    Bounds,
    FloatArray,
    InfeasibleBudget,
    IntArray,
    KeyArray,
    tie_keys,
)


def solve(
    success_rates: npt.ArrayLike,
    total_rollouts: float,
    min_rollouts: npt.ArrayLike = 2,
    max_rollouts: npt.ArrayLike = 128,
    objective: str = "paper",
    costs: npt.ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> IntArray:
    """Return the number of rollouts of each prompt that is worth most in all.

    Maximises ``sum_i (1 - p_i^N_i - (1-p_i)^N_i) I(p_i)`` subject to
    ``min_i <= N_i <= max_i`` and ``sum_i N_i = total_rollouts``, exactly. (Knapsack RL,
    arXiv 2509.25849, whose ``I(p) = p (1-p)^2`` is the objective "paper".) The same
    input gives the same vector on every machine; with ``prompt_ids`` also in any order.

    Args:
        success_rates: p, [M], each in [0, 1].
        total_rollouts: the budget. With ``costs``, in their unit, and then a cap: the
            answer costs at most this. It is exact for fewer than 20 prompts with bounds
            of some hundreds; else it is found by value per cost, and short of the optimum
            by less than the value of one rollout.
        min_rollouts: fewest rollouts, one number or [M], 0 or more. Where 0, the
            prompt gets 0 or at least 2.
        max_rollouts: most rollouts, one number or [M], at least ``min_rollouts``.
        objective: "paper", "effective" (I = 1), "variance" (I = p (1-p)), or another
            name of ``core.catalogue.OBJECTIVES``.
        costs: cost of one rollout, [M], above 0, such as expected tokens. None: 1 each,
            and the whole budget is given.
        prompt_ids: stable names, [M]; break ties. None: ties go to the lower position.

    Returns:
        int64[M].

    Raises:
        ValueError: an argument of the wrong shape or range; names it.
        InfeasibleBudget: the bounds cannot hold the budget (a ValueError).
    """
    p = _column("success_rates", success_rates)
    if not bool(((p >= 0.0) & (p <= 1.0)).all()):
        raise ValueError(f"success_rates = {_outside(p, 0.0, 1.0)}: must be within 0 and 1")
    marginals = find_objective(objective).at_rates(p)
    return _solve(marginals, total_rollouts, min_rollouts, max_rollouts, costs, prompt_ids)


def solve_posterior(
    alpha: npt.ArrayLike,
    beta: npt.ArrayLike,
    total_rollouts: float,
    min_rollouts: npt.ArrayLike = 2,
    max_rollouts: npt.ArrayLike = 128,
    objective: str = "paper",
    costs: npt.ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> IntArray:
    """Return the number of rollouts of each prompt with the highest expected value.

    As ``solve``, with Beta(alpha, beta) posteriors of the success rates in place of the
    rates: prompts that never or always succeeded still get their share.

    Args:
        alpha: [M], above 0: one more than, or a prior plus, the successes seen.
        beta: [M], above 0: the same of the failures.
        total_rollouts, min_rollouts, max_rollouts, objective, costs, prompt_ids: as in
            ``solve``.

    Returns:
        int64[M].

    Raises:
        ValueError, InfeasibleBudget: as ``solve``.
    """
    a = _column("alpha", alpha)
    b = _column("beta", beta)
    for name, column in (("alpha", a), ("beta", b)):
        if not bool((column > 0.0).all()):
            raise ValueError(f"{name} = {column.min()}: must be above 0")
    if a.shape != b.shape:
        raise ValueError(f"beta: must have one number per prompt ({a.size}), has {b.size}")
    marginals = find_objective(objective).expected(a, b)
    return _solve(marginals, total_rollouts, min_rollouts, max_rollouts, costs, prompt_ids)


def _solve(
    marginals: Marginals,
    total_rollouts: float,
    min_rollouts: npt.ArrayLike,
    max_rollouts: npt.ArrayLike,
    costs: npt.ArrayLike | None,
    prompt_ids: Sequence[str] | None,
) -> IntArray:
    count = len(marginals)
    bounds = Bounds(
        _counts("min_rollouts", min_rollouts, count), _counts("max_rollouts", max_rollouts, count)
    )
    if bool((bounds.minimum > bounds.maximum).any()):
        at = int(np.argmax(bounds.minimum > bounds.maximum))
        raise ValueError(
            f"max_rollouts[{at}] = {bounds.maximum[at]}: must be at least "
            f"min_rollouts[{at}] = {bounds.minimum[at]}"
        )
    keys: KeyArray = np.arange(count, dtype=np.uint64)
    if prompt_ids is not None:
        if len(prompt_ids) != count:
            raise ValueError(
                f"prompt_ids: must have one name per prompt ({count}), has {len(prompt_ids)}"
            )
        keys = tie_keys(prompt_ids)
    base = bounds.minimum
    room = bounds.most - base
    pairs = (base == 0) & (room >= 2)
    # Two rollouts are the least that can differ: a lone one gains nothing.
    marginals = marginals.only(bounds.maximum >= 2).advanced(np.maximum(base - 1, 0))
    if costs is not None:
        return base + _within_cost(marginals, base, room, costs, total_rollouts, keys, pairs)
    total = _whole("total_rollouts", total_rollouts)
    check_total(total, bounds)
    rest = total - int(base.sum())
    given = divide(marginals, base, room, rest, keys, pairs if pairs.any() else None)
    return base + given.num_rollouts


def check_total(total_rollouts: int, bounds: Bounds) -> None:
    """Raise InfeasibleBudget, naming the three numbers, if the bounds cannot hold the total."""
    least, most = int(bounds.minimum.sum()), int(bounds.most.sum())
    if not least <= total_rollouts <= most:
        raise InfeasibleBudget(
            "total_rollouts",
            total_rollouts,
            f"must be from {least}, the sum of min_rollouts, to {most}, the sum of max_rollouts",
        )


def _within_cost(
    marginals: Marginals,
    base: IntArray,
    room: IntArray,
    costs: npt.ArrayLike,
    budget: float,
    keys: KeyArray,
    pairs: npt.NDArray[np.bool_],
) -> IntArray:
    cost = _column("costs", costs)
    if cost.shape != base.shape:
        raise ValueError(f"costs: must have one number per prompt ({base.size}), has {cost.size}")
    if not bool((cost > 0.0).all()):
        raise ValueError(f"costs = {cost.min()}: must be above 0")
    if not np.isfinite(budget):
        raise ValueError(f"total_rollouts = {budget}: must be a finite number")
    least = float((cost * base).sum())
    if budget < least:
        raise InfeasibleBudget(
            "total_rollouts",
            budget,
            f"must be at least {least}, the cost of min_rollouts (at most "
            f"{float((cost * (base + room)).sum())}, the cost of max_rollouts, can be used)",
        )
    return divide_by_cost(
        marginals, base, room, cost, budget - least, keys, pairs if pairs.any() else None
    ).num_rollouts


def _column(name: str, values: npt.ArrayLike) -> FloatArray:
    column = np.asarray(values, np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name}: must be one-dimensional, has shape {column.shape}")
    if not bool(np.isfinite(column).all()):
        at = int(np.argmin(np.isfinite(column)))
        raise ValueError(f"{name}[{at}] = {column[at]}: must be a finite number")
    return column


def _outside(column: FloatArray, low: float, high: float) -> float:
    return float(column[(column < low) | (column > high)][0])


def _counts(name: str, values: npt.ArrayLike, count: int) -> IntArray:
    given = np.asarray(values)
    if given.dtype.kind not in "iu" and not (
        given.dtype.kind == "f" and bool((given == np.floor(given)).all())
    ):
        raise ValueError(f"{name}: must be whole numbers, is {given.dtype}")
    if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != count):
        raise ValueError(
            f"{name}: must be one number or one per prompt ({count}), has shape {given.shape}"
        )
    if given.size and (given.min() < 0 or given.max() > 2**31 - 1):
        worst = given.min() if given.min() < 0 else given.max()
        raise ValueError(f"{name} = {worst}: must be within 0 and {2**31 - 1}")
    return np.array(np.broadcast_to(given, (count,)), np.int64)


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} = {value}: must be a whole number")
    return int(value)

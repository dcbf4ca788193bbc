"""The solver as a function of numbers, for use without a service and without a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.catalogue import find_objective
from knapsack_scheduler.core.chains import Marginals
from knapsack_scheduler.core.costs import divide_by_cost
from knapsack_scheduler.core.levels import class_weights
from knapsack_scheduler.core.many import divide_alike, divide_many, open_problem
from knapsack_scheduler.core.problem import (
    Begun,
    BoolArray,
    Bounds,
    FloatArray,
    InfeasibleBudget,
    IntArray,
    KeyArray,
    Levels,
    Posterior,
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
    if p.size and not 0.0 <= p.min() <= p.max() <= 1.0:
        raise ValueError(f"success_rates = {_outside(p, 0.0, 1.0)}: must be within 0 and 1")
    return _solve(objective, (p,), total_rollouts, min_rollouts, max_rollouts, costs, prompt_ids)


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
        if column.size and not column.min() > 0.0:
            raise ValueError(f"{name} = {column.min()}: must be above 0")
    if a.shape != b.shape:
        raise ValueError(f"beta: must have one number per prompt ({a.size}), has {b.size}")
    return _solve(objective, (a, b), total_rollouts, min_rollouts, max_rollouts, costs, prompt_ids)


def solve_levels(
    weights: npt.ArrayLike,
    success: npt.ArrayLike,
    total_rollouts: float,
    min_rollouts: npt.ArrayLike = 2,
    max_rollouts: npt.ArrayLike = 128,
    objective: str = "paper",
    costs: npt.ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> IntArray:
    """Return the number of rollouts of each prompt where rewards have more than two levels.

    As ``solve_posterior``, with a Dirichlet posterior of the shares of the reward levels: a
    group counts as effective if its rewards are not all equal, so that two different
    failures are enough.

    Args:
        weights: of each level, [M, K], above 0: a prior plus the rollouts seen with it.
        success: which levels are successes, [K]; some are, and some are not.
        total_rollouts, min_rollouts, max_rollouts, objective, costs, prompt_ids: as in
            ``solve``.

    Returns:
        int64[M].

    Raises:
        ValueError, InfeasibleBudget: as ``solve``.
    """
    shares = np.asarray(weights, np.float64)
    good = np.asarray(success, np.bool_)
    if shares.ndim != 2 or good.shape != shares.shape[1:]:
        raise ValueError(
            f"weights: must have a row per prompt and a column per level of success "
            f"({good.size}), has shape {shares.shape}"
        )
    if not good.any() or good.all():
        raise ValueError("success: must be true for some levels and false for others")
    if shares.size and not (np.isfinite(shares).all() and shares.min() > 0.0):
        at = np.unravel_index(np.argmin(np.isfinite(shares) & (shares > 0.0)), shares.shape)
        raise ValueError(
            f"weights[{at[0]}][{at[1]}] = {shares[at]}: must be a finite number above 0"
        )
    posterior = Posterior(*class_weights(shares, good), Levels(shares, good))
    return _solve(
        objective, posterior, total_rollouts, min_rollouts, max_rollouts, costs, prompt_ids
    )


def _solve(
    objective: str,
    evidence: tuple[FloatArray, ...] | Posterior,
    total_rollouts: float,
    min_rollouts: npt.ArrayLike,
    max_rollouts: npt.ArrayLike,
    costs: npt.ArrayLike | None,
    prompt_ids: Sequence[str] | None,
) -> IntArray:
    count = evidence.alpha.size if isinstance(evidence, Posterior) else evidence[0].size
    rule = find_objective(objective)
    low = _counts("min_rollouts", min_rollouts, count)
    high = _counts("max_rollouts", max_rollouts, count)
    if bool((low > high).any()):
        lows, highs = np.broadcast_to(low, count), np.broadcast_to(high, count)
        at = int(np.argmax(lows > highs))
        raise ValueError(
            f"max_rollouts[{at}] = {highs[at]}: must be at least min_rollouts[{at}] = {lows[at]}"
        )
    if prompt_ids is not None and len(prompt_ids) != count:
        raise ValueError(
            f"prompt_ids: must have one name per prompt ({count}), has {len(prompt_ids)}"
        )

    def keys_of(rows: IntArray) -> KeyArray:
        # Only of those among whom a tie is split: a million names take a second.
        if prompt_ids is None:
            return rows.astype(np.uint64)
        return tie_keys([prompt_ids[row] for row in rows.tolist()])

    total = 0
    if costs is None:
        total = _whole("total_rollouts", total_rollouts)
        _check_total(total, low, high, count)
        if not isinstance(evidence, Posterior):
            answer = divide_many(objective, evidence, low, high, total, keys_of)
            if answer is not None:
                return answer
    bounds = Bounds(np.array(np.broadcast_to(low, count)), np.array(np.broadcast_to(high, count)))
    base = bounds.minimum
    if isinstance(evidence, Posterior):
        marginals = rule.conditional(evidence, Begun.nothing(count))
    elif len(evidence) == 1:
        marginals = rule.at_rates(*evidence)
    else:
        marginals = rule.expected(*evidence)
    gains, room, pairs = open_problem(marginals, bounds)
    keys = keys_of(np.arange(count))
    if costs is not None:
        return base + _within_cost(gains, base, room, costs, total_rollouts, keys, pairs)
    given = divide_alike(gains, base, room, total - int(base.sum()), keys, pairs)
    return base + given.num_rollouts


def _check_total(total_rollouts: int, low: IntArray, high: IntArray, count: int) -> None:
    """Raise InfeasibleBudget, naming the three numbers, if the bounds cannot hold the total."""
    least, most = _sum(low, count), _sum(high, count)
    if count and low.min() == 0 and high.min() <= 1:
        # No group of one where none is asked.
        most -= int(np.count_nonzero(np.broadcast_to((low == 0) & (high == 1), (count,))))
    if not least <= total_rollouts <= most:
        raise InfeasibleBudget(
            "total_rollouts",
            total_rollouts,
            f"must be from {least}, the sum of min_rollouts, to {most}, the sum of max_rollouts",
        )


def _sum(bound: IntArray, count: int) -> int:
    return int(bound.sum()) if bound.ndim else int(bound) * count


def _within_cost(
    marginals: Marginals,
    base: IntArray,
    room: IntArray,
    costs: npt.ArrayLike,
    budget: float,
    keys: KeyArray,
    pairs: BoolArray | None,
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
    return divide_by_cost(marginals, base, room, cost, budget - least, keys, pairs).num_rollouts


def _column(name: str, values: npt.ArrayLike) -> FloatArray:
    column = np.asarray(values, np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name}: must be one-dimensional, has shape {column.shape}")
    # Both ends are finite if all are, as NaN is passed on; two fast passes.
    if column.size and not np.isfinite([column.min(), column.max()]).all():
        at = int(np.argmin(np.isfinite(column)))
        raise ValueError(f"{name}[{at}] = {column[at]}: must be a finite number")
    return column


def _outside(column: FloatArray, low: float, high: float) -> float:
    return float(column[(column < low) | (column > high)][0])


def _counts(name: str, values: npt.ArrayLike, count: int) -> IntArray:
    """Return one number per prompt, int64[M], or the one they all have, int64[]."""
    given = np.asarray(values)
    if given.dtype.kind not in "iu" and not (
        given.dtype.kind == "f" and bool((given == np.floor(given)).all())
    ):
        raise ValueError(f"{name}: must be whole numbers, is {given.dtype}")
    if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != count):
        raise ValueError(
            f"{name}: must be one number or one per prompt ({count}), has shape {given.shape}"
        )
    most = 2**31 - 1
    # As unsigned numbers those below 0 are the largest: one pass finds either.
    wide = given.dtype == np.int64 and given.size and given.view(np.uint64).max() <= most
    if given.size and not wide and (given.min() < 0 or given.max() > most):
        worst = given.min() if given.min() < 0 else given.max()
        raise ValueError(f"{name} = {worst}: must be within 0 and {most}")
    whole = np.asarray(given, np.int64)
    some = whole[:: max(whole.size // 64, 1)] if whole.ndim else whole
    if whole.ndim and whole.size and (some == some[0]).all() and (whole == whole[0]).all():
        return whole[:1].reshape(())
    return whole


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} = {value}: must be a whole number")
    return int(value)

"""Any table of values: the exact multiple-choice knapsack.

Where the value of a group is not concave in its size, or a handful of rollouts cost very
differently, taking the best gains first can be far from the optimum. Here every position
chooses one option of its own table. The linear relaxation gives a price; at that price an
option falls short of the best one by its ``deficit``, and the deficits of a choice add up
to its distance from an upper bound. So only choices whose deficits sum to less than some
gap are searched, and the gap is widened until what was found proves itself: a solution
no further from the bound than the gap is optimal. (The expanding core of Pisinger, "A
minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import FloatArray, InfeasibleBudget, IntArray

_MEETINGS = 100
"""Most steps to the price; some ten are usual."""

_WIDER = 8.0
_ROUNDING = 1e-12
"""Values closer than this, relative to the largest, are equal."""

_MOST_STATES = 4_000_000
"""Partial choices held at once: some hundred MiB."""


class TooManyChoices(ValueError):
    """The table cannot be searched exactly within memory; the message says what helps."""


@dataclass(frozen=True, slots=True)
class TableSolution:
    """The best choice.

    Attributes:
        options: chosen option of each position, int64[M].
        value: sum of their values.
        cost: sum of their costs.
    """

    options: IntArray
    value: float
    cost: float


def solve_table(
    values: Sequence[npt.ArrayLike],
    budget: float,
    costs: Sequence[npt.ArrayLike] | None = None,
    *,
    exactly: bool | None = None,
) -> TableSolution:
    """Return one option per position with the highest sum of values within the budget.

    Args:
        values: of each position, the value of its options; -inf or NaN where an option
            is not allowed. With the default costs option n is a group of n rollouts.
        budget: what the options may cost in all, finite.
        costs: cost of each option, in the shape of ``values``, finite. None: option n
            costs n.
        exactly: the whole budget must be spent. None: if ``costs`` is None.

    Returns:
        The optimum, proven; among optima always the same one for the same input.

    Raises:
        InfeasibleBudget: no choice fits the budget.
        TooManyChoices: the proof would need more than a few million partial choices;
            integer costs are what keeps them few.
        ValueError: an argument of the wrong shape or range; names it.
    """
    table = [_column(f"values[{i}]", v) for i, v in enumerate(values)]
    if costs is None:
        prices = [np.arange(column.size, dtype=np.float64) for column in table]
    else:
        prices = [_column(f"costs[{i}]", c) for i, c in enumerate(costs)]
        _check_costs(table, prices)
    if not np.isfinite(budget):
        raise ValueError(f"budget = {budget}: must be a finite number")
    whole = costs is None if exactly is None else exactly
    allowed = [np.flatnonzero(column > -np.inf) for column in table]
    for i, some in enumerate(allowed):
        if some.size == 0:
            raise ValueError(f"values[{i}]: must allow at least one option")
    problem = _Table(
        [column[some] for column, some in zip(table, allowed, strict=True)],
        [column[some] for column, some in zip(prices, allowed, strict=True)],
        float(budget),
        whole,
    )
    problem.check_feasible()
    chosen = problem.solve()
    options = np.array([some[k] for some, k in zip(allowed, chosen, strict=True)], np.int64)
    return TableSolution(
        options,
        float(sum(column[k] for column, k in zip(table, options, strict=True))),
        float(sum(column[k] for column, k in zip(prices, options, strict=True))),
    )


def _check_costs(table: list[FloatArray], prices: list[FloatArray]) -> None:
    if len(table) != len(prices):
        raise ValueError(f"costs: must be one per position ({len(table)}), has {len(prices)}")
    for i, (column, cost) in enumerate(zip(table, prices, strict=True)):
        if column.shape != cost.shape:
            raise ValueError(f"costs[{i}]: must be one per option ({column.size})")
        if not bool(np.isfinite(cost).all()):
            raise ValueError(f"costs[{i}]: must be finite numbers")


def _column(name: str, values: npt.ArrayLike) -> FloatArray:
    column = np.array(values, np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name}: must be one-dimensional, has shape {column.shape}")
    column[np.isnan(column)] = -np.inf
    if bool((column == np.inf).any()):
        raise ValueError(f"{name}: must be finite, or -inf for what is not allowed")
    return column


@dataclass(slots=True)
class _State:
    """Partial choices: what they cost, how far they fall short, and where they came from."""

    cost: FloatArray
    deficit: FloatArray
    parent: IntArray
    option: IntArray


@dataclass(frozen=True, slots=True)
class _Table:
    """Allowed options only: values and costs of each position."""

    values: list[FloatArray]
    costs: list[FloatArray]
    budget: float
    exactly: bool

    def check_feasible(self) -> None:
        """Refuse a budget that no choice fits, as far as the sums tell."""
        least = float(sum(cost.min() for cost in self.costs))
        most = float(sum(cost.max() for cost in self.costs))
        slack = self._slack()
        if self.budget < least - slack or (self.exactly and self.budget > most + slack):
            upper = f" to {most:g}, the cost of the largest" if self.exactly else ""
            raise InfeasibleBudget(
                "budget",
                self.budget,
                f"must be from {least:g}, the cost of the smallest options,{upper or ' on'}",
            )

    def solve(self) -> list[int]:
        """Return the position of the best option of each."""
        price = self._price()
        reduced = [v - price * c for v, c in zip(self.values, self.costs, strict=True)]
        best = [float(column.max()) for column in reduced]
        deficits = [b - column for b, column in zip(best, reduced, strict=True)]
        scale = max((float(np.abs(column).max()) for column in reduced), default=0.0)
        noise = _ROUNDING * max(scale, 1e-300) * max(len(self.values), 1)
        gap = self._first_gap(deficits, noise)
        largest = float(sum(d.max() for d in deficits)) + abs(price) * (
            abs(self.budget) + float(sum(np.abs(c).max() for c in self.costs))
        )
        while True:
            found = self._search(deficits, price, gap + noise)
            if found is not None:
                chosen, shortfall = found
                if shortfall <= gap:
                    return chosen
                gap = shortfall
            elif gap > largest:
                raise InfeasibleBudget("budget", self.budget, "no choice of options adds up to it")
            else:
                gap = gap * _WIDER if gap > 0.0 else noise

    def _price(self) -> float:
        """Return the price at which the relaxation spends the budget.

        The relaxation's bound is the highest of lines in the price, one for each choice;
        its lowest point is sought where the lines of a choice above the budget and of one
        below it meet, which is a bend of the bound or shows a better choice.
        """
        rows = np.arange(len(self.values))
        width = max(value.size for value in self.values)
        values, costs = np.empty((2, rows.size, width))
        for row, (value, cost) in enumerate(zip(self.values, self.costs, strict=True)):
            # Padded with copies of an option, which change nothing.
            values[row, : value.size], values[row, value.size :] = value, value[0]
            costs[row, : cost.size], costs[row, cost.size :] = cost, cost[0]

        def line(reduced: FloatArray, then: FloatArray) -> tuple[float, float]:
            """Return value and cost of the best options, of those the best by ``then``."""
            best = reduced >= reduced.max(axis=1, keepdims=True)
            at = np.where(best, then, -np.inf).argmax(axis=1)
            return float(values[rows, at].sum()), float(costs[rows, at].sum())

        below = line(-costs, values)
        above = line(costs, values) if self.exactly else line(values, -costs)
        if not self.exactly and above[1] <= self.budget:
            return 0.0
        # A budget for the dearest options has no choice above it: that of a bit less has.
        budget = min(self.budget, float(np.nextafter(above[1], -np.inf)))
        low, high = -np.inf, np.inf
        for _ in range(_MEETINGS):
            if not below[1] < above[1]:
                break
            price = (above[0] - below[0]) / (above[1] - below[1])
            if not low < price < high:
                break
            met = line(values - price * costs, -costs)
            if met[1] > budget:
                low, above = price, met
            else:
                high, below = price, met
        if high < np.inf:
            return high
        return low if low > -np.inf else 0.0

    def _first_gap(self, deficits: list[FloatArray], noise: float) -> float:
        """Return the smallest deficits of a few positions: what a small repair costs."""
        smallest = sorted(float(d[d > noise].min()) for d in deficits if bool((d > noise).any()))
        return sum(smallest[:4])

    def _search(
        self, deficits: list[FloatArray], price: float, gap: float
    ) -> tuple[list[int], float] | None:
        """Return the best choice whose deficits sum to at most the gap, and its shortfall.

        The shortfall is its distance from the relaxation's bound.
        """
        options = [np.flatnonzero(d <= gap) for d in deficits]
        fixed = float(sum(c[o[0]] for c, o in zip(self.costs, options, strict=True) if o.size == 1))
        spent = float(sum(d[o[0]] for d, o in zip(deficits, options, strict=True) if o.size == 1))
        # Those with most to choose last: their options multiply the states of the others.
        open_rows = [i for i, o in enumerate(options) if o.size > 1]
        open_rows.sort(key=lambda i: (options[i].size, i))
        least = _tails([float(self.costs[i][options[i]].min()) for i in open_rows])
        most = _tails([float(self.costs[i][options[i]].max()) for i in open_rows])
        start = np.zeros(1, np.int64)
        layers = [_State(np.array([fixed]), np.array([spent]), start, start)]
        for depth, row in enumerate(open_rows):
            layers.append(
                self._extended(
                    layers[-1],
                    self.costs[row][options[row]],
                    deficits[row][options[row]],
                    price,
                    gap,
                    least[depth + 1],
                    most[depth + 1],
                )
            )
            if layers[-1].cost.size == 0:
                return None
        last = layers[-1]
        slack = self._slack()
        fits = last.cost <= self.budget + slack
        if self.exactly:
            fits &= last.cost >= self.budget - slack
        if not fits.any():
            return None
        shortfall = np.where(fits, last.deficit + price * (self.budget - last.cost), np.inf)
        at = int(shortfall.argmin())
        result = float(shortfall[at])
        chosen = [int(o[0]) for o in options]
        for depth in range(len(open_rows), 0, -1):
            layer = layers[depth]
            row = open_rows[depth - 1]
            chosen[row] = int(options[row][layer.option[at]])
            at = int(layer.parent[at])
        return chosen, result

    def _extended(
        self,
        state: _State,
        costs: FloatArray,
        deficits: FloatArray,
        price: float,
        gap: float,
        least: float,
        most: float,
    ) -> _State:
        """Return the partial choices with one more position, those without hope left out."""
        if state.cost.size * costs.size > _MOST_STATES:
            raise TooManyChoices(
                f"more than {_MOST_STATES:,} partial choices are open; round the costs to "
                "integers, or use solve with costs, which is fast and says how far it is off"
            )
        cost = (state.cost[:, None] + costs).ravel()
        deficit = (state.deficit[:, None] + deficits).ravel()
        slack = self._slack()
        hopeful = (deficit <= gap) & (cost + least <= self.budget + slack)
        if self.exactly:
            hopeful &= cost + most >= self.budget - slack
        kept = np.flatnonzero(hopeful)
        order = kept[np.lexsort((deficit[kept], cost[kept]))]
        if self.exactly:
            new = np.ones(order.size, np.bool_)
            new[1:] = cost[order][1:] != cost[order][:-1]
        else:
            # What is cheaper and worth as much makes what costs more superfluous.
            worth = price * cost[order] - deficit[order]
            new = np.ones(order.size, np.bool_)
            new[1:] = worth[1:] > np.maximum.accumulate(worth)[:-1]
        order = order[new]
        return _State(cost[order], deficit[order], order // costs.size, order % costs.size)

    def _slack(self) -> float:
        """Return how far sums of costs may be off by rounding."""
        return _ROUNDING * max(abs(self.budget), 1.0) * max(len(self.costs), 1)


def _tails(numbers: list[float]) -> list[float]:
    """Return the sums of all but the first k numbers, for every k."""
    tails = [0.0]
    for number in reversed(numbers):
        tails.append(tails[-1] + number)
    return tails[::-1]

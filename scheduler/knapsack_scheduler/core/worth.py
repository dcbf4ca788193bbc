"""What whole groups are worth by the rollouts that they may get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knapsack_scheduler.core.distinct import distinct
from knapsack_scheduler.core.moments import AllAlike
from knapsack_scheduler.core.objective import EFFECTIVE, Objective, Rule, expected_values
from knapsack_scheduler.core.problem import Begun, FloatArray, IntArray, Posterior
from knapsack_scheduler.core.states import States

_MOST_CELLS = 1 << 22
"""States times numbers of rollouts that are looked through for those that there are."""


@dataclass(frozen=True, slots=True)
class Worth:
    """Whole groups, and what is believed of them.

    Attributes:
        objective: what their value is of.
        posterior: of the outcomes.
        begun: what they have already.
        states: which of them are alike; None where that is not known.
        alike: of the posterior; None where rewards have levels, or states are known.
    """

    objective: Rule
    posterior: Posterior
    begun: Begun
    states: States | None
    alike: AllAlike | None

    @classmethod
    def of(
        cls, objective: Rule, posterior: Posterior, begun: Begun, states: States | None = None
    ) -> Worth:
        """Return that of groups; those of a state have the same posterior and nothing begun."""
        alike = None
        if posterior.levels is None and states is None:
            alike = AllAlike(posterior.alpha, posterior.beta)
        return cls(objective, posterior, begun, states, alike)

    def of_wave(self, new: IntArray) -> tuple[FloatArray, float]:
        """Return the chance that each group is effective with ``new`` rollouts, and all's value."""
        part, numbers, cell = self._cells(new)
        further, alike = part._to_come(numbers)
        chances = values = part._values(EFFECTIVE, further, alike)
        if self.objective is not EFFECTIVE:
            values = part._values(self.objective, further, alike)
        if cell is not None:
            chances, values = chances.take(cell), values.take(cell)
        return chances, float(values.sum())

    def total(self, new: IntArray) -> float:
        """Return the value of all groups with ``new`` rollouts each."""
        part, numbers, cell = self._cells(new)
        values = part._values(self.objective, *part._to_come(numbers))
        return float((values if cell is None else values.take(cell)).sum())

    def _cells(self, new: IntArray) -> tuple[Worth, IntArray, IntArray | None]:
        """Return one group of each state and number, their numbers, and which each one is like."""
        most = int(new.max(initial=0)) + 1
        if self.states is None:
            return self, new, None
        states = self.states
        if states.width * most > _MOST_CELLS:
            return Worth.of(self.objective, self.posterior, self.begun), new, None
        there, cell = distinct(states.of * np.int64(most) + new, states.width * most)
        row_of = np.zeros(states.width, np.int64)
        row_of[states.slots] = states.rows
        rows = row_of[there // most]
        posterior = Posterior(self.posterior.alpha[rows], self.posterior.beta[rows])
        return Worth.of(self.objective, posterior, Begun.nothing(rows.size)), there % most, cell

    def _to_come(self, new: IntArray) -> tuple[IntArray, tuple[FloatArray, FloatArray] | None]:
        """Return the rollouts still to come, and the chances that all pass, and all fail.

        None for the chances where they are not told by alpha and beta.
        """
        further = self.begun.outstanding + new
        return further, None if self.alike is None else self.alike.after(further)

    def _values(
        self, rule: Rule, further: IntArray, alike: tuple[FloatArray, FloatArray] | None
    ) -> FloatArray:
        if isinstance(rule, Objective) and alike is not None:
            return expected_values(rule, self.posterior, self.begun, further, alike)
        return rule.values(self.posterior, self.begun, further)

"""What is believed of a few prompts, for plans that can be followed by hand."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.core.problem import Beliefs, Posterior, tie_keys


def beliefs(alpha: list[float], beta: list[float], tokens: float = 0.0) -> Beliefs:
    """Return the beliefs of prompts p0, p1 .. with these posteriors."""
    count = len(alpha)
    return Beliefs(
        Posterior(np.array(alpha, float), np.array(beta, float)),
        tie_keys([f"p{k}" for k in range(count)]),
        np.zeros(count, bool),
        np.full(count, tokens),
    )

"""Scenarios drawn at random, so that nothing can be tuned to the few that ship."""

from __future__ import annotations

import numpy as np

from knapsack_scheduler.lab.scenario import Band, Drift, Learning, Run, Scenario

BANDS = (1, 4)
"""Fewest and most bands; their shares are Dirichlet(1, .., 1)."""

LOGIT_MEAN = (-6.0, 4.0)
LOGIT_SD = (0.3, 1.5)
EXACT = (0.0, 0.15)
"""Share of a band that never, and share that always succeeds; each 0 in half of the bands."""

EPOCHS = (3, 7)
STEPS_PER_EPOCH = (6, 16)
PROMPTS_PER_STEP = (64, 128, 256)
ROLLOUTS_PER_PROMPT = (4.0, 8.0, 16.0)

DRIFT_PER_EPOCH = (0.0, 0.8)
DRIFT_SPREAD = (0.0, 0.4)
WALK = (0.0, 0.9)

OWN = (0.0, 4.0)
TRANSFER = (0.0, 0.8)
"""Learning; in every second scenario there is none."""


def random_scenario(seed: int) -> Scenario:
    """Return a scenario drawn uniformly from the ranges of this file; the same per seed."""
    rng = np.random.default_rng([seed, 0x5CE7A210])
    count = int(rng.integers(BANDS[0], BANDS[1] + 1))
    shares = rng.dirichlet(np.ones(count))
    shares[-1] = 1.0 - shares[:-1].sum()
    per_step = int(rng.choice(PROMPTS_PER_STEP))
    learns = bool(rng.random() < 0.5)
    return Scenario(
        name=f"random-{seed}",
        about="drawn at random",
        run=Run(
            prompts=per_step * int(rng.integers(STEPS_PER_EPOCH[0], STEPS_PER_EPOCH[1] + 1)),
            prompts_per_step=per_step,
            rollouts_per_prompt=float(rng.choice(ROLLOUTS_PER_PROMPT)),
            epochs=int(rng.integers(EPOCHS[0], EPOCHS[1] + 1)),
        ),
        band=tuple(_band(rng, float(share)) for share in shares),
        drift=Drift(
            per_epoch=_between(rng, DRIFT_PER_EPOCH),
            spread=_between(rng, DRIFT_SPREAD),
            walk=_between(rng, WALK),
        ),
        learning=Learning(
            own=_between(rng, OWN) if learns else 0.0,
            transfer=_between(rng, TRANSFER) if learns else 0.0,
        ),
    )


def _band(rng: np.random.Generator, share: float) -> Band:
    exact = [_between(rng, EXACT) if rng.random() < 0.5 else 0.0 for _ in range(2)]
    return Band(
        share=share,
        logit_mean=_between(rng, LOGIT_MEAN),
        logit_sd=_between(rng, LOGIT_SD),
        never=exact[0],
        always=exact[1],
    )


def _between(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return round(float(rng.uniform(*limits)), 3)

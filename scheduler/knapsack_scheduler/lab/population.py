"""Simulated prompts: what their success rates are, and how these move.

Every random number is a function of (seed, stream, step): Philox streams named by what
they are for. So whatever a policy asks, the numbers that others get stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray
from knapsack_scheduler.lab.scenario import Scenario

_PROMPTS, _ORDER, _WALK, _ROLLOUTS = range(4)

_BLOCK = 32
"""Rollouts of a prompt whose luck is drawn at once."""

BANDS = ("solved", "easy", "medium", "hard", "unsolved")
"""Of prompts by their true success rate at the time."""

BAND_EDGES = (0.02, 0.25, 0.75, 0.98)
"""Success rates between unsolved, hard, medium, easy and solved."""


@dataclass(frozen=True, slots=True)
class Population:
    """The prompts of a scenario at the start.

    Attributes:
        prompt_ids: [P].
        logits: of the success rates, float64[P]; infinite for rates of exactly 0 and 1.
        growth: of each logit per epoch, float64[P].
        tokens: mean completion tokens, float64[P].
    """

    prompt_ids: tuple[str, ...]
    logits: FloatArray
    growth: FloatArray
    tokens: FloatArray


def stream(seed: int, *purpose: int) -> np.random.Generator:
    """Return the random numbers of one purpose, such as one stream at one step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose)))


def draw_population(scenario: Scenario, seed: int) -> Population:
    """Return the prompts; bands have their exact shares, as far as these are whole."""
    rng = stream(seed, _PROMPTS)
    count = scenario.run.prompts
    logits, tokens = np.empty(count), np.empty(count)
    ends = np.rint(np.cumsum([band.share for band in scenario.band]) * count).astype(int)
    begin = 0
    for band, end in zip(scenario.band, ends, strict=True):
        size = end - begin
        drawn = rng.normal(band.logit_mean, band.logit_sd, size)
        never, always = round(band.never * size), round(band.always * size)
        drawn[:never] = -np.inf
        drawn[size - always :] = np.inf
        logits[begin:end] = drawn
        tokens[begin:end] = band.completion_tokens
        begin = end
    growth = rng.normal(scenario.drift.per_epoch, scenario.drift.spread, count)
    return Population(tuple(f"prompt-{k}" for k in range(count)), logits, growth, tokens)


def batches(scenario: Scenario, seed: int, epoch: int) -> IntArray:
    """Return the prompts of each step of an epoch, int64[steps, prompts_per_step]."""
    run = scenario.run
    order: IntArray = stream(seed, _ORDER, epoch).permutation(run.prompts)
    whole = run.steps_per_epoch * run.prompts_per_step
    return order[:whole].reshape(run.steps_per_epoch, run.prompts_per_step)


class Luck:
    """A number per rollout of a step, uniform in [0, 1), the same for every policy.

    Rollout j of the prompt at position i succeeds if its number is below the prompt's
    success rate. Numbers are drawn as far as somebody asks for them.
    """

    def __init__(self, seed: int, step: int, count: int) -> None:
        self._seed, self._step = seed, step
        self._numbers = np.empty((count, 0))

    def passed(self, rates: FloatArray, most: int) -> BoolArray:
        """Return whether each of the first ``most`` rollouts succeeds, bool[M, most]."""
        while self._numbers.shape[1] < most:
            block = self._numbers.shape[1] // _BLOCK
            more = stream(self._seed, _ROLLOUTS, self._step, block)
            new = more.random((self._numbers.shape[0], _BLOCK))
            self._numbers = np.concatenate([self._numbers, new], axis=1)
        return self._numbers[:, :most] < rates[:, None]


def drift(scenario: Scenario, population: Population, seed: int, step: int) -> FloatArray:
    """Return what every logit grows by after a step, whatever the policy did, float64[P]."""
    per_epoch = float(scenario.run.steps_per_epoch)
    growth = population.growth / per_epoch
    if scenario.drift.walk == 0.0:
        return growth
    deviation = scenario.drift.walk / math.sqrt(per_epoch)
    return growth + stream(seed, _WALK, step).normal(0.0, deviation, growth.shape)


def success_rates(logits: FloatArray) -> FloatArray:
    """Return 1 / (1 + exp(-logit))."""
    rates: FloatArray = 1.0 / (1.0 + np.exp(-logits))
    return rates


def information_gain(rates: FloatArray, effective: BoolArray) -> FloatArray:
    """Return what each group teaches: p (1-p)^2 where its rewards differ, float64[M]."""
    q = 1.0 - rates
    return np.where(effective, rates * q * q, 0.0)


def bands_of(rates: FloatArray) -> npt.NDArray[np.intp]:
    """Return the place in ``BANDS`` of each success rate."""
    return len(BANDS) - 1 - np.searchsorted(BAND_EDGES, rates, side="right")

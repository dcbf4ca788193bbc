"""A run in memory: a fold of its journal, and nothing else.

Prompts are rows of growable columns, found by their ids. Statistics are integer sums and
windows of visits, so they do not depend on the order in which reports arrived. A rewind
folds the journal anew without what it forgets; nothing is ever taken back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.allocations import (
    Counted,
    OpenAllocation,
    allocation_columns,
    allocations_of,
)
from knapsack_scheduler.core.aging import FEW_VISITS, Discounts, EvidenceOfAll
from knapsack_scheduler.core.bands import BANDS, BandArray, bands_of, population
from knapsack_scheduler.core.calibration import Calibration
from knapsack_scheduler.core.drift import PROMPTS as DRIFT_PROMPTS
from knapsack_scheduler.core.drift import Drift
from knapsack_scheduler.core.evidence import (
    IMPORT_STEP_OFFSET,
    GroupOutcomes,
    Visits,
    group_outcomes,
    merge_visits,
)
from knapsack_scheduler.core.paper import recent_outcomes
from knapsack_scheduler.core.policy import begun_groups, effective_chances
from knapsack_scheduler.core.posterior import (
    Prior,
    newest_drift,
    newest_prior,
    posterior,
    posterior_apart,
)
from knapsack_scheduler.core.problem import (
    Begun,
    Beliefs,
    FloatArray,
    IntArray,
    Posterior,
    tie_keys,
)
from knapsack_scheduler.core.rates import PROMPTS as PRIOR_PROMPTS
from knapsack_scheduler.core.recency import LastVisited
from knapsack_scheduler.core.rewardlevels import RewardLevels, counted_by_level, relevel
from knapsack_scheduler.facts import (
    AllocationExtended,
    AllocationMade,
    Fact,
    OutcomesImported,
    OutcomesReported,
    Rewards,
    Rewound,
)
from knapsack_scheduler.idorder import IdOrder
from knapsack_scheduler.journal.columns import (
    decode_text,
    encode_text,
    text_column,
)
from knapsack_scheduler.promptindex import PromptIndex
from knapsack_scheduler.runconfig import RunConfig

TOKEN_SHRINKAGE = 4
"""A prompt's mean length counts like this many rollouts of the run's mean length more."""


class RunState:
    """Everything that is known of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.discounts = Discounts(
            config.visit_discount, config.version_discount, config.evidence_cap
        )
        self._places = PromptIndex()
        self.allocations: dict[str, OpenAllocation] = {}
        self.last_step = -1
        self.last_policy_version = 0
        self.known_prompts = 0
        self.total_rollouts = 0
        self.total_successes = 0
        self.ignored_rollouts = 0
        self.reported_groups = 0
        self.effective_groups = 0
        self.reward_levels = RewardLevels.none_yet(config.success_threshold, config.reward_levels)
        self.calibration = Calibration.nothing()
        self._looked_up: tuple[tuple[str, ...], int, IntArray] = ((), 0, np.zeros(0, np.int64))
        self._visits = Visits()
        self._evidence = EvidenceOfAll()
        self._bands: BandArray = np.zeros(0, np.int8)
        self.population = np.zeros(len(BANDS), np.int64)
        self._visited = LastVisited(PRIOR_PROMPTS, twice=False)
        self._revisited = LastVisited(DRIFT_PROMPTS, twice=True)
        self._prior: Prior | None = Prior()
        self._drift: Drift | None = Drift()
        self._sums = np.zeros((_SUMS, 0), np.int64)
        self._keys = np.zeros(0, np.uint64)
        self._token_sum = 0
        self._token_rollouts = 0
        self._order = IdOrder()

    def fold(self, fact: Fact) -> Counted:
        """Take in what happened next; returns what it changed."""
        match fact:
            case AllocationMade():
                self._open(fact)
            case AllocationExtended():
                self._extend(fact)
            case OutcomesReported():
                counted = self._report(fact)
                self.reported_groups += counted.groups
                self.effective_groups += counted.effective_groups
                return counted
            case OutcomesImported():
                return self._import(fact)
            case Rewound():
                raise AssertionError("a rewind is a new fold of the journal")
        return Counted()

    @property
    def prompt_ids(self) -> list[str]:
        """The id of the prompt of each row."""
        return self._places.ids

    def rows_of(self, prompt_ids: tuple[str, ...]) -> IntArray:
        """Return the row of each prompt, int64[M]; -1 where there is none."""
        # A decision looks its batch up, and then its fold does.
        if prompt_ids is self._looked_up[0] and len(self.prompt_ids) == self._looked_up[1]:
            return self._looked_up[2].copy()
        rows = self._places.find(prompt_ids)
        self._looked_up = (prompt_ids, len(self.prompt_ids), rows)
        return rows.copy()

    def bands(self, rows: IntArray) -> BandArray:
        """Return the band of each position's prompt, see ``core.bands``; row -1 is unseen."""
        # The last element, which -1 would name, may be anything.
        return np.where(rows >= 0, self._bands[rows] if self._bands.size else 0, 0).astype(np.int8)

    def evidence_ages(self, rows: IntArray, step: int) -> IntArray:
        """Return the steps since each prompt's newest outcome; those without one are left out."""
        newest = self._sums[_LAST_STEP, rows[rows >= 0]]
        ages: IntArray = np.maximum(step - newest[newest >= 0], 0)
        return ages

    def beliefs(self, prompt_ids: tuple[str, ...], step: int) -> tuple[Beliefs, Prior]:
        """Return what is believed of each position's prompt, and the run's prior.

        Args:
            prompt_ids: of the batch.
            step: that is decided for; see ``core.posterior.posterior``.
        """
        rows = self.rows_of(prompt_ids)
        prior = self.prior()
        new = np.flatnonzero(rows < 0)
        if new.size:
            known = rows >= 0
            keys = np.zeros(rows.shape, np.uint64)
            keys[known] = self._keys[rows[known]]
            keys[new] = tie_keys([prompt_ids[k] for k in new])
            unseen = ~known
            unseen[known] = self._sums[_ROLLOUTS, rows[known]] == 0
        else:
            keys = self._keys.take(rows)
            unseen = self._sums[_ROLLOUTS].take(rows) == 0
        recent = recent_outcomes(self._visits, rows) if self.config.policy == "paper" else None
        believed = self._posterior(rows, step, prior)
        return Beliefs(believed, keys, unseen, self._expected_tokens(rows), recent), prior

    def _posterior(self, rows: IntArray, step: int | None, prior: Prior) -> Posterior:
        version, drift = self.last_policy_version, self.drift(prior)
        # Seldom was one of them seen at the step, or rewards have levels.
        apart = step is not None and self.last_step >= step
        apart = apart and bool((self._sums[_LAST_STEP, rows[rows >= 0]] >= step).any())
        if apart or self.reward_levels.plural:
            return posterior_apart(
                self._visits,
                rows,
                step,
                version,
                self.discounts,
                prior,
                self.reward_levels,
                drift,
            )
        evidence = self._evidence.of(rows, self._visits, self.discounts)
        return posterior(evidence, version, self.discounts, prior, drift)

    def prepare(self) -> None:
        """Work out what later decisions need, which only a report changes."""
        self.drift(self.prior())
        self._evidence.prepare(self._visits, self.discounts)

    def prior(self) -> Prior:
        """Return what is believed of a prompt of the run before it is seen."""
        if self._prior is None:
            rows = self._visited.newest(self._visits, self._keys)
            version = self.last_policy_version
            self._prior = newest_prior(self._visits, rows, version, self.discounts)
        return self._prior

    def drift(self, prior: Prior) -> Drift:
        """Return how success rates moved up to the newest visits; ``prior`` is the run's."""
        if self._drift is None:
            rows = self._revisited.newest(self._visits, self._keys)
            self._drift = newest_drift(self._visits, rows, self.discounts, prior)
        return self._drift

    def _expected_tokens(self, rows: IntArray) -> FloatArray:
        if self._token_rollouts == 0:
            return np.zeros(rows.shape)
        mean = self._token_sum / self._token_rollouts
        # Of a prompt never seen, row -1, there are none.
        known = rows >= 0
        tokens = self._sums[_TOKENS].take(rows) * known
        rollouts = self._sums[_TOKEN_ROLLOUTS].take(rows) * known
        expected: FloatArray = (tokens + TOKEN_SHRINKAGE * mean) / (rollouts + TOKEN_SHRINKAGE)
        return expected

    def _add_prompts(self, prompt_ids: tuple[str, ...]) -> IntArray:
        rows = self.rows_of(prompt_ids)
        if (rows >= 0).all():
            return rows
        new = list(dict.fromkeys(p for p, row in zip(prompt_ids, rows, strict=True) if row < 0))
        first = len(self.prompt_ids)
        self._places.add(new)
        size = len(self.prompt_ids)
        self._visits.grow(size)
        self._evidence.grow(size)
        if size > self._sums.shape[1]:
            capacity = max(size, self._sums.shape[1] * 5 // 4, 64)
            sums = np.zeros((_SUMS, capacity), np.int64)
            sums[_LAST_STEP] = -1
            sums[:, :first] = self._sums[:, :first]
            keys = np.zeros(capacity, np.uint64)
            keys[:first] = self._keys[:first]
            self._sums, self._keys = sums, keys
            self._bands = np.concatenate([self._bands[:first], np.zeros(capacity - first, np.int8)])
        self._keys[first:size] = tie_keys(new)
        self.population[0] += size - first
        return self.rows_of(prompt_ids)

    def _open(self, fact: AllocationMade) -> None:
        rows = self._add_prompts(fact.prompt_ids)
        count = rows.size
        chances = fact.chances
        if chances is None:
            believed = self._posterior(rows, fact.step, self.prior())
            chances = effective_chances(believed, Begun.nothing(count), fact.num_rollouts)
        allocation = OpenAllocation.made(
            fact.step, rows, fact.bounds, fact.budget, fact.num_rollouts
        )
        allocation.predict(fact.num_rollouts, chances)
        # One of the same name, of a call so old that its id is not recognised, may be here or
        # not, depending on when the journal was compacted.
        self.allocations.pop(fact.allocation_id, None)
        self.allocations[fact.allocation_id] = allocation
        self.last_step = max(self.last_step, fact.step)

    def _extend(self, fact: AllocationExtended) -> None:
        allocation = self.allocations[fact.allocation_id]
        chances = fact.chances
        if chances is None:
            rows = allocation.rows.astype(np.int64)
            prior = self.prior()
            believed = self._posterior(rows, allocation.step, prior)
            begun = begun_groups(allocation.outcomes(self.reward_levels), fact.keep_outstanding)
            chances = effective_chances(believed, begun, fact.num_rollouts)
        allocation.predict(fact.num_rollouts, chances, fact.keep_outstanding)
        allocation.allocated += fact.num_rollouts.astype(np.int32)
        allocation.wave += 1

    def _report(self, fact: OutcomesReported) -> Counted:
        if fact.ignored:
            self.ignored_rollouts += fact.rewards.rewards.size
            return Counted(ignored=fact.rewards.rewards.size)
        allocation = self.allocations.get(fact.allocation_id)
        if allocation is not None:
            rows = allocation.rows.astype(np.int64)
        else:
            rows = self._add_prompts(fact.prompt_ids)
        self.last_step = max(self.last_step, fact.step)
        self.last_policy_version = max(self.last_policy_version, fact.policy_version)
        outcomes = self._outcomes(fact.rewards, rows.size)
        self._learn(rows, outcomes, fact.rewards, fact.step, fact.policy_version)
        if allocation is not None:
            counted = allocation.deliver(outcomes)
            return self._judge(allocation, counted)
        mixed = outcomes.reward_min < outcomes.reward_max
        return Counted(
            accepted=int(outcomes.rollouts.sum()),
            groups=int(np.count_nonzero(outcomes.rollouts)),
            effective_groups=int(np.count_nonzero(mixed)),
            effective_rollouts=int(outcomes.rollouts[mixed].sum()),
        )

    def _judge(self, allocation: OpenAllocation, counted: Counted) -> Counted:
        """Compare what was predicted of groups that are now complete with what came."""
        complete = ~np.isnan(allocation.chance) & (allocation.delivered >= allocation.awaited)
        if not complete.any():
            return counted
        chance = allocation.chance[complete]
        effective = allocation.mixed[complete]
        rollouts = allocation.delivered[complete].astype(np.int64)
        judged = Calibration.of_groups(chance, rollouts, effective)
        self.calibration = self.calibration.plus(judged)
        allocation.chance[complete] = np.nan
        return replace(counted, judged=judged)

    def _import(self, fact: OutcomesImported) -> Counted:
        accepted = 0
        for part in fact.parts:
            rows = self._add_prompts(part.prompt_ids)
            outcomes = self._outcomes(part.rewards, rows.size)
            self._learn(rows, outcomes, part.rewards, part.step - IMPORT_STEP_OFFSET, 0)
            accepted += int(outcomes.rollouts.sum())
        return Counted(accepted=accepted)

    def _outcomes(self, rewards: Rewards, positions: int) -> GroupOutcomes:
        return group_outcomes(
            rewards.rewards, rewards.owner(), positions, self.config.success_threshold
        )

    def _learn(
        self,
        rows: IntArray,
        outcomes: GroupOutcomes,
        rewards: Rewards,
        step: int,
        policy_version: int,
    ) -> None:
        """Add the outcomes to the prompts' sums and windows."""
        some = outcomes.rollouts > 0
        unique, place = np.unique(rows[some], return_inverse=True)
        rollouts = np.zeros(unique.size, np.int64)
        successes = np.zeros(unique.size, np.int64)
        np.add.at(rollouts, place, outcomes.rollouts[some])
        np.add.at(successes, place, outcomes.successes[some])
        by_level = self._levelled(rewards, rows, unique)
        merge_visits(self._visits, unique, step, policy_version, rollouts, successes, by_level)
        self._evidence.visited(unique)
        self._evidence.prepare(self._visits, self.discounts, FEW_VISITS)
        for last in (self._visited, self._revisited):
            last.add(unique, step, self._visits, self._keys)
        self._prior = self._drift = None
        self._place(unique)
        sums = self._sums
        first = int(np.count_nonzero(sums[_ROLLOUTS, unique] == 0))
        if first:
            self.known_prompts += first
        sums[_ROLLOUTS, unique] += rollouts
        sums[_SUCCESSES, unique] += successes
        self.total_rollouts += int(rollouts.sum())
        self.total_successes += int(successes.sum())
        if step >= 0:
            old_step, old_version = sums[_LAST_STEP, unique], sums[_LAST_VERSION, unique]
            newer = (step > old_step) | ((step == old_step) & (policy_version > old_version))
            sums[_LAST_STEP, unique[newer]] = step
            sums[_LAST_VERSION, unique[newer]] = policy_version
        if rewards.tokens is not None:
            tokens = np.zeros(rows.size, np.int64)
            np.add.at(tokens, rewards.owner(), rewards.tokens)
            np.add.at(sums[_TOKENS], rows, tokens)
            np.add.at(sums[_TOKEN_ROLLOUTS], rows, outcomes.rollouts)
            self._token_sum += int(rewards.tokens.sum())
            self._token_rollouts += int(rewards.tokens.size)

    def _place(self, rows: IntArray) -> None:
        """Put prompts that were visited into their bands; no row twice."""
        bands = bands_of(self._visits, rows)
        self.population += population(bands) - population(self._bands[rows])
        self._bands[rows] = bands

    def _levelled(self, rewards: Rewards, rows: IntArray, unique: IntArray) -> IntArray | None:
        """Take in the levels of rewards; return rollouts by level of each of ``unique``."""
        levels = self.reward_levels.with_rewards(rewards.rewards)
        relevel(self._visits, self.reward_levels, levels)
        self.reward_levels = levels
        if self._visits.by_level is None:
            return None
        owner = np.searchsorted(unique, rows[rewards.owner()])
        level = levels.index(rewards.rewards)
        return counted_by_level(owner, level, unique.size, levels.values.size)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that there is to the state as columns, for ``from_columns``.

        A field that is not in here, in ``Visits`` or in ``_POSITION_COLUMNS`` is lost
        with the process.
        """
        return self.frozen()()

    def frozen(self) -> Callable[[], dict[str, npt.NDArray[Any]]]:
        """Return a function that makes ``columns()`` of the state as it is now, later on.

        What changes is copied here; what is only ever appended to is read there.
        """
        size, ids, keys = len(self.prompt_ids), self.prompt_ids, self._keys
        # Where nobody allocates, nobody else lets go of what was visited again since.
        self._visited.newest(self._visits, self._keys)
        self._revisited.newest(self._visits, self._keys)
        scalars = {name: getattr(self, name) for name in _SCALARS}
        scalars["levels_kept"] = self.reward_levels.kept
        copied = {
            "scalars": text_column(json.dumps(scalars)),
            "sums": self._sums[:, :size].copy(),
            "levels.values": self.reward_levels.values,
            "levels.rollouts": self.reward_levels.rollouts,
            **{
                f"calibration.{each.name}": getattr(self.calibration, each.name)
                for each in fields(Calibration)
            },
            **_named("visits", self._visits.columns()),
            **_named("visited", self._visited.columns()),
            **_named("revisited", self._revisited.columns()),
            **allocation_columns(self.allocations),
        }

        def columns() -> dict[str, npt.NDArray[Any]]:
            data, lengths = encode_text(ids[:size])
            named = {"prompt_ids": data, "prompt_id_lengths": lengths, "keys": keys[:size]}
            return {**copied, **named}

        return columns

    @classmethod
    def from_columns(cls, config: RunConfig, columns: Mapping[str, npt.NDArray[Any]]) -> RunState:
        """Return the state of ``columns()``."""
        state = cls(config)
        scalars = json.loads(columns["scalars"].tobytes())
        state.__dict__.update({name: scalars[name] for name in _SCALARS if name in scalars})
        state.reward_levels = RewardLevels(
            config.success_threshold,
            columns["levels.values"],
            columns["levels.rollouts"],
            scalars["levels_kept"],
        )
        state.calibration = Calibration(
            *(columns[f"calibration.{each.name}"] for each in fields(Calibration))
        )
        state._places.add(decode_text(columns["prompt_ids"], columns["prompt_id_lengths"]))
        state._sums, state._keys = columns["sums"], columns["keys"]
        state._visits = Visits.from_columns(_of_name("visits", columns))
        state._evidence.grow(len(state.prompt_ids))
        state._evidence.visited(np.arange(len(state.prompt_ids)))
        if "visited.rows" in columns:
            state._visited = LastVisited.from_columns(
                _of_name("visited", columns), PRIOR_PROMPTS, twice=False
            )
        else:
            # Of a scheduler whose prior had no need of it.
            state._visited = LastVisited.of(state._visits, PRIOR_PROMPTS)
        state._revisited = LastVisited.from_columns(
            _of_name("revisited", columns), DRIFT_PROMPTS, twice=True
        )
        state._prior = state._drift = None
        # Not stored: they are what the visits say.
        state._bands = bands_of(state._visits, np.arange(len(state.prompt_ids)))
        state.population = population(state._bands)
        state.allocations = allocations_of(columns)
        return state

    @property
    def unsorted(self) -> int:
        """How many prompts are not in the order of ids yet."""
        return len(self.prompt_ids) - self._order.rows.size

    def sort_ids(self) -> None:
        """Bring all prompts into the order of their ids, also while prompts are added."""
        self._order = self._order.extended(self.prompt_ids)

    def prompts_after(self, prompt_id: str, count: int) -> IntArray:
        """Return the rows of the first prompts with an outcome whose ids sort after one.

        Args:
            prompt_id: that one; empty for none.
            count: of prompts, at most.
        """
        self.sort_ids()
        start = self._order.after(self.prompt_ids, prompt_id)
        rows = self._order.rows[start:]
        seen = np.flatnonzero(self._sums[_ROLLOUTS, rows])[:count]
        return rows[seen].astype(np.int64)

    def stats_of(self, rows: IntArray) -> PromptColumns:
        """Return the statistics of prompts with an outcome."""
        prior = self.prior()
        believed = self._posterior(rows, None, prior)
        sums = self._sums[:, rows]
        with_tokens = np.maximum(sums[_TOKEN_ROLLOUTS], 1)
        return PromptColumns(
            sums[_ROLLOUTS],
            sums[_SUCCESSES],
            sums[_LAST_STEP],
            sums[_LAST_VERSION],
            believed.alpha,
            believed.beta,
            sums[_TOKENS] / with_tokens,
        )


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """Statistics of some prompts, parallel columns; see ListPromptStatsResponse."""

    total_rollouts: IntArray
    total_successes: IntArray
    last_step: IntArray
    last_policy_version: IntArray
    alpha: FloatArray
    beta: FloatArray
    mean_completion_tokens: FloatArray


_ROLLOUTS, _SUCCESSES, _LAST_STEP, _LAST_VERSION, _TOKENS, _TOKEN_ROLLOUTS, _SUMS = range(7)


_SCALARS = (
    "last_step",
    "last_policy_version",
    "known_prompts",
    "total_rollouts",
    "total_successes",
    "ignored_rollouts",
    "reported_groups",
    "effective_groups",
    "_token_sum",
    "_token_rollouts",
)


def _named(name: str, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {f"{name}.{each}": column for each, column in columns.items()}


def _of_name(name: str, columns: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    start = f"{name}."
    return {each.removeprefix(start): c for each, c in columns.items() if each.startswith(start)}

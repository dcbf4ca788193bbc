"""What the client takes and gives: allocations, runs, prompt statistics, settings."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from knapsack_trainer_client.errors import refused


@dataclass(frozen=True, slots=True)
class AllocationSummary:
    """Why an allocation is what it is, and what to expect of it.

    Expectations are for whole groups, all waves so far, under what was known at the
    time. A fallback allocation expects nothing: its rates and values are NaN.

    Attributes:
        policy: rule that decided.
        objective: what it maximised; empty for a fallback.
        effective_group_rate: expected share of groups whose rewards are not all equal.
        effective_rollout_rate: expected share of rollouts that lie in such groups.
        value: expected objective.
        uniform_value: expected objective of the same total divided uniformly.
        value_upper_bound: no allocation within bounds and budget has a higher value.
        price: objective of the last rollout given.
        unseen_prompts: positions whose prompt has no outcome yet.
        largest_group: rollouts of the largest group.
        prior_alpha, prior_beta: the Beta prior fitted to the run.
        expected_tokens: expected completion tokens; 0 if no tokens were reported yet.
    """

    policy: str
    objective: str = ""
    effective_group_rate: float = math.nan
    effective_rollout_rate: float = math.nan
    value: float = math.nan
    uniform_value: float = math.nan
    value_upper_bound: float = math.nan
    price: float = math.nan
    unseen_prompts: int = 0
    largest_group: int = 0
    prior_alpha: float = math.nan
    prior_beta: float = math.nan
    expected_tokens: float = math.nan


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many rollouts to generate now, by position of the batch.

    Attributes:
        num_rollouts: rollouts of this wave, one number per prompt.
        prompt_ids: the batch, in the order it was given.
        step: the trainer's step.
        wave: 1 for ``allocate``, one more for each ``extend``.
        allocated_rollouts: sum of ``num_rollouts``.
        remaining_rollouts: budget that ``extend`` can still spend.
        unallocated_rollouts: with ``allow_partial``, budget that the bounds could not
            hold; negative where the minimums needed more than the budget.
        is_fallback: the scheduler did not answer and the budget was divided uniformly.
        summary: reasons and expectations.
        allocation_id: the scheduler's name for it; empty for a fallback.
        run_id: the run.
        total_rollouts: the budget of all waves, as asked.
        rollouts_so_far: rollouts given to each prompt in all waves, lost ones too.
        min_rollouts, max_rollouts: the bounds as asked: none, one for all, one each.
    """

    num_rollouts: list[int]
    prompt_ids: tuple[str, ...] = field(repr=False)
    step: int
    wave: int
    allocated_rollouts: int
    remaining_rollouts: int
    unallocated_rollouts: int
    is_fallback: bool
    summary: AllocationSummary = field(repr=False)
    allocation_id: str
    run_id: str
    total_rollouts: int
    rollouts_so_far: tuple[int, ...] = field(repr=False)
    min_rollouts: tuple[int, ...] = field(repr=False, default=())
    max_rollouts: tuple[int, ...] = field(repr=False, default=())


@dataclass(frozen=True, slots=True)
class ReportReceipt:
    """What became of a report.

    Attributes:
        report_id: its name; reporting again under the same name changes nothing.
        delivered: False if it waits in the outbox.
        accepted_rollouts: rollouts the scheduler counted; 0 while it waits.
        ignored_rollouts: those that a rewind had forgotten, or their allocation.
    """

    report_id: str
    delivered: bool
    accepted_rollouts: int = 0
    ignored_rollouts: int = 0


@dataclass(frozen=True, slots=True)
class RunConfig:
    """How a run decides; fixed when the run is created.

    None leaves a choice to the scheduler's default, named here.

    Attributes:
        policy: "posterior" (default), "uniform", or "paper", the rule of the paper's
            release.
        objective: "paper" (default), "effective", "variance", or a rule of another paper:
            "deviation", "gvm", "hora", "coba" or "cero".
        success_threshold: a reward above it is a success; default 0.5.
        min_rollouts: fewest rollouts of a prompt where a request sets none; default 2.
        max_rollouts: most rollouts of a prompt where a request sets none; default 128.
        visit_discount: weight, in (0, 1], left to evidence per later visit; default 0.5.
        version_discount: the same per policy version; default 0.999.
        evidence_cap: most rollouts that a prompt's evidence may weigh; default 32.
        reward_levels: groups are judged by the different rewards of the run, up to 16 of
            them, and not by success and failure alone; default True.
    """

    policy: str | None = None
    objective: str | None = None
    success_threshold: float | None = None
    min_rollouts: int | None = None
    max_rollouts: int | None = None
    visit_discount: float | None = None
    version_discount: float | None = None
    evidence_cap: float | None = None
    reward_levels: bool | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often groups came out effective, against what was predicted.

    In each wave a prediction is made for every group that is given rollouts and is not
    effective already; it is judged when all of them have been reported.

    Attributes:
        groups: groups judged, by predicted chance: ten numbers, for chances from 0 to
            0.1, 0.1 to 0.2, .. 0.9 to 1.
        effective_groups: those that came out effective.
        predicted_effective_groups: the sum of their chances.
        rollouts, effective_rollouts, predicted_effective_rollouts: the same, counting
            the rollouts of the groups.
    """

    groups: tuple[int, ...] = ()
    effective_groups: tuple[int, ...] = ()
    predicted_effective_groups: tuple[float, ...] = ()
    rollouts: tuple[int, ...] = ()
    effective_rollouts: tuple[int, ...] = ()
    predicted_effective_rollouts: tuple[float, ...] = ()

    @property
    def effective_group_rate(self) -> float | None:
        """Share of the judged groups that are effective; None if none was judged."""
        return _rate(self.effective_groups, self.groups)

    @property
    def predicted_effective_group_rate(self) -> float | None:
        """The share that was predicted; None if no group was judged."""
        return _rate(self.predicted_effective_groups, self.groups)

    @property
    def effective_rollout_rate(self) -> float | None:
        """Share of their rollouts that lie in effective groups; None if there are none."""
        return _rate(self.effective_rollouts, self.rollouts)

    @property
    def predicted_effective_rollout_rate(self) -> float | None:
        """The share that was predicted; None if there are none."""
        return _rate(self.predicted_effective_rollouts, self.rollouts)


def _rate(part: Sequence[float], whole: Sequence[int]) -> float | None:
    return sum(part) / sum(whole) if sum(whole) else None


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its progress.

    Attributes:
        run_id: its name.
        config: how it decides, defaults filled in.
        create_time: when it was created, UTC; None if the scheduler did not say.
        last_step: highest step allocated or reported and not rewound; -1 if none.
        last_policy_version: highest version reported and not rewound; 0 if none.
        known_prompts: prompts with at least one outcome.
        total_rollouts: rollouts counted, imported ones among them.
        total_successes: those of them that were successes.
        rewinds: how often it was rewound.
        ignored_rollouts: rollouts reported after a rewind had forgotten them or their allocation.
        reward_levels: the different rewards seen, ascending; empty if none, too many or
            not asked for.
        calibration: predicted against realised effective groups.
        reported_groups: groups of which a rollout was reported.
        effective_groups: those of them whose rewards are not all equal.
    """

    run_id: str
    config: RunConfig
    create_time: datetime.datetime | None
    last_step: int
    last_policy_version: int
    known_prompts: int
    total_rollouts: int
    total_successes: int
    rewinds: int
    ignored_rollouts: int
    reward_levels: tuple[float, ...] = ()
    calibration: Calibration = field(default_factory=Calibration, repr=False)
    reported_groups: int = 0
    effective_groups: int = 0

    @property
    def is_known(self) -> bool:
        """Whether more than its name is known: False in a list if it could not be read."""
        return self.create_time is not None


@dataclass(frozen=True, slots=True)
class PromptStats:
    """What is known of one prompt.

    Attributes:
        prompt_id: the prompt.
        total_rollouts: rollouts reported, not discounted.
        total_successes: those of them that were successes.
        last_step: step of the newest outcome; -1 if all were imported.
        last_policy_version: policy version of the newest outcome.
        posterior_alpha, posterior_beta: Beta posterior of the success rate.
        mean_completion_tokens: mean length of completions of known length; 0 if none.
    """

    prompt_id: str
    total_rollouts: int
    total_successes: int
    last_step: int
    last_policy_version: int
    posterior_alpha: float
    posterior_beta: float
    mean_completion_tokens: float

    @property
    def success_rate(self) -> float:
        """Mean of the posterior, in (0, 1)."""
        return self.posterior_alpha / (self.posterior_alpha + self.posterior_beta)


@dataclass(frozen=True, slots=True)
class TLS:
    """How the connection is encrypted.

    Attributes:
        ca: path of the PEM file whose authorities are trusted; None: the system's.
        certificate: path of the client's PEM certificate chain, for mutual TLS.
        key: path of its private key. Both or neither.
        server_name: name to expect in the server's certificate, where it is not the
            host of the address.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse half a client identity."""
        if (self.certificate is None) != (self.key is None):
            raise refused("tls", self, "certificate and key must be given together")

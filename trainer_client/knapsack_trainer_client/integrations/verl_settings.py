"""verl's configuration -> what the budget needs of it, or a refusal that names the key.

Our own options are keys of ``trainer.v1.sampler.sampler_kwargs``, which verl leaves to
custom samplers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knapsack_trainer_client.arguments import check_config, check_int, check_timeout
from knapsack_trainer_client.errors import InvalidRequest, refused
from knapsack_trainer_client.nouns import RunConfig
from knapsack_trainer_client.sync import BudgetClient

OPTIONS = "trainer.v1.sampler.sampler_kwargs"
"""Where our options are in verl's configuration."""

TOKEN_VARIABLE = "KNAPSACK_RL_TOKEN"
"""Environment variable of the bearer token: verl prints and uploads its configuration."""

ESTIMATORS = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
    "reinforce_plus_plus_baseline",
)
"""Advantage estimators of verl 0.9 that take a group as it is, by its uid."""

_KNOWN = (
    "scheduler",
    "run_id",
    "min_rollouts",
    "max_rollouts",
    "timeout",
    "tls",
    "run_config",
    "groups_by_uid",
    "prompts_may_change",
)


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """verl's options about groups that are generated again, which custom samplers do not get.

    Attributes:
        metric: ``algorithm.filter_groups.metric`` where groups are filtered, else None.
        refill_failed: ``trainer.v1.sampler.sync_refill_failed_groups``.
        max_inflight_batches: ``algorithm.filter_groups.max_inflight_gen_batches``.
    """

    metric: str | None
    refill_failed: bool
    max_inflight_batches: int


@dataclass(frozen=True, slots=True)
class VerlSettings:
    """The budget's part of a configuration of verl.

    Attributes:
        scheduler: address; None for a scheduler within the trainer's process.
        store: file of that scheduler.
        run_id: name of the run.
        rollouts_per_prompt: ``rollout.n``, the mean of the groups.
        min_rollouts, max_rollouts: bounds of a group; max None for the run's.
        timeout: longest that a call waits for the scheduler, seconds.
        tls: whether the connection is encrypted, with the system's authorities.
        run_config: how the run decides; None for the scheduler's defaults.
        prompts_may_change: whether one prompt id may come with another text.
        train_batch_size: ``data.train_batch_size``, prompts.
        filter: groups that are generated again.
    """

    scheduler: str | None
    store: str
    run_id: str
    rollouts_per_prompt: int
    min_rollouts: int
    max_rollouts: int | None
    timeout: float
    tls: bool
    run_config: RunConfig | None
    prompts_may_change: bool
    train_batch_size: int
    filter: GroupFilter

    def client(self) -> BudgetClient:
        """Return a client of the run."""
        if self.scheduler is None:
            os.makedirs(os.path.dirname(self.store), exist_ok=True)
            return BudgetClient.embedded(
                self.store, self.run_id, timeout=self.timeout, config=self.run_config
            )
        return BudgetClient(
            self.scheduler,
            self.run_id,
            timeout=self.timeout,
            token=os.environ.get(TOKEN_VARIABLE) or None,
            tls=self.tls or None,
            config=self.run_config,
        )


def read_settings(config: Any) -> VerlSettings:
    """Return the settings in verl's configuration.

    Args:
        config: the whole of it, as ``AgentLoopManager`` gets it: nested mappings.

    Raises:
        InvalidRequest: an option of ours that is wrong or unknown, or one of verl's that
            unequal groups are wrong with; names the key.
    """
    options = dict(_at(config, OPTIONS) or {})
    for name in options:
        if name in ("wave_fraction", "waves"):
            raise refused(
                f"{OPTIONS}.{name}",
                options[name],
                "must be left out; verl generates once a step, so a step has one wave",
            )
        if name not in _KNOWN:
            raise refused(f"{OPTIONS}.{name}", options[name], f"must be one of {_KNOWN}")
    mean, low, high = _bounds(config, options)
    _check_trainer(config, options)
    return VerlSettings(
        scheduler=_address(options),
        store=os.path.join(str(_at(config, "trainer.default_local_dir") or "."), "knapsack.db"),
        run_id=str(options.get("run_id") or _run_id(config)),
        rollouts_per_prompt=mean,
        min_rollouts=low,
        max_rollouts=high,
        timeout=check_timeout(f"{OPTIONS}.timeout", options.get("timeout", 2.0)),
        tls=_flag(options, "tls"),
        run_config=_run_config(options),
        prompts_may_change=_flag(options, "prompts_may_change"),
        train_batch_size=check_int(
            "data.train_batch_size", _at(config, "data.train_batch_size"), 1
        ),
        filter=_filter(config, low),
    )


def _bounds(config: Any, options: Mapping[str, Any]) -> tuple[int, int, int | None]:
    key = "actor_rollout_ref.rollout.n"
    mean = check_int(key, _at(config, key))
    if mean < 2:
        raise refused(key, mean, "must be at least 2; it is the mean of the groups")
    low = check_int(f"{OPTIONS}.min_rollouts", options.get("min_rollouts", 2))
    if low == 1 or low > mean:
        raise refused(
            f"{OPTIONS}.min_rollouts",
            low,
            f"must be 0, to skip prompts, or from 2 to rollout.n = {mean}; the advantage of "
            "a group of one is its raw reward in verl",
        )
    high = options.get("max_rollouts")
    if high is not None:
        high = check_int(f"{OPTIONS}.max_rollouts", high, mean)
    return mean, low, high


def _check_trainer(config: Any, options: Mapping[str, Any]) -> None:
    """Refuse what unequal groups are not known to be right with."""
    if not _at(config, "trainer.use_v1"):
        raise refused(
            "trainer.use_v1",
            _at(config, "trainer.use_v1"),
            "must be true; the older trainer has one number for all prompts",
        )
    key = "algorithm.adv_estimator"
    estimator = str(getattr(_at(config, key), "value", _at(config, key)))
    if estimator not in ESTIMATORS and not _flag(options, "groups_by_uid"):
        raise refused(
            key,
            estimator,
            f"must be one of {', '.join(ESTIMATORS)}, whose baseline is the group's; for an "
            f"estimator of your own that groups rows by uid, set {OPTIONS}.groups_by_uid=true",
        )
    model = "reward.reward_model"
    if _at(config, f"{model}.enable") and not _at(config, f"{model}.enable_resource_pool"):
        raise refused(
            f"{model}.enable_resource_pool",
            False,
            "must be true with a reward model; one that shares the trainer's GPUs scores "
            "rollouts after they are sampled, when they can no longer be reported",
        )


def _filter(config: Any, low: int) -> GroupFilter:
    groups = "algorithm.filter_groups"
    enabled = bool(_at(config, f"{groups}.enable"))
    metric = _at(config, f"{groups}.metric")
    if enabled and not metric:
        raise refused(f"{groups}.metric", metric, "must be given where groups are filtered")
    if enabled and low == 0:
        raise refused(f"{OPTIONS}.min_rollouts", low, f"must be at least 2 with {groups}.enable")
    return GroupFilter(
        str(metric) if enabled else None,
        bool(_at(config, "trainer.v1.sampler.sync_refill_failed_groups")),
        check_int(
            f"{groups}.max_inflight_gen_batches",
            _at(config, f"{groups}.max_inflight_gen_batches") or 1,
            1,
        ),
    )


def _address(options: Mapping[str, Any]) -> str | None:
    address = options.get("scheduler")
    if address is None or (isinstance(address, str) and address):
        return address
    raise refused(f"{OPTIONS}.scheduler", address, 'must be an address such as "host:50051"')


def _run_id(config: Any) -> str:
    project, name = _at(config, "trainer.project_name"), _at(config, "trainer.experiment_name")
    if not project or not name:
        raise refused(
            f"{OPTIONS}.run_id", None, "must be given without project_name and experiment_name"
        )
    return f"{project}/{name}"


def _run_config(options: Mapping[str, Any]) -> RunConfig | None:
    values = options.get("run_config")
    try:
        return check_config(None if values is None else dict(values))
    except (InvalidRequest, TypeError, ValueError) as error:
        raise InvalidRequest(f"{OPTIONS}.run_config: {error}") from None


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise refused(f"{OPTIONS}.{name}", value, "must be true or false")
    return value


def _at(config: Any, path: str) -> Any:
    """Return the value at a dotted path; None where any part of it is missing."""
    for name in path.split("."):
        if config is None:
            return None
        config = config.get(name)
    return config

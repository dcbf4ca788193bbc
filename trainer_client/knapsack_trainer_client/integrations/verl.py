"""verl with a number of rollouts for each prompt, by configuration alone.

    python -m verl.trainer.main_ppo ... \
        +actor_rollout_ref.rollout.agent.agent_loop_manager_class=\
knapsack_trainer_client.integrations.verl.BudgetedAgentLoopManager \
        trainer.v1.sampler.custom_sampler.path=pkg://knapsack_trainer_client.integrations.verl \
        trainer.v1.sampler.custom_sampler.name=ReportingReplayBuffer \
        +trainer.v1.sampler.sampler_kwargs.scheduler=HOST:50051

The manager asks the scheduler and sets verl's own ``__rollout_n__`` of each prompt; the
replay buffer reports the rewards of every group that it samples, filters out or drops.
``rollout.n`` is the mean of the groups. For the v1 trainer of verl 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knapsack_trainer_client.errors import ExtraMissing, refused
from knapsack_trainer_client.integrations.verl_budget import VerlBudget
from knapsack_trainer_client.integrations.verl_groups import (
    FinishedGroup,
    group_metrics,
    lone_rollouts,
    surplus_rollouts,
)
from knapsack_trainer_client.integrations.verl_settings import VerlSettings, read_settings

try:
    import torch
    import transfer_queue
    import verl
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync
    from verl.utils import tensordict_utils

    from knapsack_trainer_client.integrations.verl_rewards import (
        IDENTITY,
        columns,
        final_keys,
        read_groups,
        read_identity,
        split_key,
    )
except ImportError as error:
    raise ExtraMissing(
        f"the verl integration needs verl 0.9 and more: pip install 'knapsack-rl[verl]' ({error})"
    ) from error

for _hook in ("_clear_groups", "_materialize_batch", "_validate_mode_config"):
    if not hasattr(ReplayBuffer, _hook):
        raise refused("verl", verl.__version__, f"must be 0.9; its ReplayBuffer has no {_hook}")

_MANAGER_KEY = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
_SAMPLER_KEY = "trainer.v1.sampler.custom_sampler"

_samplers: list[_Reporting] = []
"""The replay buffer of this process's trainer, which makes it before the manager."""


class BudgetedAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager of agent loops, with rollouts of training prompts as the scheduler says.

    Batches for validation are left alone. Needs ``ReportingReplayBuffer`` beside it.

    Raises:
        InvalidRequest: an option of ours or of verl's; names the key.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not _samplers:
            raise refused(
                f"{_SAMPLER_KEY}.name",
                config.trainer.v1.sampler.get("custom_sampler", {}).get("name"),
                f"must be ReportingReplayBuffer, and {_SAMPLER_KEY}.path must be "
                f"pkg://{__name__}: without it no reward is reported",
            )
        settings = read_settings(config)
        super().__init__(config, *args, **kwargs)
        self.budget = VerlBudget(settings)
        _samplers[-1].attach(self.budget)

    def generate_sequences(self, prompts: Any) -> None:
        """Dispatch a batch, after dividing it if it is for training.

        Raises:
            InvalidRequest: prompts without a name of their own.
        """
        if not tensordict_utils.get(prompts, "validate", False):
            prompts = self._divided(prompts)
        super().generate_sequences(prompts)

    def _divided(self, prompts: Any) -> Any:
        if "__rollout_n__" in prompts:
            raise refused(
                "__rollout_n__", "a column of the dataset", "must be left to the scheduler"
            )
        uids = columns(prompts, "uid")
        assert uids is not None
        named = {name: columns(prompts, name) for name in IDENTITY}
        sizes = self.budget.divide(
            uids,
            int(prompts["global_steps"]),
            named["raw_prompt"] or [],
            named["extra_info"],
            named["index"],
            named["data_source"],
        )
        # A copy: the trainer keeps its own batch for checkpoints, to be divided anew.
        divided = prompts.clone(recurse=False)
        divided["__rollout_n__"] = torch.tensor(sizes)
        return divided


class _Reporting:
    """What our replay buffers do beside verl's: report, and keep groups and batches sound."""

    partitions: Any
    refill_fn: Any
    trainer_mode: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._budget: VerlBudget | None = None
        self._metrics: dict[str, float] = {}
        # The trainer that made us; with it a wrong option is found before models are loaded.
        config = getattr(getattr(self.refill_fn, "__self__", None), "config", None)
        if config is not None:
            settings = read_settings(config)
            manager = config.actor_rollout_ref.rollout.get("agent", {}).get(
                "agent_loop_manager_class"
            )
            if not manager:
                raise refused(
                    _MANAGER_KEY,
                    manager,
                    f"must be {__name__}.BudgetedAgentLoopManager (or a subclass)",
                )
            self._adopt(settings)
        _samplers[:] = [self]

    def attach(self, budget: VerlBudget) -> None:
        """Report to this budget from now on, and filter groups as verl is configured to."""
        self._budget = budget
        self._adopt(budget.settings)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """Return verl's sample, and our metrics among its own."""
        self._metrics = {}
        batch, metrics = super().sample(*args, **kwargs)  # type: ignore[misc]
        return batch, {**metrics, **self._metrics}

    def _adopt(self, settings: VerlSettings) -> None:
        """Set what verl gives to its own replay buffers and not to custom ones."""
        options = settings.filter
        exact = options.metric is not None or options.refill_failed
        self.filter_groups_metric = options.metric
        self.sync_refill_failed_groups = options.refill_failed and self.trainer_mode == "sync"
        self.train_batch_size = settings.train_batch_size
        self.gen_batch_size = 1 if exact else settings.train_batch_size
        self.max_inflight_gen_batches = options.max_inflight_batches
        self._validate_mode_config()  # type: ignore[attr-defined]

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        """Report groups that verl filters out or drops, before it forgets them."""
        if partition_id == "train" and uids:
            self._settle(self.partitions[partition_id], uids)
        super()._clear_groups(partition_id, uids)  # type: ignore[misc]

    def _materialize_batch(
        self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, Any]
    ) -> Any:
        """Return the batch, its groups reported; none of one rollout, and no row too many."""
        if partition_id == "train":
            groups = self._settle(partition_snapshot, set(selected_prompt_uids))
            self._count(groups)
            usual = self._budget_of().settings.rollouts_per_prompt * len(selected_prompt_uids)
            partition_snapshot = self._trimmed(partition_snapshot, groups, usual)
        return super()._materialize_batch(  # type: ignore[misc]
            partition_id, selected_prompt_uids, partition_snapshot
        )

    def _budget_of(self) -> VerlBudget:
        if self._budget is None:
            raise refused(
                _MANAGER_KEY, None, f"must be {__name__}.BudgetedAgentLoopManager (or a subclass)"
            )
        return self._budget

    def _settle(self, tags: dict[str, Any], uids: set[str]) -> list[FinishedGroup]:
        budget = self._budget_of()
        groups = read_groups("train", tags, uids)
        strangers = [group for group in groups if group.uid not in budget.groups]
        if strangers:
            self._name(tags, strangers)
        budget.settle(uids, groups)
        return groups

    def _name(self, tags: dict[str, Any], groups: Sequence[FinishedGroup]) -> None:
        """Name the prompts of groups that a checkpoint brought back."""
        first = {split_key(key)[0]: key for key in final_keys(tags, {g.uid for g in groups})}
        named = read_identity("train", [first[group.uid] for group in groups])
        ids = self._budget_of().name(
            named["raw_prompt"] or [], named["extra_info"], named["index"], named["data_source"]
        )
        for group, prompt_id in zip(groups, ids, strict=True):
            group.prompt_id = prompt_id

    def _trimmed(
        self, tags: dict[str, Any], groups: Sequence[FinishedGroup], usual: int
    ) -> dict[str, Any]:
        """Leave out lone rollouts, and what is above the usual number of rollouts.

        Groups that were allocated together are not always sampled together: after a
        filter or in an asynchronous trainer. Rows beyond the usual number would be filled
        up with padding to one more mini-batch, which is one more optimizer step.
        """
        sessions = {group.uid: group.sessions for group in groups}
        lone = lone_rollouts(sessions)
        rest = {uid: numbers for uid, numbers in sessions.items() if len(numbers) > 1}
        surplus = surplus_rollouts(rest, usual)
        self._metrics["knapsack/lone_rollouts"] = float(len(lone))
        self._metrics["knapsack/surplus_rollouts"] = float(len(surplus))
        dropped = lone | surplus
        if not dropped:
            return tags
        left_out = {key for key in tags if split_key(key)[:2] in dropped}
        transfer_queue.kv_clear(partition_id="train", keys=list(left_out))
        return {key: tag for key, tag in tags.items() if key not in left_out}

    def _count(self, groups: Sequence[FinishedGroup]) -> None:
        self._metrics = {
            **group_metrics(groups),
            "knapsack/fallback": float(self._budget_of().is_fallback),
        }


class ReportingReplayBufferAsync(_Reporting, ReplayBufferAsync):
    """``ReportingReplayBuffer`` of the asynchronous trainers, which is made where one is due."""


class ReportingReplayBuffer(_Reporting, ReplayBuffer):
    """verl's replay buffer, which reports the rewards of every training group, once.

    The one name for all trainer modes. What verl's own replay buffers do is kept: the
    filter of groups (DAPO), replacement of failed groups, limits of staleness.

    Raises:
        InvalidRequest: an option of ours or of verl's; names the key.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the replay buffer that is right for ``trainer_mode``."""
        if kwargs.get("trainer_mode", "sync") != "sync" and cls is ReportingReplayBuffer:
            return ReportingReplayBufferAsync(*args, **kwargs)
        return super().__new__(cls)

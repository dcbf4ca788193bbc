"""The flags of the documentation are keys of verl's own configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.import_utils import load_class_from_fqn, load_extern_type

from knapsack_trainer_client import InvalidRequest
from knapsack_trainer_client.integrations import verl as integration
from knapsack_trainer_client.integrations.verl_settings import OPTIONS, read_settings

import tiny_verl

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "trainer_client/README.md").read_text(encoding="utf-8")


def documented() -> list[str]:
    """Return the arguments of the command in the README."""
    (command,) = re.findall(
        r"^```\n(python -m verl\.trainer\.main_ppo.*?)^```", README, re.M | re.S
    )
    words = shlex.split(command.replace("\\\n", " "))
    return [word for word in words[3:] if word != "..."]


def composed(*overrides: str) -> Any:
    """Return verl's configuration with overrides."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["algorithm.adv_estimator=grpo", *overrides])


def test_the_documented_flags_are_verls_keys() -> None:
    """The command is taken by verl, and loads our two classes by verl's own loaders."""
    more = ("actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=8")
    config = composed(*documented(), *more)

    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    manager = load_class_from_fqn(rollout.agent.agent_loop_manager_class)
    assert manager is integration.BudgetedAgentLoopManager
    assert issubclass(manager, AgentLoopManagerTQ)
    sampler = config.trainer.v1.sampler.custom_sampler
    assert load_extern_type(sampler.path, sampler.name) is integration.ReportingReplayBuffer
    settings = read_settings(config)
    assert settings.scheduler == "scheduler-host:50051"
    assert settings.max_rollouts == 64
    assert settings.run_id == "alice/exp1"


def test_a_flag_without_its_plus_is_refused_by_verl() -> None:
    """The plus signs of the documentation are needed: verl's file has not those keys."""
    for flag in documented():
        if flag.startswith("+"):
            with pytest.raises(ConfigCompositionException):
                composed(*(f.removeprefix("+") if f == flag else f for f in documented()))


def test_every_option_that_is_documented_is_taken() -> None:
    """The table of options names those that there are."""
    table = README[README.index("## verl") :]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    values = {
        "scheduler": "h:1",
        "run_id": "r",
        "min_rollouts": "2",
        "max_rollouts": "9",
        "timeout": "1.5",
        "tls": "true",
        "run_config": "{success_threshold: 0.0}",
        "groups_by_uid": "true",
        "prompts_may_change": "true",
    }
    assert set(rows) == set(values)

    flags = [f"+{OPTIONS}.{name}={value}" for name, value in values.items()]
    settings = read_settings(composed("actor_rollout_ref.rollout.n=8", *flags))

    assert settings.run_config is not None
    assert settings.run_config.success_threshold == 0.0
    assert (settings.timeout, settings.tls, settings.prompts_may_change) == (1.5, True, True)


def test_a_wrong_option_is_found_before_models_are_loaded(world: Any, tmp_path: Path) -> None:
    """The replay buffer is made first, so the trainer stops where it is made."""
    for override, key in (
        ("+trainer.v1.sampler.sampler_kwargs.max_rolouts=8", f"{OPTIONS}.max_rolouts"),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator"),
        ("actor_rollout_ref.rollout.n=1", "actor_rollout_ref.rollout.n"),
    ):
        config = tiny_verl.make_config(tmp_path, world.folder, "h:1", override)
        with pytest.raises(InvalidRequest) as caught:
            tiny_verl.SyncOnCpu(config)
        assert str(caught.value).startswith(key)


def test_one_half_of_the_flags_is_refused(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that is never told, or one that is never asked, stops the training by its key."""
    manager, path, name = tiny_verl.flags(None)
    reporting = tiny_verl.make_config(tmp_path, world.folder, None, path, name, budgeted=False)
    with pytest.raises(InvalidRequest, match="agent_loop_manager_class"):
        tiny_verl.SyncOnCpu(reporting)

    monkeypatch.setattr(integration, "_samplers", [])
    asking = tiny_verl.make_config(tmp_path, world.folder, None, manager, budgeted=False)
    trainer = tiny_verl.SyncOnCpu(asking)
    assert type(trainer.replay_buffer) is ReplayBuffer
    with pytest.raises(InvalidRequest, match=r"custom_sampler\.name"):
        integration.BudgetedAgentLoopManager(config=asking, llm_client=None)


def test_a_column_of_numbers_of_rollouts_is_refused(world: Any, tmp_path: Path) -> None:
    """A data set that sets __rollout_n__ itself would be overruled without a word."""
    config = tiny_verl.make_config(tmp_path, world.folder, None)
    rows = [{**row, "__rollout_n__": 3} for row in tiny_verl.rows(4)]
    tiny_verl.write_rows(tmp_path / "train.parquet", rows)
    trainer, manager = world.trainer(config)

    with pytest.raises(InvalidRequest, match="__rollout_n__"):
        trainer.fit(manager)


def test_verls_own_replay_buffer_is_kept_in_all_but_reports(world: Any, tmp_path: Path) -> None:
    """What verl gives to its own replay buffers and not to custom ones is ours as well."""
    options = (
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "algorithm.filter_groups.max_inflight_gen_batches=3",
        "trainer.v1.sampler.sync_refill_failed_groups=true",
    )
    for mode in ("sync", "colocate_async", "separate_async"):
        more = (*options, f"trainer.v1.trainer_mode={mode}")
        ours = tiny_verl.make_config(tmp_path, world.folder, "h:1", *more)
        plain = tiny_verl.make_config(tmp_path, world.folder, None, *more, budgeted=False)
        kind = tiny_verl.SyncOnCpu if mode == "sync" else tiny_verl.AsyncOnCpu
        made, theirs = kind(ours).replay_buffer, kind(plain).replay_buffer

        assert isinstance(made, type(theirs))
        for name in ("filter_groups_metric", "max_off_policy_threshold", "trainer_mode"):
            assert getattr(made, name) == getattr(theirs, name)
        if mode == "sync":
            for name in ("gen_batch_size", "max_inflight_gen_batches", "train_batch_size"):
                assert getattr(made, name) == getattr(theirs, name)
            assert made.sync_refill_failed_groups

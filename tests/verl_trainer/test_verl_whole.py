"""The whole loop, gradients and weights included: verl's FSDP engine and our server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cpu_engine
from tiny_verl import MEAN, SyncOnCpu, make_config, sizes


def test_verls_engine_trains_in_unequal_groups(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """Every step takes the loss of unequal groups, and generates with what it learned."""

    class Whole(SyncOnCpu):
        def _engine(self) -> Any:
            return cpu_engine.start_engine(self.config)

        def _weights(self) -> Any:
            return cpu_engine.HandedOver(self.actor_rollout_wg, tmp_path, world.generator)

    config = make_config(
        tmp_path,
        world.folder,
        scheduler.address,
        "trainer.total_training_steps=5",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.optim.lr=0.01",
        "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.model.use_remove_padding=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    )
    trainer, manager = world.trainer(config, Whole)
    trainer.fit(manager)

    # The weights of every step were served, and one of them is not another.
    assert len(trainer.checkpoint_manager.fingerprints) == 6
    assert len(set(trainer.checkpoint_manager.fingerprints)) > 2
    for seen in trainer.seen:
        assert (len(seen["uid"]), seen["padding"]) == (4 * MEAN, 0)
        # One update of the policy that generated: the mean over tokens of the advantages.
        tokens = zip(seen["advantages"], seen["lengths"], strict=True)
        loss = -sum(a * n for a, n in tokens) / sum(seen["lengths"])
        assert seen["metrics"]["actor/pg_loss"] == pytest.approx(loss, abs=1e-5)
        assert bool(seen["metrics"]["actor/grad_norm"]) == any(seen["advantages"])
    assert len({n for seen in trainer.seen[2:] for n in sizes(seen).values()}) > 1
    run = manager.budget.client.run()
    assert (run.total_rollouts, run.last_policy_version) == (5 * 4 * MEAN, 4)

"""The tracker decides what the service decides."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.core.problem import Budget
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.lab.arms import ARMS, Arm, find_arms
from knapsack_scheduler.lab.tracker import Tracker
from knapsack_scheduler.runconfig import RunConfig

PROMPTS, BATCH, STEPS, MEAN = 60, 20, 9, 6


def outcomes(
    rng: np.random.Generator, rates: np.ndarray, num_rollouts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return owner and reward of each rollout."""
    owner = np.repeat(np.arange(num_rollouts.size), num_rollouts)
    rewards = (rng.random(owner.size) < rates[owner]).astype(np.float32)
    return owner, rewards


@pytest.mark.parametrize("arm", [a for a in ARMS.values() if a.policy != "oracle"], ids=str)
async def test_every_decision_is_the_service_s(arm: Arm) -> None:
    """Over steps, waves, repeated prompts and lost rollouts the numbers are the same."""
    rng = np.random.default_rng(7)
    rates = np.clip(rng.normal(0.4, 0.5, PROMPTS), 0.0, 1.0)
    tracker = Tracker(RunConfig(policy=arm.policy, max_rollouts=40))
    total = BATCH * MEAN
    async with open_service("sqlite://") as service:
        config = pb.RunConfig(policy=arm.policy, max_rollouts=40)
        await service.create_run(pb.CreateRunRequest(run_id="r", config=config))
        for step in range(STEPS):
            rows = rng.integers(0, PROMPTS, BATCH)
            prompt_ids = tuple(f"prompt-{row}" for row in rows)
            name = ""
            for wave, fraction in enumerate(arm.wave_fractions):
                if wave == 0:
                    answer = await service.allocate(
                        pb.AllocateRequest(
                            run_id="r",
                            step=step,
                            request_id=f"{step}",
                            prompt_ids=prompt_ids,
                            total_rollouts=total,
                            wave_fraction=fraction,
                            waves=arm.planned_waves,
                        )
                    )
                    name = answer.allocation_id
                    budget = arm.budget(total)
                    decision = tracker.allocate(step, prompt_ids, tracker.bounds(BATCH), budget)
                else:
                    answer = await service.extend(
                        pb.ExtendRequest(
                            run_id="r",
                            allocation_id=name,
                            request_id=f"{step}-{wave}",
                            wave_fraction=fraction,
                        )
                    )
                    decision = tracker.extend(fraction)
                num_rollouts = decision.num_rollouts
                assert list(answer.num_rollouts) == num_rollouts.tolist()
                assert answer.summary.value == decision.reasons.value
                assert answer.remaining_rollouts == decision.remaining
                # Some rollouts of every third step are lost.
                came = num_rollouts - (num_rollouts > 3) * (step % 3 == 0)
                owner, rewards = outcomes(rng, rates[rows], came)
                await service.report(
                    pb.ReportRequest(
                        run_id="r",
                        allocation_id=name,
                        report_id=f"{step}-{wave}",
                        policy_version=step,
                        prompt_indices=np.flatnonzero(came).tolist(),
                        num_rewards=came[came > 0].tolist(),
                        rewards=rewards.tolist(),
                    )
                )
                tracker.report(owner, rewards, policy_version=step)
            if step % 4 == 3:
                # Rollouts that nobody allocated.
                owner, rewards = outcomes(rng, rates[rows], np.full(BATCH, 2))
                await service.report(
                    pb.ReportRequest(
                        run_id="r",
                        report_id=f"own-{step}",
                        step=step,
                        policy_version=step,
                        prompt_ids=prompt_ids,
                        prompt_indices=range(BATCH),
                        num_rewards=[2] * BATCH,
                        rewards=rewards.tolist(),
                    )
                )
                tracker.observe(step, prompt_ids, owner, rewards, policy_version=step)
        run = await service.get_run(pb.GetRunRequest(run_id="r"))
        assert list(run.calibration.groups) == tracker.state.calibration.groups.tolist()
        assert sum(run.calibration.groups) > 0
        predicted = tracker.state.calibration.predicted.tolist()
        assert list(run.calibration.predicted_effective_groups) == predicted


def test_planning_changes_nothing() -> None:
    """Asking what would be allocated leaves no trace."""
    tracker = Tracker(RunConfig())
    before = tracker.plan(0, ("a", "b"), tracker.bounds(2), Budget(8)).num_rollouts
    assert tracker.state.prompt_ids == []
    assert before.sum() == 8


def test_arms_are_found_by_name() -> None:
    """Each once, in the order asked for, with the objective; else the error says what there is."""
    found = find_arms(["posterior", "uniform", "posterior"], "variance")
    assert [(a.name, a.objective) for a in found] == [
        ("posterior", "variance"),
        ("uniform", "variance"),
    ]
    with pytest.raises(ValueError, match="posterior-2-waves"):
        find_arms(["nobody"])
    with pytest.raises(ValueError, match="objective = 'nothing'"):
        find_arms(["uniform"], "nothing")
    assert all(arm.planned_waves == 2 or sum(arm.waves) == 1.0 for arm in ARMS.values())

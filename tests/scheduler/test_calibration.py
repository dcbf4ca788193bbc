"""Predicted against realised effective groups, as a run keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.core.calibration import BINS, Calibration
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.service import SchedulerService


async def calibration(service: SchedulerService) -> pb.Calibration:
    """Return that of the run."""
    return (await service.get_run(pb.GetRunRequest(run_id="run"))).calibration


def test_sums_by_hand() -> None:
    """Each group is counted in the bin of its chance; chance 1 belongs to the last."""
    sums = Calibration.of_groups(
        np.array([0.05, 0.5, 1.0, 0.55], np.float32),
        np.array([2, 4, 8, 16]),
        np.array([False, True, True, False]),
    )
    assert sums.groups.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert sums.effective.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert sums.rollouts.tolist() == [2, 0, 0, 0, 0, 20, 0, 0, 0, 8]
    assert sums.effective_rollouts.tolist() == [0, 0, 0, 0, 0, 4, 0, 0, 0, 8]
    assert sums.predicted[[0, 5, 9]] == pytest.approx([0.05, 1.05, 1.0])
    assert sums.predicted_rollouts[[0, 5, 9]] == pytest.approx([0.1, 10.8, 8.0])


async def test_a_new_prompt_is_judged_by_the_prior(service: SchedulerService, calls) -> None:
    """Under Beta(1/2, 1/2) two rollouts differ with 1 - 2 * 3/8 = 1/4."""
    first = await service.allocate(calls.allocate(["a", "b"], 4))
    assert list((await calibration(service)).groups) == [0] * BINS
    await service.report(calls.report(first.allocation_id, [[0.0, 1.0], [1.0, 1.0]]))
    found = await calibration(service)
    assert list(found.groups) == [0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
    assert list(found.effective_groups) == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert found.predicted_effective_groups[2] == pytest.approx(0.5, abs=1e-6)
    assert list(found.rollouts)[2] == 4
    assert list(found.effective_rollouts)[2] == 2
    assert found.predicted_effective_rollouts[2] == pytest.approx(1.0, abs=1e-6)


async def test_groups_are_judged_when_they_are_whole(service: SchedulerService, calls) -> None:
    """Parts wait for the rest; a group whose rollouts were lost is not judged."""
    made = await service.allocate(calls.allocate(["a", "b"], 8))
    await service.report(calls.report(made.allocation_id, [[0.0], [0.0, 0.0, 0.0]]))
    assert sum((await calibration(service)).groups) == 0
    await service.report(calls.report(made.allocation_id, [[1.0, 1.0, 1.0]]))
    found = await calibration(service)
    assert sum(found.groups) == 1
    assert sum(found.effective_groups) == 1
    await service.report(calls.own_report(["a"], [[0.0, 1.0]]))
    assert await calibration(service) == found


async def test_each_wave_predicts_anew(service: SchedulerService, calls) -> None:
    """The second wave is judged on the groups that the first left unequal or not."""
    made = await service.allocate(calls.allocate(["a", "b"], 16, wave_fraction=0.5))
    await service.report(calls.report(made.allocation_id, [[0.0] * 4, [0.0, 1.0] * 2]))
    assert sum((await calibration(service)).groups) == 2
    second = await service.extend(calls.extend(made.allocation_id))
    assert list(second.num_rollouts) == [8, 0]
    await service.report(calls.report(made.allocation_id, [[0.0] * 7 + [1.0], []]))
    found = await calibration(service)
    assert sum(found.groups) == 3
    assert sum(found.effective_groups) == 2
    assert sum(found.rollouts) == 4 + 4 + 12


async def test_rollouts_still_running_are_awaited_too(service: SchedulerService, calls) -> None:
    """With keep_outstanding a group is judged when the first wave's rollouts have come as well."""
    made = await service.allocate(calls.allocate(["a", "b"], 16, wave_fraction=0.5))
    more = await service.extend(calls.extend(made.allocation_id, keep_outstanding=True))
    assert list(more.num_rollouts) == [4, 4]
    await service.report(calls.report(made.allocation_id, [[0.0] * 4] * 2))
    assert sum((await calibration(service)).groups) == 0
    await service.report(calls.report(made.allocation_id, [[1.0] * 4] * 2))
    found = await calibration(service)
    assert (sum(found.groups), sum(found.effective_groups), sum(found.rollouts)) == (2, 2, 16)


async def test_a_restarted_server_has_the_same(tmp_path: Path, calls) -> None:
    """What is folded from the journal is what was kept while it was written, to the bit."""
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    rng = np.random.default_rng(5)
    ids = [f"p{k}" for k in range(12)]
    rates = rng.random(12)

    def rewards(counts: list[int]) -> list[list[float]]:
        return [
            rng.choice([0.0, 0.4, 1.0], n, p=[1 - r, r / 2, r / 2]).tolist()
            for n, r in zip(counts, rates, strict=True)
        ]

    async with open_service(store) as service:
        for step in range(8):
            made = await service.allocate(calls.allocate(ids, 96, step, wave_fraction=0.5))
            report = calls.report(made.allocation_id, rewards(list(made.num_rollouts)))
            await service.report(report)
            keep = step % 2 == 1
            more = await service.extend(calls.extend(made.allocation_id, keep_outstanding=keep))
            await service.report(calls.report(made.allocation_id, rewards(list(more.num_rollouts))))
        before = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert sum(before.calibration.groups) > 96
    async with open_service(store) as service:
        assert await service.get_run(pb.GetRunRequest(run_id="run")) == before


async def test_predictions_are_right_on_average_where_the_posterior_is(
    service: SchedulerService, calls
) -> None:
    """Prompts that do not drift: predicted and realised differ by less than chance allows."""
    rng = np.random.default_rng(11)
    rates = rng.beta(0.7, 0.7, 400)
    config = pb.RunConfig(visit_discount=1.0, version_discount=1.0, evidence_cap=1e6)
    await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
    for step in range(24):
        at = rng.choice(400, 100, replace=False)
        ids = [f"p{k}" for k in at]
        made = await service.allocate(calls.allocate(ids, 800, step))
        rewards = [
            (rng.random(n) < rates[k]).astype(float).tolist()
            for n, k in zip(made.num_rollouts, at, strict=True)
        ]
        await service.report(calls.report(made.allocation_id, rewards, policy_version=step))
    found = await calibration(service)
    groups, predicted = np.array(found.groups), np.array(found.predicted_effective_groups)
    realised = np.array(found.effective_groups)
    assert groups.sum() == 2400
    spread = np.sqrt(np.maximum(predicted * (1 - predicted / np.maximum(groups, 1)), 1.0))
    assert (np.abs(realised - predicted) < 4.5 * spread).all(), (groups, predicted, realised)

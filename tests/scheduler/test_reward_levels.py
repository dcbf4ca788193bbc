"""Rewards of several levels through the service: what is kept, and what it changes."""

from __future__ import annotations

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.core.rewardlevels import MOST_LEVELS
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.service import SchedulerService


async def run(service: SchedulerService) -> pb.Run:
    """Return the run."""
    return await service.get_run(pb.GetRunRequest(run_id="run"))


async def test_the_different_rewards_are_listed(service: SchedulerService, calls) -> None:
    """Ascending, each once, 0 and -0 as one, imported ones among them; none when too many."""
    await service.report(calls.own_report(["a", "b"], [[0.5, -0.0], [1.0, 0.0]]))
    assert list((await run(service)).reward_levels) == [0.0, 0.5, 1.0]

    async def imported():
        yield pb.ImportOutcomesRequest(
            run_id="run", request_id="i", prompt_ids=["c"], num_rewards=[1], rewards=[0.25]
        )

    await service.import_outcomes(imported())
    assert list((await run(service)).reward_levels) == [0.0, 0.25, 0.5, 1.0]

    many = [k / 64 for k in range(MOST_LEVELS + 1)]
    await service.report(calls.own_report(["a"], [many]))
    assert list((await run(service)).reward_levels) == []
    await service.report(calls.own_report(["a"], [[1.0]]))
    assert list((await run(service)).reward_levels) == []


async def test_groups_of_different_failures_are_expected_to_be_effective(calls) -> None:
    """A prompt that fails in two ways is worth a pair, one that fails in one way is not."""
    predicted = {}
    for levels in (True, False):
        async with open_service("sqlite://") as service:
            config = pb.RunConfig(objective="effective", reward_levels=levels)
            await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
            for step in range(6):
                rewards = [[0.0, 0.25] * 8, [0.0] * 16]
                await service.report(calls.own_report(["two ways", "one way"], rewards, step))
            answer = await service.allocate(
                calls.allocate(["two ways", "one way"], 20, 6, min_rollouts=[2])
            )
            predicted[levels] = answer.summary.effective_group_rate
            counts = list(answer.num_rollouts)
            assert counts[1] > counts[0] if levels else counts == [10, 10]
    # One of the two groups is all but certain, or both are all but hopeless.
    assert predicted[True] > 0.5
    assert predicted[False] < 0.3


async def test_levels_that_come_later_divide_what_was_counted_before(calls) -> None:
    """A third reward, seen late, leaves the statistics as if it had been known at once."""
    rng = np.random.default_rng(1)
    first = [rng.choice([0.0, 1.0], 4).tolist() for _ in range(2)]
    later = [[0.3, 0.0, 1.0], [0.3]]
    answers = []
    for order in (0, 1):
        async with open_service("sqlite://") as service:
            for step in (order, 1 - order):
                rewards = [first, later][step]
                await service.report(
                    calls.own_report(["a", "b"], rewards, step, policy_version=step)
                )
            answer = await service.allocate(calls.allocate(["a", "b", "new"], 40, 2))
            answer.allocation_id = ""
            answers.append(answer)
    assert answers[0] == answers[1]


async def test_a_wave_knows_the_level_that_a_group_has(service: SchedulerService, calls) -> None:
    """After 0.25 alone a group still hopes for another reward; after 0 and 0.25 it does not."""
    for step in range(4):
        rewards = [[0.0, 0.25, 0.25, 0.0]] * 2
        await service.report(calls.own_report(["a", "b"], rewards, step))
    first = await service.allocate(calls.allocate(["a", "b"], 16, 4, wave_fraction=0.5))
    await service.report(calls.report(first.allocation_id, [[0.25] * 4, [0.0, 0.25] * 2]))
    second = await service.extend(calls.extend(first.allocation_id))
    assert list(second.num_rollouts) == [8, 0]
    # The mixed group is certain; the other had 0 in half of its rollouts before.
    assert second.summary.effective_group_rate > 0.75


async def test_switched_off_rewards_are_successes_and_failures(calls) -> None:
    """Without levels in the config none are listed."""
    async with open_service("sqlite://") as service:
        config = pb.RunConfig(reward_levels=False)
        await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
        await service.report(calls.own_report(["a"], [[0.0, 0.25, 1.0]]))
        assert list((await run(service)).reward_levels) == []

"""The same call again gives the same answer and changes nothing."""

from __future__ import annotations

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import AlreadyExists
from knapsack_scheduler.service import SchedulerService


async def snapshot(service: SchedulerService) -> tuple[bytes, bytes]:
    """Return all that can be read of the run."""
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
    return run.SerializeToString(), page.SerializeToString()


async def test_every_call_repeated_is_answered_the_same(tmp_path, calls) -> None:
    """Also after later calls changed what a new decision would be, and after a restart."""
    store = f"sqlite:///{tmp_path / 's.db'}"
    async with open_service(store) as service:
        allocate = calls.allocate(["a", "b", "c"], 24, wave_fraction=0.5)
        first = await service.allocate(allocate)
        rewards = [[float(k == 0) for k in range(n)] for n in first.num_rollouts]
        report = calls.report(first.allocation_id, rewards, policy_version=3)
        reported = await service.report(report)
        extend = calls.extend(first.allocation_id)
        second = await service.extend(extend)
        await service.report(calls.own_report(["a", "c"], [[0.0] * 9, [1.0] * 9], step=5))
        before = await snapshot(service)
        for _ in range(2):
            assert await service.allocate(allocate) == first
            assert await service.report(report) == reported
            assert await service.extend(extend) == second
        assert await snapshot(service) == before
    async with open_service(store) as service:
        assert await service.extend(extend) == second
        assert await service.report(report) == reported
        assert await service.allocate(allocate) == first
        assert await snapshot(service) == before


async def test_an_id_with_other_content_is_refused(service: SchedulerService, calls) -> None:
    """Ids name calls: the same id for another call is a mistake, and changes nothing."""
    first = await service.allocate(calls.allocate(request_id="x"))
    report = calls.report(first.allocation_id, [[1.0], [0.0]], report_id="x")
    await service.report(report)
    await service.extend(calls.extend(first.allocation_id, request_id="x"))
    before = await snapshot(service)
    with pytest.raises(AlreadyExists, match="request_id = 'x'"):
        await service.allocate(calls.allocate(request_id="x", total_rollouts=10))
    with pytest.raises(AlreadyExists, match="report_id = 'x'"):
        await service.report(calls.report(first.allocation_id, [[0.0], [0.0]], report_id="x"))
    with pytest.raises(AlreadyExists, match="request_id = 'x'"):
        await service.extend(calls.extend(first.allocation_id, "x", wave_fraction=0.3))
    assert await snapshot(service) == before


async def test_a_repeated_rewind_forgets_nothing_newer(service: SchedulerService, calls) -> None:
    """With an id a rewind happens once; without one it happens every time."""
    await service.report(calls.own_report(["a"], [[1.0]], step=1))
    await service.report(calls.own_report(["a"], [[1.0]], step=5))
    answer = await service.rewind_run(calls.rewind(1, request_id="back"))
    await service.report(calls.own_report(["a"], [[0.0]], step=2))
    assert await service.rewind_run(calls.rewind(1, request_id="back")) == answer
    assert (await service.get_run(pb.GetRunRequest(run_id="run"))).total_rollouts == 2
    await service.rewind_run(calls.rewind(1))
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert (run.total_rollouts, run.rewinds) == (1, 2)


async def test_ids_of_forgotten_steps_may_be_used_again(service: SchedulerService, calls) -> None:
    """A trainer that resumes and names its calls by step names them the same again."""
    for _ in range(2):
        allocation = await service.allocate(calls.allocate(step=6, request_id="step-6"))
        answer = await service.report(
            calls.report(allocation.allocation_id, [[1.0], [0.0]], report_id="step-6")
        )
        assert answer.accepted_rollouts == 2
        await service.rewind_run(calls.rewind(5))

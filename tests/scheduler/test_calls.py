"""What each call of the contract does when all is well."""

from __future__ import annotations

import pytest

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from knapsack_scheduler.service import SchedulerService


async def stats(service: SchedulerService, run_id: str = "run") -> dict[str, tuple[int, int]]:
    """Return (rollouts, successes) of every prompt."""
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id=run_id))
    return {
        p: (n, s)
        for p, n, s in zip(page.prompt_ids, page.total_rollouts, page.total_successes, strict=True)
    }


async def test_create_run_fills_in_defaults_and_repeats(service: SchedulerService) -> None:
    """Defaults are shown; the same config again is answered, with them spelled out or not."""
    made = await service.create_run(pb.CreateRunRequest(run_id="r"))
    assert (made.config.policy, made.config.objective) == ("posterior", "paper")
    assert (made.config.min_rollouts, made.config.max_rollouts) == (2, 128)
    assert made.config.success_threshold == 0.5
    assert (made.last_step, made.known_prompts) == (-1, 0)

    again = await service.create_run(pb.CreateRunRequest(run_id="r", config=made.config))
    assert again == made

    other = pb.RunConfig(max_rollouts=64)
    with pytest.raises(AlreadyExists, match=r"max_rollouts is 128, asked for 64"):
        await service.create_run(pb.CreateRunRequest(run_id="r", config=other))
    assert await service.get_run(pb.GetRunRequest(run_id="r")) == made


async def test_unknown_runs_are_not_found_unless_created_as_used(calls) -> None:
    """Every call on an unknown run is refused, and creates nothing, by default."""
    async with open_service("sqlite://", auto_create_runs=False) as strict:
        refused = [
            strict.get_run(pb.GetRunRequest(run_id="run")),
            strict.delete_run(pb.DeleteRunRequest(run_id="run")),
            strict.allocate(calls.allocate()),
            strict.extend(calls.extend("a-1")),
            strict.report(calls.report("a-1", [[1.0]])),
            strict.report(calls.own_report(["a"], [[1.0]])),
            strict.rewind_run(calls.rewind(3)),
            strict.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run")),
        ]
        for call in refused:
            with pytest.raises(NotFound, match="run 'run' does not exist"):
                await call
        assert not (await strict.list_runs(pb.ListRunsRequest())).runs

    async with open_service("sqlite://") as lenient:
        await lenient.allocate(calls.allocate())
        runs = (await lenient.list_runs(pb.ListRunsRequest())).runs
        assert [run.run_id for run in runs] == ["run"]
        # Reading creates nothing, nor does a report of an allocation that cannot exist.
        with pytest.raises(NotFound):
            await lenient.get_run(pb.GetRunRequest(run_id="other"))


async def test_runs_are_listed_in_pages(service: SchedulerService) -> None:
    """Pages follow each other in the order of names, none twice, none left out."""
    names = [f"run-{i:02d}" for i in range(7)]
    for name in reversed(names):
        await service.create_run(pb.CreateRunRequest(run_id=name))
    found, token = [], ""
    while True:
        page = await service.list_runs(pb.ListRunsRequest(page_size=3, page_token=token))
        assert len(page.runs) <= 3
        found += [run.run_id for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert found == names


async def test_a_deleted_run_is_gone_and_its_name_is_free(service: SchedulerService, calls) -> None:
    """Nothing of the old run shows in a new one of the same name, nor is its allocation known."""
    allocation = await service.allocate(calls.allocate(request_id="one"))
    await service.report(calls.report(allocation.allocation_id, [[1.0], [0.0]]))
    await service.delete_run(pb.DeleteRunRequest(run_id="run"))
    with pytest.raises(NotFound):
        await service.get_run(pb.GetRunRequest(run_id="run"))

    config = pb.RunConfig(objective="effective")
    await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
    assert await stats(service) == {}
    with pytest.raises(NotFound, match="allocation_id"):
        await service.report(calls.report(allocation.allocation_id, [[1.0], [0.0]]))


async def test_an_allocation_spends_the_budget_within_bounds(
    service: SchedulerService, calls
) -> None:
    """Positions answer in the order asked, the sum is the budget, bounds hold everywhere."""
    ids = [f"p{i}" for i in range(5)]
    low, high = [0, 1, 2, 3, 4], [4, 8, 16, 3, 128]
    answer = await service.allocate(
        calls.allocate(ids, 40, min_rollouts=low, max_rollouts=high, step=7)
    )
    assert sum(answer.num_rollouts) == answer.allocated_rollouts == 40
    assert all(a <= n <= b for a, n, b in zip(low, answer.num_rollouts, high, strict=True))
    assert (answer.step, answer.wave, answer.run_id) == (7, 1, "run")
    assert (answer.remaining_rollouts, answer.unallocated_rollouts) == (0, 0)
    assert answer.summary.unseen_prompts == 5
    assert answer.summary.largest_group == max(answer.num_rollouts)
    assert answer.summary.uniform_value <= answer.summary.value
    assert answer.summary.value <= answer.summary.value_upper_bound + 1e-12


async def test_rollouts_move_to_where_groups_are_mixed(service: SchedulerService, calls) -> None:
    """After reports, an always-solved prompt gets less than a sometimes-solved one."""
    ids = ["solved", "mixed", "never"]
    for step in range(3):
        allocation = await service.allocate(calls.allocate(ids, 24, step))
        solved, mixed, never = allocation.num_rollouts
        rewards = [[1.0] * solved, [float(k % 3 == 0) for k in range(mixed)], [0.0] * never]
        await service.report(calls.report(allocation.allocation_id, rewards, policy_version=step))
    solved, mixed, never = (await service.allocate(calls.allocate(ids, 24, 3))).num_rollouts
    assert solved < mixed
    assert solved < never


async def test_reports_in_parts_and_of_own_rollouts_are_counted(
    service: SchedulerService, calls
) -> None:
    """Parts add up per prompt; rollouts nobody allocated count the same."""
    allocation = await service.allocate(calls.allocate(["a", "b", "a"], 12))
    name = allocation.allocation_id
    part = await service.report(calls.report(name, [[1.0], [0.0, 0.0], [0.7]]))
    assert part.accepted_rollouts == 4
    await service.report(calls.report(name, [[0.0], [], []]))
    own = calls.own_report(["b", "c"], [[1.0], [0.5]], step=4, policy_version=9)
    assert (await service.report(own)).accepted_rollouts == 2

    assert await stats(service) == {"a": (3, 2), "b": (3, 1), "c": (1, 0)}
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert (run.last_step, run.last_policy_version, run.total_rollouts) == (4, 9, 7)
    assert (run.known_prompts, run.total_successes) == (3, 3)


async def test_waves_follow_what_was_seen(service: SchedulerService, calls) -> None:
    """The second wave goes to the group that is not mixed yet, and the sum is the budget."""
    ids = ["a", "b"]
    first = await service.allocate(calls.allocate(ids, 16, wave_fraction=0.5))
    assert (first.allocated_rollouts, first.remaining_rollouts, first.wave) == (8, 8, 1)
    with pytest.raises(FailedPrecondition, match="nothing was reported"):
        await service.extend(calls.extend(first.allocation_id))
    a, b = first.num_rollouts
    mixed, failed = [1.0] + [0.0] * (a - 1), [0.0] * b
    await service.report(calls.report(first.allocation_id, [mixed, failed]))

    second = await service.extend(calls.extend(first.allocation_id))
    assert second.allocation_id == first.allocation_id
    assert (second.wave, second.remaining_rollouts) == (2, 0)
    assert list(second.num_rollouts) == [0, 8]
    await service.report(calls.report(first.allocation_id, [[], [0.0] * 8]))
    assert await stats(service) == {"a": (a, 1), "b": (b + 8, 0)}


async def test_a_planned_first_wave_leaves_room_for_the_second(
    service: SchedulerService, calls
) -> None:
    """With waves = 2 the scheduler says how much comes first; Extend spends the rest."""
    ids = [f"p{k}" for k in range(40)]
    request = calls.allocate(ids, 320, waves=2)
    first = await service.allocate(request)
    assert 2 * 40 <= first.allocated_rollouts < 320
    assert first.remaining_rollouts == 320 - first.allocated_rollouts
    assert await service.allocate(request) == first
    rewards = [[0.0] * n for n in first.num_rollouts]
    await service.report(calls.report(first.allocation_id, rewards))
    second = await service.extend(calls.extend(first.allocation_id))
    assert second.allocated_rollouts == first.remaining_rollouts


async def test_lost_rollouts_are_given_again_unless_they_are_still_running(
    service: SchedulerService, calls
) -> None:
    """What was not reported by Extend is lost and replaced; keep_outstanding says otherwise."""
    ids = ["a", "b"]
    allocation = await service.allocate(calls.allocate(ids, 8, request_id="whole"))
    a, b = allocation.num_rollouts
    await service.report(calls.report(allocation.allocation_id, [[1.0] * (a - 1), [0.0] * b]))
    kept = await service.extend(calls.extend(allocation.allocation_id, keep_outstanding=True))
    assert kept.allocated_rollouts == 0
    again = await service.extend(calls.extend(allocation.allocation_id))
    assert again.allocated_rollouts == 1


async def test_infeasible_budgets_give_the_closest_total_if_asked(
    service: SchedulerService, calls
) -> None:
    """Too much leaves the rest unallocated, too little gives the minimums."""
    more = {"max_rollouts": [4], "allow_partial": True}
    much = await service.allocate(calls.allocate(total_rollouts=20, **more))
    assert list(much.num_rollouts) == [4, 4]
    assert much.unallocated_rollouts == 12
    little = await service.allocate(calls.allocate(total_rollouts=3, **more))
    assert list(little.num_rollouts) == [2, 2]
    assert little.unallocated_rollouts == -1


async def test_a_token_budget_holds_once_lengths_are_known(
    service: SchedulerService, calls
) -> None:
    """Expected tokens stay below the budget, learned from the reported lengths."""
    ids = ["short", "long"]
    allocation = await service.allocate(calls.allocate(ids, 16))
    short, long = allocation.num_rollouts
    report = calls.report(
        allocation.allocation_id,
        [[float(k % 2) for k in range(short)], [float(k % 2) for k in range(long)]],
        completion_tokens=[10] * short + [400] * long,
    )
    await service.report(report)
    answer = await service.allocate(calls.allocate(ids, 0, step=1, total_tokens=3000))
    assert 0 < answer.summary.expected_tokens <= 3000
    assert answer.num_rollouts[0] > answer.num_rollouts[1]


async def test_rewind_forgets_later_steps_and_ignores_their_reports(
    service: SchedulerService, calls
) -> None:
    """What is later is gone; its late reports are recognised, counted and not learned from."""
    first = await service.allocate(calls.allocate(step=1))
    await service.report(calls.report(first.allocation_id, [[1.0], [0.0]], policy_version=1))
    later = await service.allocate(calls.allocate(step=2))
    await service.report(calls.report(later.allocation_id, [[1.0, 1.0], [1.0]], policy_version=2))
    before = await stats(service)

    run = await service.rewind_run(calls.rewind(1))
    assert (run.last_step, run.last_policy_version, run.total_rollouts) == (1, 1, 2)
    assert run.rewinds == 1
    assert await stats(service) == {"a": (1, 1), "b": (1, 0)} != before
    late = await service.report(calls.report(later.allocation_id, [[0.0], []]))
    assert (late.accepted_rollouts, late.ignored_rollouts) == (0, 1)
    with pytest.raises(NotFound, match="forgotten by a rewind"):
        await service.extend(calls.extend(later.allocation_id))
    # Late reports of what was kept still count.
    await service.report(calls.report(first.allocation_id, [[], [1.0]]))
    assert await stats(service) == {"a": (1, 1), "b": (2, 1)}
    assert (await service.get_run(pb.GetRunRequest(run_id="run"))).ignored_rollouts == 1


async def test_a_forgotten_report_that_arrives_again_is_ignored(tmp_path, calls) -> None:
    """And counted as such, once, also one that was of no allocation, and after a restart.

    A new one of its id counts, before and after.
    """
    store = f"sqlite:///{tmp_path / 's.db'}"
    report = calls.own_report(["a"], [[1.0, 0.0]], step=5, report_id="x", policy_version=9)
    async with open_service(store) as service:
        await service.report(calls.own_report(["a"], [[1.0]], step=1))
        assert (await service.report(report)).accepted_rollouts == 2
        await service.rewind_run(calls.rewind(3))
        answers = [await service.report(report) for _ in range(2)]
    async with open_service(store) as service:
        answers.append(await service.report(report))
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
        assert {(a.accepted_rollouts, a.ignored_rollouts) for a in answers} == {(0, 2)}
        assert (run.last_step, run.last_policy_version, run.total_rollouts) == (1, 0, 1)
        assert run.ignored_rollouts == 2
        other = calls.own_report(["a"], [[1.0, 1.0]], step=5, report_id="x", policy_version=9)
        assert (await service.report(other)).accepted_rollouts == 2
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
        assert (run.last_step, run.total_rollouts) == (5, 3)
        assert (await service.report(report)).ignored_rollouts == 2
        # Done anew with the same outcomes it is a report as any other, sent twice or not.
        await service.rewind_run(calls.rewind(3))
        assert (await service.report(other)).ignored_rollouts == 2
        run = await service.get_run(pb.GetRunRequest(run_id="run"))
        assert (run.total_rollouts, run.ignored_rollouts) == (1, 4)


@pytest.mark.parametrize("late_first", [True, False])
async def test_a_late_report_takes_no_id_from_the_step_done_anew(
    service: SchedulerService, calls, late_first: bool
) -> None:
    """A trainer may name its reports by step: that of the abandoned step is ignored, the other is
    counted, whichever comes first."""
    lost = await service.allocate(calls.allocate(step=7, request_id="step-7"))
    await service.rewind_run(calls.rewind(5))
    anew = await service.allocate(calls.allocate(step=7, request_id="step-7"))
    late = calls.report(lost.allocation_id, [[1.0], [0.0]], "step-7", policy_version=9)
    real = calls.report(anew.allocation_id, [[1.0], [0.0, 0.0]], "step-7")
    answers = {}
    for report in [late, real, late, real] if late_first else [real, late, real, late]:
        answer = await service.report(report)
        assert answers.setdefault(report.allocation_id, answer) == answer
    assert answers[lost.allocation_id] == pb.ReportResponse(ignored_rollouts=2)
    assert answers[anew.allocation_id] == pb.ReportResponse(accepted_rollouts=3)
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert (run.total_rollouts, run.ignored_rollouts, run.last_policy_version) == (3, 2, 0)


async def test_an_empty_first_wave_can_be_extended(service: SchedulerService, calls) -> None:
    """Where prompts may be skipped a small share can be nobody's; the rest is not lost."""
    request = calls.allocate(list("abcd"), 20, min_rollouts=[0], wave_fraction=0.001)
    first = await service.allocate(request)
    assert (first.allocated_rollouts, first.remaining_rollouts) == (0, 20)
    assert (await service.extend(calls.extend(first.allocation_id))).allocated_rollouts == 20


async def test_no_group_of_one_unless_it_is_asked_for(service: SchedulerService, calls) -> None:
    """A prompt that may be skipped and may have one rollout gets none."""
    request = calls.allocate(list("abc"), 8, min_rollouts=[0, 2, 1], max_rollouts=[1, 6, 1])
    with pytest.raises(InvalidArgument, match=r"from 3, .* to 7"):
        await service.allocate(request)
    request = calls.allocate(list("abc"), 7, min_rollouts=[0, 2, 1], max_rollouts=[1, 6, 1])
    assert list((await service.allocate(request)).num_rollouts) == [0, 6, 1]


async def test_pages_of_long_ids_fit_into_a_message(service: SchedulerService, calls) -> None:
    """They hold fewer prompts than asked for, and every prompt is on one of them."""
    ids = [f"{i:05d}" + "\N{SNOWMAN}" * 1019 for i in range(12_000)]
    await service.report(calls.own_report(ids, [[1.0]] * len(ids)))
    found, token = [], ""
    while not found or token:
        page = await service.list_prompt_stats(
            pb.ListPromptStatsRequest(run_id="run", page_size=100_000, page_token=token)
        )
        assert page.ByteSize() < 64 * 2**20
        found += page.prompt_ids
        token = page.next_page_token
    assert found == ids


async def test_imported_outcomes_are_older_than_the_run_and_never_rewound(
    service: SchedulerService, calls
) -> None:
    """A warm start informs the first allocation and outlives every rewind."""

    async def stream():
        yield pb.ImportOutcomesRequest(
            run_id="run", request_id="import", step=3, prompt_ids=["a", "b"],
            num_rewards=[2, 3], rewards=[1.0, 1.0, 0.0, 1.0, 0.0],
        )  # fmt: skip
        yield pb.ImportOutcomesRequest(
            step=4, prompt_ids=["a"], num_rewards=[1], rewards=[0.0], completion_tokens=[5]
        )

    answer = await service.import_outcomes(stream())
    assert (answer.imported_rollouts, answer.imported_prompts) == (6, 2)
    assert await service.import_outcomes(stream()) == answer
    await service.report(calls.own_report(["a"], [[1.0]], step=0))
    await service.rewind_run(calls.rewind(-1))
    assert await stats(service) == {"a": (3, 2), "b": (3, 1)}
    page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
    assert list(page.last_step) == [-1, -1]
    assert page.mean_completion_tokens[0] == 5
    assert (await service.allocate(calls.allocate())).summary.unseen_prompts == 0


async def test_prompt_stats_come_in_pages_ordered_by_id(service: SchedulerService, calls) -> None:
    """Every prompt with an outcome is on one page; those only allocated are on none."""
    ids = [f"p{i:03d}" for i in range(25)]
    await service.report(calls.own_report(ids[::-1], [[1.0]] * 25))
    await service.allocate(calls.allocate(["only allocated"], 4))
    found, token, pages = [], "", 0
    while True:
        page = await service.list_prompt_stats(
            pb.ListPromptStatsRequest(run_id="run", page_size=10, page_token=token)
        )
        found += page.prompt_ids
        assert len(page.posterior_alpha) == len(page.prompt_ids)
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert found == ids
    assert pages == 3


async def test_the_uniform_policy_is_uniform(service: SchedulerService, calls) -> None:
    """It divides evenly whatever is known."""
    config = pb.RunConfig(policy="uniform")
    await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
    await service.report(calls.own_report(["a", "b"], [[1.0] * 8, [1.0, 0.0]]))
    answer = await service.allocate(calls.allocate(["a", "b", "c"], 25))
    assert sorted(answer.num_rollouts) == [8, 8, 9]
    assert answer.summary.policy == "uniform"


async def test_the_paper_policy_divides_by_newest_rewards(service: SchedulerService, calls) -> None:
    """It is one of the policies of a run, and says what it does not know."""
    await service.create_run(pb.CreateRunRequest(run_id="run", config=pb.RunConfig(policy="paper")))
    ids = ["solved", "mixed", "never", "unseen"]
    rewards = [[1.0] * 16, [1.0, 0.0] * 8, [0.0] * 16]
    await service.report(calls.own_report(ids[:3], rewards))
    answer = await service.allocate(calls.allocate(ids, 40))
    assert list(answer.num_rollouts) == [2, 5, 23, 10]
    assert answer.summary.policy == "paper"
    for more, field in (
        ({"wave_fraction": 0.5}, "wave_fraction"),
        ({"waves": 2}, "waves"),
        ({"total_tokens": 900}, "total_tokens"),
        ({"min_rollouts": [0]}, "min_rollouts"),
    ):
        with pytest.raises(InvalidArgument, match=f'{field}.* with policy "paper"'):
            await service.allocate(calls.allocate(ids, 40, **more))
    await service.report(calls.report(answer.allocation_id, [[1.0], [0.0], [], []]))
    extended = await service.extend(calls.extend(answer.allocation_id))
    assert extended.allocated_rollouts == 38

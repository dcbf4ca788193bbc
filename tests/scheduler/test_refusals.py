"""Every malformed request is refused, by name, and leaves everything as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import AlreadyExists, InvalidArgument, NotFound
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.service import SchedulerService

NAN, INF = math.nan, math.inf

CREATE = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"run_id": "r" * 257}, "run_id", "at most 256"),
    ({"run_id": "a\nb"}, "run_id", "control"),
    ({"run_id": "a\x85b"}, "run_id", "control"),
    ({"run_id": "r" * 300}, "run_id", "(300 characters)"),
    ({"config": {"policy": "best"}}, "config.policy", "posterior, uniform, paper"),
    ({"config": {"objective": "x"}}, "config.objective", "paper"),
    ({"config": {"policy": "paper", "objective": "hora"}}, "config.objective", '"paper"'),
    ({"config": {"success_threshold": NAN}}, "config.success_threshold", "finite"),
    ({"config": {"min_rollouts": -1}}, "config.min_rollouts", "from 0"),
    ({"config": {"max_rollouts": 0}}, "config.max_rollouts", "from 1"),
    ({"config": {"min_rollouts": 9, "max_rollouts": 8}}, "config.min_rollouts", "at most"),
    ({"config": {"visit_discount": 0.0}}, "config.visit_discount", "above 0"),
    ({"config": {"version_discount": 1.5}}, "config.version_discount", "at most 1"),
    ({"config": {"evidence_cap": 0.0}}, "config.evidence_cap", "above 0"),
    ({"config": {"evidence_cap": INF}}, "config.evidence_cap", "finite"),
]
ALLOCATE = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"request_id": ""}, "request_id", "is required"),
    ({"request_id": "x" * 257}, "request_id", "at most 256"),
    ({"step": -1}, "step", "from 0"),
    ({"prompt_ids": []}, "prompt_ids", "at least one"),
    ({"prompt_ids": ["a", ""]}, "prompt_ids[1]", "not be empty"),
    ({"prompt_ids": ["a", "b" * 1025]}, "prompt_ids[1]", "at most 1024"),
    ({"total_rollouts": 0}, "total_rollouts", "above 0"),
    ({"total_rollouts": -5}, "total_rollouts", "from 0"),
    ({"total_rollouts": 2**40}, "total_rollouts", "from 0"),
    ({"total_tokens": -1}, "total_tokens", "from 0"),
    ({"total_rollouts": 0, "total_tokens": 100}, "total_tokens", "completion_tokens"),
    ({"wave_fraction": -0.1}, "wave_fraction", "from 0 to 1"),
    ({"wave_fraction": 1.1}, "wave_fraction", "from 0 to 1"),
    ({"wave_fraction": NAN}, "wave_fraction", "from 0 to 1"),
    ({"waves": 3}, "waves", "from 0 to 2"),
    ({"waves": -1}, "waves", "from 0 to 2"),
    ({"waves": 2, "wave_fraction": 0.5}, "wave_fraction", "must be 0 with waves = 2"),
    ({"min_rollouts": [1, 2, 3]}, "min_rollouts", "one per prompt (2)"),
    ({"max_rollouts": [1, 2, 3]}, "max_rollouts", "one per prompt (2)"),
    ({"min_rollouts": [-1]}, "min_rollouts[0]", "0 or more"),
    ({"max_rollouts": [4, 0]}, "max_rollouts[1]", "1 or more"),
    ({"min_rollouts": [2, 5], "max_rollouts": [4]}, "min_rollouts[1]", "at most max_rollouts"),
    ({"total_rollouts": 3}, "total_rollouts", "4"),
    ({"min_rollouts": [10**7], "max_rollouts": [10**7]}, "min_rollouts[0]", "at most 100000"),
    ({"min_rollouts": [0], "max_rollouts": [1], "total_rollouts": 2}, "total_rollouts", "to 0"),
    ({"total_rollouts": 300}, "total_rollouts", "256"),
]
REPORT = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"report_id": ""}, "report_id", "is required"),
    ({"policy_version": -1}, "policy_version", "from 0"),
    ({"step": -1}, "step", "from 0"),
    ({"step": 9}, "step", "must be the allocation's, 3"),
    ({"prompt_ids": ["a", "b"]}, "prompt_ids", "must be empty"),
    ({"prompt_indices": [0]}, "num_rewards", "one for each of prompt_indices (1)"),
    ({"prompt_indices": [0, 2]}, "prompt_indices[1]", "from 0 to 1"),
    ({"prompt_indices": [0, -1]}, "prompt_indices[1]", "from 0"),
    ({"num_rewards": [1, 2]}, "num_rewards", "number of rewards (2)"),
    ({"num_rewards": [3, -1]}, "num_rewards[1]", "0 or more"),
    ({"num_rewards": [2**31 - 1] * 2}, "num_rewards", "number of rewards (2)"),
    ({"rewards": [1.0, NAN]}, "rewards[1]", "finite"),
    ({"rewards": [INF, 1.0]}, "rewards[0]", "finite"),
    ({"rewards": [INF, -INF]}, "rewards[0]", "finite"),
    ({"completion_tokens": [1]}, "completion_tokens", "as many as rewards (2)"),
    ({"completion_tokens": [1, -1]}, "completion_tokens[1]", "0 or more"),
    ({"num_rewards": [5, 0], "rewards": [1.0] * 5}, "num_rewards[0]", "4 were allocated"),
    (
        {"prompt_indices": [1, 1], "num_rewards": [2, 3], "rewards": [1.0] * 5},
        "num_rewards[0]",
        "brings position 1 to 5 rollouts; 4 were allocated",
    ),
]
OWN_REPORT = [
    ({"prompt_ids": []}, "prompt_ids", "at least one"),
    ({"prompt_ids": ["a", ""]}, "prompt_ids[1]", "not be empty"),
    ({"prompt_indices": [0, 2]}, "prompt_indices[1]", "from 0 to 1"),
]
EXTEND = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"allocation_id": ""}, "allocation_id", "is required"),
    ({"request_id": ""}, "request_id", "is required"),
    ({"wave_fraction": 2.0}, "wave_fraction", "from 0 to 1"),
]
REWIND = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"step": -2}, "step", "from -1"),
    ({"request_id": "\x00"}, "request_id", "control"),
]
LIST = [
    ({"page_size": -1}, "page_size", "from 0"),
    ({"page_token": "not a token"}, "page_token", "next_page_token"),
]
IMPORT = [
    ({"run_id": ""}, "run_id", "is required"),
    ({"request_id": ""}, "request_id", "is required"),
    ({"step": -1}, "step", "from 0"),
    ({"prompt_ids": []}, "prompt_ids", "at least one"),
    ({"num_rewards": [2]}, "num_rewards", "one per prompt (2)"),
    ({"num_rewards": [1, 2]}, "num_rewards", "number of rewards (2)"),
    ({"rewards": [0.0, NAN]}, "rewards[1]", "finite"),
    ({"completion_tokens": [1, 2, 3]}, "completion_tokens", "as many as rewards (2)"),
]


def cases(name: str, table: list[Any]) -> list[Any]:
    """Return a parameter per row, named for the field."""
    return [pytest.param(name, *row, id=f"{name}-{row[1]}-{i}") for i, row in enumerate(table)]


@pytest.mark.parametrize(
    ("call", "change", "field", "allowed"),
    [
        *cases("create_run", CREATE),
        *cases("allocate", ALLOCATE),
        *cases("report", REPORT),
        *cases("own_report", OWN_REPORT),
        *cases("extend", EXTEND),
        *cases("rewind_run", REWIND),
        *cases("list_runs", LIST),
        *cases("list_prompt_stats", LIST),
        *cases("import_outcomes", IMPORT),
    ],
)
async def test_a_wrong_field_is_named_with_what_is_allowed(
    service: SchedulerService, calls, call: str, change: dict[str, Any], field: str, allowed: str
) -> None:
    """The message has the field, its value and the rule; the run is as before."""
    allocation = await service.allocate(
        calls.allocate(total_rollouts=8, step=3, request_id="first")
    )
    assert list(allocation.num_rollouts) == [4, 4]
    request = right_request(call, calls, allocation.allocation_id)
    for name, value in change.items():
        request.ClearField(name)
        request.MergeFrom(type(request)(**{name: value}))
    before = await everything(service)

    with pytest.raises(InvalidArgument) as refused:
        await make(service, call, request)

    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field} = ")
    assert allowed in str(refused.value)
    assert await everything(service) == before


@pytest.mark.parametrize(
    "call",
    [
        "create_run",
        "allocate",
        "report",
        "own_report",
        "extend",
        "rewind_run",
        "list_runs",
        "list_prompt_stats",
        "import_outcomes",
    ],
)
async def test_the_requests_of_the_table_are_right_but_for_the_change(
    service: SchedulerService, calls, call: str
) -> None:
    """Each unchanged request is served, so the change is what was refused."""
    allocation = await service.allocate(
        calls.allocate(total_rollouts=8, step=3, request_id="first")
    )
    if call == "extend":
        await service.report(calls.report(allocation.allocation_id, [[1.0], [0.0]]))
    await make(service, call, right_request(call, calls, allocation.allocation_id))


def right_request(call: str, calls: Any, allocation_id: str) -> Any:
    """Return a request that is served."""
    match call:
        case "create_run":
            return pb.CreateRunRequest(run_id="new")
        case "allocate":
            return calls.allocate()
        case "report":
            return calls.report(allocation_id, [[1.0], [0.0]])
        case "own_report":
            return calls.own_report(["a", "b"], [[1.0], [0.0]], step=9)
        case "extend":
            return calls.extend(allocation_id)
        case "rewind_run":
            return calls.rewind(7)
        case "list_runs":
            return pb.ListRunsRequest()
        case "list_prompt_stats":
            return pb.ListPromptStatsRequest(run_id="run")
        case "import_outcomes":
            return pb.ImportOutcomesRequest(
                run_id="run",
                request_id="import",
                prompt_ids=["a", "b"],
                num_rewards=[1, 1],
                rewards=[1.0, 0.0],
            )
    raise AssertionError(call)


async def make(service: SchedulerService, call: str, request: Any) -> Any:
    """Make a call."""
    if call == "import_outcomes":

        async def stream():
            yield request

        return await service.import_outcomes(stream())
    return await getattr(service, call.replace("own_", ""))(request)


async def everything(service: SchedulerService) -> list[bytes]:
    """Return all that can be read of the service."""
    runs = await service.list_runs(pb.ListRunsRequest())
    stats = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
    return [runs.SerializeToString(), stats.SerializeToString()]


async def test_an_import_that_fails_late_leaves_nothing(service: SchedulerService, calls) -> None:
    """The stream is applied whole or not at all, and does not create a run either."""

    async def stream():
        yield right_request("import_outcomes", calls, "")
        yield pb.ImportOutcomesRequest(prompt_ids=["c"], num_rewards=[1], rewards=[NAN])

    with pytest.raises(InvalidArgument, match=r"rewards\[0\]"):
        await service.import_outcomes(stream())
    assert not (await service.list_runs(pb.ListRunsRequest())).runs


async def test_more_prompts_than_the_limit_are_refused(calls) -> None:
    """The limit is in the message."""
    async with open_service("sqlite://") as service:
        service._limits = Limits(prompts=3)
        with pytest.raises(InvalidArgument, match="at most 3 in one call"):
            await service.allocate(calls.allocate(list("abcd"), 8))


async def test_no_request_makes_much_work_of_little(service: SchedulerService, calls) -> None:
    """Bounds and budgets in tokens that ask for more than is served are refused."""
    ids = [f"p{i}" for i in range(200)]
    rewards = [[1.0, 0.0]] * 200
    await service.report(calls.own_report(ids, rewards, completion_tokens=[1, 1] * 200))
    for more, field in (
        ({"total_rollouts": 100, "min_rollouts": [100_000]}, "min_rollouts"),
        ({"total_rollouts": 0, "total_tokens": 2**53}, "total_tokens"),
    ):
        request = calls.allocate(ids, max_rollouts=[2**31 - 1], allow_partial=True, **more)
        with pytest.raises(InvalidArgument) as refused:
            await service.allocate(request)
        assert refused.value.field == field
        assert "10000000" in str(refused.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("objective", ["paper", "hora"])
async def test_the_largest_budgets_are_answered(
    service: SchedulerService, calls, objective: str
) -> None:
    """Millions of rollouts on three prompts, in rollouts, in tokens, and in both."""
    config = pb.RunConfig(objective=objective)
    await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
    rewards = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    tokens = [1, 1, 1, 2, 1, 3]
    await service.report(calls.own_report(list("abc"), rewards, completion_tokens=tokens))

    async def given(**budget: int) -> pb.Allocation:
        request = calls.allocate(list("abc"), max_rollouts=[2**31 - 1], **budget)
        return await service.allocate(request)

    assert sum((await given(total_rollouts=9_000_000)).num_rollouts) == 9_000_000
    answer = await given(total_rollouts=0, total_tokens=5_000_000)
    assert 4_900_000 < answer.summary.expected_tokens <= 5_000_000
    answer = await given(total_rollouts=1_000_000, total_tokens=5_000_000)
    assert 990_000 < sum(answer.num_rollouts) <= 1_000_000
    # As many tokens as can be said: one prompt alone could have billions of rollouts of them.
    answer = await given(total_rollouts=8, total_tokens=2**53)
    assert sum(answer.num_rollouts) == 8


@pytest.mark.timeout(60)
async def test_tokens_that_buy_nothing_are_left(service: SchedulerService, calls) -> None:
    """Gains that fall by a constant factor end on the smallest numbers there are."""
    config = pb.RunConfig(objective="coba")
    await service.create_run(pb.CreateRunRequest(run_id="run", config=config))
    rewards = [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    await service.report(calls.own_report(list("abc"), rewards, completion_tokens=[1] * 6))
    request = calls.allocate(list("abc"), 0, max_rollouts=[2**31 - 1], total_tokens=1_000_000)
    answer = await service.allocate(request)
    assert 0 < answer.summary.expected_tokens < 1_000_000
    assert min(answer.num_rollouts) > 1000


async def test_refused_names_leave_no_trace(service: SchedulerService) -> None:
    """Neither a run nor a lock is kept for names that nobody has."""
    for number in range(50):
        with pytest.raises(NotFound):
            await service.get_run(pb.GetRunRequest(run_id=f"unknown-{number}"))
        with pytest.raises(NotFound):
            await service.delete_run(pb.DeleteRunRequest(run_id=f"unknown-{number}"))
    assert len(service._runs._turns) == 0
    assert service._runs._loaded == {}


NUMBERS = st.integers(-(2**31), 2**31 - 1)
MESSAGES = st.one_of(
    st.builds(
        pb.AllocateRequest,
        run_id=st.sampled_from(["", "run"]),
        request_id=st.text(max_size=3).filter(
            lambda t: not any(0xD800 <= ord(c) <= 0xDFFF for c in t)
        ),
        step=st.integers(-2, 2**62),
        prompt_ids=st.lists(st.sampled_from(["", "a", "b", "ü"]), max_size=4),
        total_rollouts=st.one_of(st.integers(-5, 100), st.integers(-(2**63), 2**63 - 1)),
        min_rollouts=st.lists(NUMBERS, max_size=4),
        max_rollouts=st.lists(st.one_of(st.integers(0, 9), NUMBERS), max_size=4),
        wave_fraction=st.one_of(st.just(0.0), st.floats()),
        allow_partial=st.booleans(),
        total_tokens=st.integers(-2, 2**63 - 1),
        waves=st.one_of(st.sampled_from([0, 2]), NUMBERS),
    ),
    st.builds(
        pb.ReportRequest,
        run_id=st.sampled_from(["", "run"]),
        allocation_id=st.sampled_from(["", "a-x"]),
        report_id=st.sampled_from(["", "x", "y"]),
        policy_version=st.integers(-1, 2**63 - 1),
        step=st.integers(-1, 2**63 - 1),
        prompt_ids=st.lists(st.sampled_from(["", "a", "b"]), max_size=3),
        prompt_indices=st.lists(st.one_of(st.integers(-1, 3), NUMBERS), max_size=4),
        num_rewards=st.lists(st.one_of(st.integers(-1, 3), NUMBERS), max_size=4),
        rewards=st.lists(st.floats(width=32), max_size=6),
        completion_tokens=st.lists(NUMBERS, max_size=6),
    ),
    st.builds(
        pb.RewindRunRequest,
        run_id=st.just("run"),
        step=st.integers(-3, 2**63 - 1),
        request_id=st.sampled_from(["", "x"]),
    ),
)


@settings(max_examples=200, deadline=None)
@given(messages=st.lists(MESSAGES, min_size=1, max_size=6))
async def test_no_message_makes_the_service_fail(messages: list[Any]) -> None:
    """Whatever the fields hold, a call is answered or refused, and the run still folds."""
    names = {
        pb.AllocateRequest: "allocate",
        pb.ReportRequest: "report",
        pb.RewindRunRequest: "rewind_run",
    }
    async with open_service("sqlite://") as service:
        for message in messages:
            try:
                answer = await getattr(service, names[type(message)])(message)
            except (InvalidArgument, NotFound, AlreadyExists):
                continue
            if isinstance(message, pb.AllocateRequest) and not message.allow_partial:
                assert sum(answer.num_rollouts) + answer.remaining_rollouts <= (
                    message.total_rollouts or 2**62
                )
            assert await getattr(service, names[type(message)])(message) is not None

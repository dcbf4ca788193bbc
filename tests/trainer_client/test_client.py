"""The client against a scheduler that fails on demand."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from knapsack_trainer_client import (
    AccessDenied,
    AsyncBudgetClient,
    ClientMisuse,
    InvalidRequest,
    KnapsackError,
    Limits,
    RolloutClient,
    RunConfig,
    RunConfigConflict,
    SchedulerUnavailable,
)
from knapsack_trainer_client.events import (
    Event,
    OutboxFailed,
    ReportDelivered,
    ReportRefused,
    SchedulerBack,
    SchedulerLost,
)

from real_scheduler import PATIENCE

IDS = ["a", "b", "c", "d"]
Code = grpc.StatusCode
HARMLESS = [
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.INTERNAL,
    Code.UNKNOWN,
    Code.RESOURCE_EXHAUSTED,
    Code.NOT_FOUND,
    Code.ABORTED,
    Code.CANCELLED,
    Code.UNIMPLEMENTED,
    Code.DATA_LOSS,
]
REFUSALS = [
    Code.INVALID_ARGUMENT,
    Code.ALREADY_EXISTS,
    Code.OUT_OF_RANGE,
    Code.FAILED_PRECONDITION,
]
DENIALS = [Code.UNAUTHENTICATED, Code.PERMISSION_DENIED]

HASTY = 1.0
"""Seconds, of clients whose first call nobody answers; the later ones do not wait."""

Make = Callable[..., AsyncBudgetClient]


@pytest.fixture
async def make(scripted: Any) -> AsyncIterator[Make]:
    """A function that makes clients of the scripted scheduler, with time unless told so."""
    clients: list[AsyncBudgetClient] = []

    def build(**options: Any) -> AsyncBudgetClient:
        options = {"timeout": PATIENCE, **options}
        clients.append(AsyncBudgetClient(scripted.address, options.pop("run_id", "run"), **options))
        return clients[-1]

    yield build
    for client in clients:
        await client.close()


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, or fail."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's
            await asyncio.sleep(0.01)


async def test_four_lines_of_a_training_step(scripted: Any, make: Make) -> None:
    """Allocate, report and go on, with a run that the scheduler did not know."""
    scripted.scheduler.auto_create = False
    client = make()

    allocation = await client.allocate(IDS, total_rollouts=8, step=3)
    receipt = await client.report(allocation, [[1, 0], [1.0, 0], [0, 0], [1, 1]], policy_version=2)

    assert allocation.num_rollouts == [2, 2, 2, 2]
    assert not allocation.is_fallback
    assert (receipt.delivered, receipt.accepted_rollouts) == (True, 8)
    assert scripted.scheduler.names() == ["Allocate", "CreateRun", "Allocate", "Report"]
    request = scripted.scheduler.calls[-1][1]
    assert (request.allocation_id, request.policy_version, request.step) == ("a0", 2, 0)
    assert list(request.prompt_indices) == [0, 1, 2, 3]
    assert list(request.num_rewards) == [2, 2, 2, 2]
    assert client.stats().allocations == client.stats().reports_sent == 1


async def test_everything_asked_arrives(scripted: Any, make: Make) -> None:
    """Every argument of allocate and extend is in the request."""
    client = make()
    allocation = await client.allocate(
        IDS,
        8,
        5,
        min_rollouts=[1, 1, 2, 2],
        max_rollouts=np.int64(9),
        wave_fraction=0.5,
        allow_partial=True,
        request_id="mine",
        total_tokens=700,
    )
    await client.extend(allocation, 0.25, keep_outstanding=True, request_id="more")

    asked = scripted.scheduler.calls[0][1]
    assert (asked.run_id, asked.step, asked.request_id) == ("run", 5, "mine")
    assert list(asked.prompt_ids) == IDS
    assert (asked.total_rollouts, asked.total_tokens, asked.allow_partial) == (8, 700, True)
    assert (list(asked.min_rollouts), list(asked.max_rollouts)) == ([1, 1, 2, 2], [9])
    assert asked.wave_fraction == 0.5
    extended = scripted.scheduler.calls[-1][1]
    assert (extended.allocation_id, extended.request_id) == ("a0", "more")
    assert (extended.wave_fraction, extended.keep_outstanding) == (0.25, True)
    await client.allocate(IDS, 8, 6, waves=2)
    assert scripted.scheduler.calls[-1][1].waves == 2


@pytest.mark.parametrize("code", HARMLESS)
async def test_failure_never_reaches_the_trainer(scripted: Any, make: Make, code: Any) -> None:
    """Whatever goes wrong, every call of a step returns, and the report is kept."""
    for call in ("Allocate", "Extend", "Report", "RewindRun", "CreateRun"):
        scripted.scheduler.always(call, code)
    client = make(timeout=HASTY)

    allocation = await client.allocate(IDS, 10, 0, wave_fraction=0.5)
    told = client.stats().last_error
    receipt = await client.report(allocation, [[1], [0], [1, 1], [1]])
    extension = await client.extend(allocation)
    rewound = await client.rewind(5)

    assert allocation.is_fallback
    assert allocation.num_rollouts == [1, 1, 2, 1]
    assert math.isnan(allocation.summary.effective_group_rate)
    assert extension.is_fallback
    assert extension.rollouts_so_far == (3, 2, 3, 2)
    assert (receipt.delivered, rewound) == (False, None)
    stats = client.stats()
    assert (stats.allocations, stats.fallbacks, stats.reports_queued) == (2, 2, 1)
    assert stats.failures >= 3
    assert code.name in told
    assert client.pending_reports == 1

    for call in ("Allocate", "Extend", "Report", "RewindRun", "CreateRun"):
        scripted.scheduler.always(call, None)
    assert await client.flush(PATIENCE)
    [report] = scripted.scheduler.reports.values()
    assert (report.allocation_id, report.step, list(report.prompt_ids)) == ("", 0, IDS)
    assert list(report.rewards) == [1, 0, 1, 1, 1]
    assert scripted.scheduler.rewinds[-1] == 5


@pytest.mark.parametrize("code", REFUSALS)
async def test_refusal_is_the_callers(scripted: Any, make: Make, code: Any) -> None:
    """A refusal is raised with the scheduler's words and no fallback hides it."""
    client = make()
    allocation = await client.allocate(IDS, 8, 0, wave_fraction=0.5)
    for call in ("Allocate", "Extend", "Report", "RewindRun"):
        scripted.scheduler.always(call, code)

    for attempt in (
        client.allocate(IDS, 8, 0),
        client.extend(allocation),
        client.report(allocation, [[1], [], [], []]),
        client.rewind(0),
    ):
        with pytest.raises(InvalidRequest, match="injected"):
            await attempt
    assert client.pending_reports == 0


@pytest.mark.parametrize("code", DENIALS)
async def test_denial_counts_before_the_first_success(
    scripted: Any, make: Make, code: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong token stops the run at its start, a revoked one does not stop it later."""
    scripted.scheduler.plan("Allocate", code, None, code)
    client = make(token="secret")

    with pytest.raises(AccessDenied, match=code.name):
        await client.allocate(IDS, 8, 0)
    assert not (await client.allocate(IDS, 8, 1)).is_fallback
    caplog.clear()
    assert (await client.allocate(IDS, 8, 2)).is_fallback
    assert [r.levelname for r in caplog.records if r.levelno > logging.INFO] == ["ERROR"]


async def test_hang_ends_at_the_timeout_and_later_calls_do_not_wait(
    scripted: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """One call waits for its timeout; while the breaker is open the others go on at once."""
    hang = threading.Event()
    for call in ("Allocate", "Report", "GetRun"):
        scripted.scheduler.always(call, hang)
    events: list[Event] = []
    client = make(timeout=HASTY, on_event=events.append)

    assert (await client.allocate(IDS, 8, 0)).is_fallback
    assert client.stats().breaker_open
    before = len(scripted.scheduler.calls)
    for step in range(1, 4):
        allocation = await client.allocate(IDS, 8, step)
        await client.report(allocation, [[1, 0]] * 4)
    asked = [r for n, r in scripted.scheduler.calls[before:] if n == "Allocate"]
    assert [r.step for r in asked] == [1, 2, 3], "each call tries once"

    for call in ("Allocate", "Report", "GetRun"):
        scripted.scheduler.always(call, None)
    hang.set()
    await eventually(lambda: client.pending_reports == 0)
    assert not (await client.allocate(IDS, 8, 9)).is_fallback
    assert len(scripted.scheduler.reports) == 3
    kinds = [type(e) for e in events]
    assert kinds.count(SchedulerLost) == kinds.count(SchedulerBack) == 1
    assert kinds.count(ReportDelivered) == 3
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert "does not answer" in lines[0]
    assert "is back after" in lines[1]


async def test_idle_client_notices_that_the_scheduler_is_back(scripted: Any, make: Make) -> None:
    """The breaker closes in the background, also where nothing waits to be delivered."""
    scripted.stop()
    client = make(timeout=HASTY)
    await client.allocate(IDS, 8, 0)
    assert client.stats().breaker_open

    scripted.start()

    await eventually(lambda: not client.stats().breaker_open)


async def test_retry_repeats_the_same_request(scripted: Any, make: Make) -> None:
    """A retry within the timeout carries the same id, so that it counts once."""
    scripted.scheduler.plan("Allocate", Code.UNAVAILABLE, Code.ABORTED)
    scripted.scheduler.plan("Report", Code.UNAVAILABLE)
    client = make()

    allocation = await client.allocate(IDS, 8, 0)
    await client.report(allocation, [[1, 0]] * 4)

    assert not allocation.is_fallback
    ids = [r.request_id for n, r in scripted.scheduler.calls if n == "Allocate"]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert len({r.report_id for n, r in scripted.scheduler.calls if n == "Report"}) == 1
    assert client.stats().retries == 3


@pytest.mark.parametrize("call", ["allocate", "extend", "report", "rewind"])
async def test_opting_out_raises(scripted: Any, make: Make, call: str) -> None:
    """With on_unavailable="raise" a call that nobody answers raises and queues nothing."""
    client = make(timeout=HASTY, on_unavailable="raise")
    allocation = await client.allocate(IDS, 8, 0, wave_fraction=0.5)
    scripted.stop()
    arguments: dict[str, Any] = {
        "allocate": (IDS, 8, 1),
        "extend": (allocation,),
        "report": (allocation, [[1], [], [], []]),
        "rewind": (0,),
    }

    with pytest.raises(SchedulerUnavailable):
        await getattr(client, call)(*arguments[call])

    assert client.pending_reports == 0
    scripted.start()


async def test_wrong_arguments_raise_with_or_without_scheduler(scripted: Any, make: Make) -> None:
    """A mistake is named whether or not anybody answers."""
    client = make()
    allocation = await client.allocate(IDS, 8, 0)
    scripted.stop()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: client.allocate([], 8, 0), "prompt_ids"),
        (lambda: client.allocate("abc", 8, 0), "prompt_ids"),
        (lambda: client.allocate(["a", ""], 8, 0), r"prompt_ids\[1\]"),
        (lambda: client.allocate([1, 2], 8, 0), r"prompt_ids\[0\]"),  # type: ignore[list-item]
        (lambda: client.allocate(["\ud800"], 8, 0), r"prompt_ids\[0\]"),
        (lambda: client.allocate(["a", "x" * 1025], 8, 0), r"prompt_ids\[1\]"),
        (lambda: client.allocate(IDS, 0, 0), "total_rollouts"),
        (lambda: client.allocate(IDS, -1, 0), "total_rollouts"),
        (lambda: client.allocate(IDS, 8.5, 0), "total_rollouts"),  # type: ignore[arg-type]
        (lambda: client.allocate(IDS, 8, -1), "step"),
        (lambda: client.allocate(IDS, 2**70, 0), "total_rollouts"),
        (lambda: client.allocate(IDS, 8, 0, min_rollouts=3), "total_rollouts = 8: .* 12"),
        (lambda: client.allocate(IDS, 8, 0, max_rollouts=1), "total_rollouts = 8: .* 4"),
        (lambda: client.allocate(IDS, 8, 0, min_rollouts=[1, 2]), "min_rollouts"),
        (lambda: client.allocate(IDS, 8, 0, min_rollouts=3, max_rollouts=2), "min_rollouts"),
        (lambda: client.allocate(IDS, 8, 0, wave_fraction=1.5), "wave_fraction"),
        (lambda: client.allocate(IDS, 8, 0, wave_fraction=math.nan), "wave_fraction"),
        (lambda: client.allocate(IDS, 8, 0, waves=3), "waves"),
        (lambda: client.allocate(IDS, 8, 0, wave_fraction=0.5, waves=2), "wave_fraction"),
        (lambda: client.extend(allocation, wave_fraction=-1), "wave_fraction"),
        (lambda: client.extend("a0"), "allocation"),  # type: ignore[arg-type]
        (lambda: client.report(allocation, [[1]] * 3), "rewards = '3 groups'"),
        (lambda: client.report(allocation, [1.0] * 7), "rewards = '7 numbers'"),
        (lambda: client.report(allocation, [[1, 1, 1], [], [], []]), r"rewards\[0\]"),
        (lambda: client.report(allocation, [[math.inf], [], [], []]), r"rewards\[0\]\[0\]"),
        (lambda: client.report(allocation, [[1e300], [], [], []]), r"rewards\[0\]\[0\]"),
        (lambda: client.report(allocation, [["x"], [], [], []]), r"rewards\[0\]\[0\]"),
        (lambda: client.report(allocation, [[]] * 4, policy_version=-1), "policy_version"),
        (
            lambda: client.report(allocation, [[1], [], [], []], 0, [[-1], [], [], []]),
            r"completion_tokens\[0\]\[0\]",
        ),
        (
            lambda: client.report(allocation, [[1], [], [], []], 0, [[], [], [], []]),
            r"completion_tokens\[0\]",
        ),
        (lambda: client.rewind(-2), "step"),
        (lambda: client.flush(0), "timeout"),
    ]
    for attempt, said in cases:
        with pytest.raises(InvalidRequest, match=f"^{said}"):
            await attempt()
    assert client.stats().failures == 0
    scripted.start()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": math.inf}, "timeout"),
        ({"on_unavailable": "panic"}, "on_unavailable"),
        ({"outbox": True}, "outbox"),
        ({"outbox": ""}, "outbox"),
        ({"run_id": ""}, "run_id"),
        ({"tls": "yes"}, "tls"),
        ({"config": {"polisy": "uniform"}}, "config = 'polisy'"),
        ({"config": 3}, "config"),
    ],
)
async def test_wrong_settings_raise_at_once(make: Make, options: Any, said: str) -> None:
    """A client that could not work is not made."""
    with pytest.raises(InvalidRequest, match=f"^{said}"):
        make(**options)


async def test_missing_rollouts_are_left_out(scripted: Any, make: Make) -> None:
    """None and NaN are missing, empty groups are fine, lengths follow the rewards."""
    client = make()
    allocation = await client.allocate(IDS, 8, 0)

    await client.report(
        allocation,
        [[None, 1], [], [math.nan, None], [0.5, 0.25]],
        completion_tokens=[[None, 7], [], [3, 3], [8, 9]],
    )

    request = scripted.scheduler.calls[-1][1]
    assert list(request.prompt_indices) == [0, 3]
    assert list(request.num_rewards) == [1, 2]
    assert list(request.rewards) == [1.0, 0.5, 0.25]
    assert list(request.completion_tokens) == [7, 8, 9]


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 0, 1, 0, 1, 0, 1, 0],
        np.array([1, 0, 1, 0, 1, 0, 1, 0], np.float32),
        torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0], dtype=torch.bfloat16),
        torch.tensor([[1, 0]] * 4),
        [np.array([1, 0])] * 4,
        ((True, False) for _ in range(4)),
        [[torch.tensor(1.0), np.float32(0)]] * 4,
    ],
)
async def test_rewards_of_every_kind(scripted: Any, make: Make, rewards: Any) -> None:
    """Flat or nested, lists, arrays, tensors and generators all are rewards."""
    client = make()
    allocation = await client.allocate(IDS, 8, 0)

    receipt = await client.report(allocation, rewards)

    assert receipt.accepted_rollouts == 8
    assert list(scripted.scheduler.calls[-1][1].rewards) == [1, 0] * 4
    assert list(scripted.scheduler.calls[-1][1].num_rewards) == [2] * 4


async def test_nothing_finished_is_no_report(
    scripted: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A report without rewards calls nobody, says so, and extending after it is no mistake."""
    client = make()
    allocation = await client.allocate(IDS, 8, 0, wave_fraction=0.5)

    receipt = await client.report(allocation, [[None], [], [], []])
    scripted.scheduler.plan("Extend", Code.FAILED_PRECONDITION)
    extension = await client.extend(allocation)

    assert (receipt.delivered, receipt.accepted_rollouts) == (True, 0)
    assert "Report" not in scripted.scheduler.names()
    assert "no reward of the 4 rollouts of step 0 was reported" in caplog.text
    assert extension.is_fallback
    assert extension.allocated_rollouts == 4


async def test_report_of_a_forgotten_allocation_carries_its_prompts(
    scripted: Any, make: Make
) -> None:
    """A scheduler that lost its store still learns from reports of what it allocated."""
    client = make(config=RunConfig(policy="uniform"))
    allocation = await client.allocate(IDS, 8, 7)
    scripted.scheduler.allocations.clear()
    scripted.scheduler.runs.clear()
    scripted.scheduler.auto_create = False

    receipt = await client.report(allocation, [[], [1, 0], [], [1]], completion_tokens=None)

    assert receipt.delivered
    [report] = scripted.scheduler.reports.values()
    assert report.allocation_id == ""
    assert (report.step, list(report.prompt_ids)) == (7, ["b", "d"])
    assert list(report.prompt_indices) == [0, 1]
    assert list(report.num_rewards) == [2, 1]
    assert scripted.scheduler.runs["run"].policy == "uniform"


async def test_queued_report_of_a_forgotten_allocation_is_delivered(
    scripted: Any, make: Make
) -> None:
    """A report that waited is converted as well."""
    client = make(timeout=HASTY)
    allocation = await client.allocate(IDS, 8, 7)
    scripted.stop()
    await client.report(allocation, [[1, 0], [], [], []])
    scripted.scheduler.allocations.clear()
    scripted.start()

    assert await client.flush(PATIENCE)
    [report] = scripted.scheduler.reports.values()
    assert (report.allocation_id, list(report.prompt_ids)) == ("", ["a"])


async def test_refused_report_does_not_block_the_queue(
    scripted: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """What the scheduler refuses becomes a dead letter; the next report gets through."""
    events: list[Event] = []
    client = make(timeout=HASTY, on_event=events.append)
    scripted.stop()
    allocation = await client.allocate(IDS, 8, 0)
    bad = await client.report(allocation, [[1], [], [], []])
    good = await client.report(allocation, [[], [1], [], []])
    scripted.scheduler.plan("Report", Code.INVALID_ARGUMENT)
    scripted.start()

    assert await client.flush(PATIENCE)

    assert list(scripted.scheduler.reports) == [good.report_id]
    [refused] = [e for e in events if isinstance(e, ReportRefused)]
    assert refused.report_id == bad.report_id
    assert client.stats().reports_refused == 1
    assert any(r.levelname == "ERROR" for r in caplog.records)


async def test_failing_report_stands_back_for_the_others(scripted: Any, make: Make) -> None:
    """A report that fails by itself is tried again later and holds up nobody."""
    client = make(timeout=HASTY)
    scripted.stop()
    allocation = await client.allocate(IDS, 8, 0)
    first = await client.report(allocation, [[1], [], [], []])
    second = await client.report(allocation, [[], [1], [], []])
    scripted.scheduler.plan("Report", Code.INTERNAL)
    scripted.start()

    await eventually(lambda: second.report_id in scripted.scheduler.reports)
    assert first.report_id not in scripted.scheduler.reports
    assert await client.flush(PATIENCE), "flush does not wait for its turn"
    assert len(scripted.scheduler.reports) == 2


async def test_rewind_drops_queued_reports_and_goes_first(scripted: Any, make: Make) -> None:
    """A rewind that could not be delivered is delivered before any report."""
    client = make(timeout=HASTY)
    scripted.stop()
    for step in (4, 6):
        allocation = await client.allocate(IDS, 8, step)
        await client.report(allocation, [[1], [], [], []])
    assert await client.rewind(5) is None
    assert client.pending_reports == 1
    assert client.stats().reports_dropped == 1
    allocation = await client.allocate(IDS, 8, 6)
    await client.report(allocation, [[0], [], [], []])
    scripted.scheduler.calls.clear()
    scripted.start()

    assert await client.flush(PATIENCE)

    names = [n for n in scripted.scheduler.names() if n in ("RewindRun", "Report")]
    assert names == ["RewindRun", "Report", "Report"]
    assert sorted(r.step for r in scripted.scheduler.reports.values()) == [4, 6]
    assert scripted.scheduler.rewinds == [5]


async def test_allocation_waits_for_a_queued_rewind(scripted: Any, make: Make) -> None:
    """After an outage nothing is decided on outcomes that were rewound."""
    first = make(timeout=HASTY)
    scripted.stop()
    await first.rewind(5)
    await first.close()
    scripted.start()
    scripted.scheduler.calls.clear()

    client = make()
    await client.allocate(IDS, 8, 6)

    assert scripted.scheduler.names()[0] == "RewindRun"


async def test_next_client_delivers_what_the_last_one_left(scripted: Any, make: Make) -> None:
    """Reports outlive the client; another run's client leaves them alone."""
    scripted.stop()
    client = make(timeout=HASTY)
    allocation = await client.allocate(IDS, 8, 3)
    await client.report(allocation, [[1, 0]] * 4)
    await client.close()
    scripted.start()

    other = make(run_id="other")
    await other.allocate(IDS, 8, 0)
    assert other.pending_reports == 0
    heir = make()
    await heir.allocate(IDS, 8, 4)
    await eventually(lambda: heir.pending_reports == 0)

    assert [r.run_id for r in scripted.scheduler.reports.values()] == ["run"]
    assert heir.stats().reports_delivered == 1


async def test_unusable_outbox_falls_back_to_memory(
    scripted: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the file cannot be written, reports wait in memory, and the log says so once."""
    broken = tmp_path / "file"
    broken.write_bytes(b"no database" * 1000)
    events: list[Event] = []
    client = make(timeout=HASTY, outbox=broken, on_event=events.append)
    scripted.stop()
    for step in range(3):
        allocation = await client.allocate(IDS, 8, step)
        await client.report(allocation, [[1, 0]] * 4)

    assert client.pending_reports == 3
    assert sum(isinstance(e, OutboxFailed) for e in events) == 1
    scripted.start()
    assert await client.flush(PATIENCE)
    assert len(scripted.scheduler.reports) == 3


async def test_full_outbox_drops_the_oldest(
    scripted: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The bound holds, the newest stay, and the loss is counted and logged."""
    client = make(timeout=HASTY, outbox_limits=Limits(reports=2))
    scripted.stop()
    for step in range(4):
        allocation = await client.allocate(IDS, 8, step)
        await client.report(allocation, [[1, 0]] * 4)

    assert (client.pending_reports, client.stats().reports_dropped) == (2, 2)
    assert sum(r.levelname == "ERROR" for r in caplog.records) == 2
    scripted.start()
    assert await client.flush(PATIENCE)
    assert sorted(r.step for r in scripted.scheduler.reports.values()) == [2, 3]


async def test_memory_only_client_says_what_it_loses(
    scripted: Any, make: Make, outbox_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """outbox=False makes no file, and closing with reports waiting is an error in the log."""
    client = make(timeout=HASTY, outbox=False)
    scripted.stop()
    allocation = await client.allocate(IDS, 8, 0)
    await client.report(allocation, [[1, 0]] * 4)
    await client.close()

    assert list(outbox_folder.parent.glob("outboxes/*")) == []
    assert client.stats().reports_dropped == 1
    assert caplog.records[-1].levelname == "ERROR"
    scripted.start()


async def test_config_creates_the_run_and_a_mismatch_shows_both(scripted: Any, make: Make) -> None:
    """A run made with one config is not silently used with another."""
    await make(config={"policy": "uniform"}).allocate(IDS, 8, 0)
    assert scripted.scheduler.names()[:2] == ["CreateRun", "Allocate"]
    await make(config=RunConfig(policy="uniform")).allocate(IDS, 8, 0)
    await make().allocate(IDS, 8, 0)

    with pytest.raises(RunConfigConflict) as caught:
        await make(config=RunConfig(objective="effective")).allocate(IDS, 8, 0)

    assert "'uniform'" in str(caught.value)
    assert "'effective'" in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["", "not an address", "http://localhost:50051", "localhost", "localhost:port", "h:70000"],
)
def test_an_address_that_cannot_be_one_is_no_outage(address: str) -> None:
    """It is refused at once, by both clients, and not taken for a scheduler that is down."""
    with pytest.raises(InvalidRequest, match=r"address = .*: must be HOST:PORT"):
        AsyncBudgetClient(address, "run", outbox=False)
    with pytest.raises(InvalidRequest, match=r"address = .*: must be HOST:PORT"):
        RolloutClient(address)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"success_threshold": "abc"}, r"config\.success_threshold = 'abc': must be a number"),
        ({"max_rollouts": True}, r"config\.max_rollouts = True: must be a number"),
        ({"policy": 3}, r"config\.policy = 3: must be a name"),
        ({"polici": "uniform"}, r"config = 'polici': must be one of policy, "),
    ],
)
def test_a_config_of_the_wrong_kind_is_named(config: dict[str, object], message: str) -> None:
    """When the client is made, not at its first call."""
    with pytest.raises(InvalidRequest, match=message):
        AsyncBudgetClient("localhost:50051", "run", outbox=False, config=config)


async def test_config_bounds_hold_offline(scripted: Any, make: Make) -> None:
    """The bounds of the client's config bind the fallback and name a mistake."""
    scripted.stop()
    client = make(timeout=HASTY, config=RunConfig(min_rollouts=3, max_rollouts=4))
    assert (await client.allocate(IDS, 14, 0)).num_rollouts == [4, 3, 4, 3]
    with pytest.raises(InvalidRequest, match="total_rollouts = 20"):
        await client.allocate(IDS, 20, 0)
    scripted.start()


async def test_tokens_budget_offline_uses_reported_lengths(scripted: Any, make: Make) -> None:
    """Lengths the client has reported turn a token budget into rollouts."""
    client = make(timeout=HASTY)
    allocation = await client.allocate(IDS, 8, 0)
    await client.report(allocation, [[1, 0]] * 4, completion_tokens=[[100, 300]] * 4)
    scripted.stop()
    assert (await client.allocate(IDS, 0, 1, total_tokens=2400)).allocated_rollouts == 12
    scripted.start()


async def test_queued_reports_keep_their_rollouts_from_being_given_again(
    scripted: Any, make: Make
) -> None:
    """Extending while a report is stuck takes its rollouts as outstanding, not as lost."""
    # It waits for the report for half of the time that it has.
    client = make(timeout=10)
    allocation = await client.allocate(IDS, 8, 0, wave_fraction=0.5)
    scripted.scheduler.always("Report", Code.INTERNAL)
    await client.report(allocation, [[1], [1], [1], [1]])

    await client.extend(allocation)
    scripted.scheduler.always("Report", None)

    [request] = [r for n, r in scripted.scheduler.calls if n == "Extend"]
    assert request.keep_outstanding


async def test_prompt_stats_reads_every_page(scripted: Any, make: Make) -> None:
    """Pages are joined; an unknown run has no prompts; an outage has no fallback."""
    client = make(timeout=HASTY)
    stats = await client.prompt_stats()
    assert [s.prompt_id for s in stats] == ["p0", "p1", "p2", "p3", "p4"]
    assert (stats[0].total_rollouts, stats[0].success_rate) == (2, 0.5)
    scripted.scheduler.plan("ListPromptStats", Code.NOT_FOUND)
    assert await client.prompt_stats() == []
    assert (await client.run()).run_id == "run"
    scripted.stop()
    with pytest.raises(SchedulerUnavailable):
        await client.prompt_stats()
    scripted.start()


async def test_malformed_answer_is_a_failure(
    scripted: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of the wrong length is not handed to the trainer."""
    client = make()
    answer = type(scripted.scheduler).Allocate

    def short(self: Any, request: Any, context: Any) -> Any:
        response = answer(self, request, context)
        del response.num_rollouts[-1]
        return response

    monkeypatch.setattr(type(scripted.scheduler), "Allocate", short)
    scripted.stop()
    scripted.start()
    allocation = await client.allocate(IDS, 8, 0)
    assert allocation.is_fallback
    assert "3 numbers for 4 prompts" in client.stats().last_error


async def test_token_is_sent_and_may_rotate(scripted: Any, make: Make) -> None:
    """The bearer token goes with every call, stripped, and may come from a function."""
    tokens = iter(["one\n", "two"])
    client = make(token=lambda: next(tokens))
    await client.allocate(IDS, 8, 0)
    await client.allocate(IDS, 8, 1)
    sent = [m["authorization"] for m in scripted.scheduler.metadata]
    assert sent == ["Bearer one", "Bearer two"]


async def test_a_late_or_failing_look_at_the_run_costs_no_allocation(
    scripted: Any, make: Make
) -> None:
    """Where the run cannot be looked at, the allocation that was answered stands."""
    for step in (Code.INTERNAL, Code.NOT_FOUND, Code.INVALID_ARGUMENT, threading.Event()):
        scripted.scheduler.plan("GetRun", step)
        allocation = await make(timeout=HASTY).allocate(IDS, 8, 0)
        assert not allocation.is_fallback


async def test_failing_hook_and_token_do_not_stop_training(
    scripted: Any, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """What the user hooks in may fail without failing the step."""

    def fail(*_: object) -> str:
        raise RuntimeError("hooked")

    assert not (await make(on_event=fail).allocate(IDS, 8, 0)).is_fallback
    assert (await make(timeout=HASTY, token=fail).allocate(IDS, 8, 0)).is_fallback


async def test_concurrent_calls_of_one_client(scripted: Any, make: Make) -> None:
    """Calls may overlap, also the very first ones."""
    client = make()
    steps = await asyncio.gather(*(client.allocate(IDS, 8, step) for step in range(30)))
    assert [a.step for a in steps] == list(range(30))
    assert not any(a.is_fallback for a in steps)


async def test_cancelled_call_leaves_the_client_usable(scripted: Any, make: Make) -> None:
    """A caller that goes away takes its call with it and nothing else."""
    hang = threading.Event()
    scripted.scheduler.plan("Allocate", hang)
    client = make()
    call = asyncio.create_task(client.allocate(IDS, 8, 0))
    await eventually(lambda: scripted.scheduler.names())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    hang.set()
    assert not (await client.allocate(IDS, 8, 1)).is_fallback


async def test_closed_client_says_so(make: Make) -> None:
    """Calls after close are a mistake; a second close is none."""
    client = make()
    async with client:
        await client.allocate(IDS, 8, 0)
    await client.close()
    with pytest.raises(ClientMisuse, match="closed"):
        await client.allocate(IDS, 8, 0)


def test_client_belongs_to_one_loop(scripted: Any) -> None:
    """A second event loop is refused in words."""
    client = AsyncBudgetClient(scripted.address, "run")
    asyncio.run(client.allocate(IDS, 8, 0))
    with pytest.raises(ClientMisuse, match="event loop"):
        asyncio.run(client.allocate(IDS, 8, 0))


async def test_foreign_allocation_is_refused(make: Make) -> None:
    """An allocation of another run is a mistake."""
    allocation = await make(run_id="other").allocate(IDS, 8, 0)
    with pytest.raises(InvalidRequest, match=r"allocation\.run_id"):
        await make().report(allocation, [[1, 0]] * 4)


async def test_every_error_is_ours(make: Make) -> None:
    """One base class catches everything, and each error is also its built-in kind."""
    assert issubclass(InvalidRequest, KnapsackError)
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(SchedulerUnavailable, ConnectionError)
    assert issubclass(AccessDenied, PermissionError)


async def test_call_is_bounded_by_its_timeout_over_many_retries(scripted: Any, make: Make) -> None:
    """Retries do not add up beyond the timeout: the call ends although all fail at once."""
    scripted.scheduler.always("Allocate", Code.UNAVAILABLE)
    client = make(timeout=HASTY)
    async with asyncio.timeout(PATIENCE):
        allocation = await client.allocate(IDS, 8, 0)
    assert allocation.is_fallback
    assert 2 <= scripted.scheduler.names().count("Allocate") <= 25

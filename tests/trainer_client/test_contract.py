"""One suite for every way to reach a scheduler, run against the real one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knapsack_trainer_client import (
    AsyncBudgetClient,
    BudgetClient,
    InvalidRequest,
    RunConfig,
    RunConfigConflict,
    group_advantages,
)

IDS = ["easy", "hard", "mixed", "unseen"]


class Awaited:
    """An asynchronous client whose calls are run to their end, one by one."""

    def __init__(self, client: AsyncBudgetClient) -> None:
        self._client = client
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._client, name)
        if not asyncio.iscoroutinefunction(member):
            return member
        return lambda *args, **options: self._runner.run(member(*args, **options))

    def close(self) -> None:
        """Close the client and its loop."""
        self._runner.run(self._client.close())
        self._runner.close()


Make = Callable[..., Any]


@pytest.fixture(params=["sync", "async", "embedded", "async-embedded"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """A function that makes clients of one kind, all with the same store."""
    kind = request.param
    # A loaded machine may be slow, but these tests are of answers and not of fallbacks.
    common: dict[str, Any] = {"timeout": 30.0, "on_unavailable": "raise"}
    clients: list[Any] = []
    process = None if "embedded" in kind else request.getfixturevalue("shared_scheduler")

    def build(run_id: str = "run", **options: Any) -> Any:
        options = {**common, **options}
        run_id = f"{run_id}-{tmp_path.name}"
        kind_of = AsyncBudgetClient if "async" in kind else BudgetClient
        if process is None:
            while clients:
                # One at a time may hold the store.
                clients.pop().close()
            client: Any = kind_of.embedded(tmp_path / "stats.db", run_id, **options)
        else:
            client = kind_of(process.address, run_id, **options)
        clients.append(Awaited(client) if "async" in kind else client)
        return clients[-1]

    yield build
    for client in clients:
        client.close()


def test_a_run_of_training_steps(make: Make) -> None:
    """Steps of allocate and report add up to the statistics, and the run says so."""
    client = make()
    told: dict[str, list[float]] = {p: [] for p in IDS[:3]}
    rates = {"easy": [1.0], "hard": [0.0], "mixed": [1.0, 0.0]}
    for step in range(4):
        allocation = client.allocate(IDS[:3], 24, step)
        rewards = [
            [rates[p][i % len(rates[p])] for i in range(n)]
            for p, n in zip(IDS, allocation.num_rollouts, strict=False)
        ]
        receipt = client.report(
            allocation,
            rewards,
            policy_version=step,
            completion_tokens=[[10] * len(group) for group in rewards],
        )
        assert sum(allocation.num_rollouts) == allocation.allocated_rollouts == 24
        assert (receipt.delivered, receipt.accepted_rollouts) == (True, 24)
        assert not allocation.is_fallback
        assert allocation.summary.policy == "posterior"
        assert math.isfinite(allocation.summary.value)
        advantages = group_advantages(rewards)
        assert [len(a) for a in advantages] == allocation.num_rollouts
        for p, group in zip(IDS, rewards, strict=False):
            told[p] += group

    stats = {s.prompt_id: s for s in client.prompt_stats()}

    assert list(stats) == sorted(told)
    for prompt_id, group in told.items():
        known = stats[prompt_id]
        assert (known.total_rollouts, known.total_successes) == (len(group), sum(group))
        assert (known.last_step, known.last_policy_version) == (3, 3)
        assert known.mean_completion_tokens == 10
    assert stats["easy"].success_rate > stats["mixed"].success_rate > stats["hard"].success_rate
    run = client.run()
    assert (run.run_id, run.last_step, run.last_policy_version) == (client.run_id, 3, 3)
    assert (run.total_rollouts, run.known_prompts) == (96, 3)
    assert run.create_time is not None
    assert run.config.policy == "posterior"


def test_waves_spend_the_budget(make: Make) -> None:
    """The second wave spends what the first left, on what was seen, and counts along."""
    client = make()
    first = client.allocate(IDS, 32, 0, wave_fraction=0.5)
    assert (first.wave, first.allocated_rollouts, first.remaining_rollouts) == (1, 16, 16)
    rewards = [[i % 2 for i in range(n)] for n in first.num_rollouts]
    rewards[1] = [0.0] * first.num_rollouts[1]
    client.report(first, rewards)

    second = client.extend(first)

    assert (second.wave, second.allocated_rollouts, second.remaining_rollouts) == (2, 16, 0)
    assert second.allocation_id == first.allocation_id
    assert second.num_rollouts[1] == 16, "only the group that is not effective gains"
    assert sum(second.rollouts_so_far) == 32
    receipt = client.report(second, [[1.0] * n for n in second.num_rollouts])
    assert receipt.accepted_rollouts == 16
    assert sum(s.total_rollouts for s in client.prompt_stats()) == 32


def test_partial_reports_and_lost_rollouts(make: Make) -> None:
    """Reports come in parts; rollouts that never finished are given again."""
    client = make()
    first = client.allocate(IDS[:2], 8, 0)
    client.report(first, [[1], []])
    client.report(first, [[None, 0], [0, None]])
    assert [s.total_rollouts for s in client.prompt_stats()] == [2, 1]

    running = client.extend(first, keep_outstanding=True)
    again = client.extend(running)

    assert running.allocated_rollouts == 0
    assert again.allocated_rollouts == 5


def test_extending_before_reporting_is_a_mistake(make: Make) -> None:
    """An extension that knows nothing is refused, not guessed."""
    client = make()
    allocation = client.allocate(IDS, 16, 0, wave_fraction=0.5)
    with pytest.raises(InvalidRequest, match="nothing was reported"):
        client.extend(allocation)


def test_ids_make_calls_idempotent(make: Make) -> None:
    """The same request_id and report_id give the same answer and count once."""
    client = make()
    first = client.allocate(IDS, 16, 0, request_id="q")
    client.report(first, [[1] * 4] * 4, report_id="r")
    assert client.allocate(IDS, 16, 0, request_id="q") == first
    client.report(first, [[1] * 4] * 4, report_id="r")
    assert client.run().total_rollouts == 16
    with pytest.raises(InvalidRequest):
        client.allocate(IDS, 20, 0, request_id="q")
    with pytest.raises(InvalidRequest):
        client.report(first, [[0] * 4] * 4, report_id="r")


def test_too_many_rewards_over_several_reports(make: Make) -> None:
    """The scheduler counts along and refuses what was not allocated."""
    client = make()
    allocation = client.allocate(IDS, 8, 0)
    client.report(allocation, [[1, 1], [], [], []])
    with pytest.raises(InvalidRequest, match="allocated"):
        client.report(allocation, [[1], [], [], []])


def test_rewind_forgets_later_steps(make: Make) -> None:
    """What came after the step is gone, and late reports of it are ignored."""
    client = make()
    allocations = [client.allocate(IDS, 8, step) for step in range(4)]
    for allocation in allocations[:3]:
        client.report(allocation, [[1, 0]] * 4)

    run = client.rewind(1)

    assert (run.last_step, run.total_rollouts, run.rewinds) == (1, 16, 1)
    late = client.report(allocations[3], [[1, 0]] * 4)
    assert (late.accepted_rollouts, late.ignored_rollouts) == (0, 8)
    assert {s.total_rollouts for s in client.prompt_stats()} == {4}
    again = client.allocate(IDS, 8, 2)
    assert client.report(again, [[1, 0]] * 4).accepted_rollouts == 8


def test_bounds_and_partial_budgets(make: Make) -> None:
    """Bounds bind; a budget they cannot hold is refused, or given in part on request."""
    client = make()
    allocation = client.allocate(IDS, 20, 0, min_rollouts=[3, 2, 2, 2], max_rollouts=6)
    assert allocation.num_rollouts[0] >= 3
    assert max(allocation.num_rollouts) <= 6
    with pytest.raises(InvalidRequest, match="total_rollouts"):
        client.allocate(IDS, 1000, 0)
    partial = client.allocate(IDS, 1000, 0, allow_partial=True)
    assert (partial.allocated_rollouts, partial.unallocated_rollouts) == (512, 488)
    few = client.allocate(IDS, 5, 0, min_rollouts=0)
    assert sum(few.num_rollouts) == 5
    assert 1 not in few.num_rollouts


def test_the_same_prompt_twice(make: Make) -> None:
    """Positions of one prompt are apart in the allocation and together in what is known."""
    client = make()
    allocation = client.allocate(["p", "p"], 6, 0)
    client.report(allocation, [[1] * n for n in allocation.num_rollouts])
    [stats] = client.prompt_stats()
    assert (len(allocation.num_rollouts), stats.total_rollouts) == (2, 6)


def test_runs_are_apart_and_keep_their_config(make: Make) -> None:
    """A run has the config it was made with; another config is refused."""
    uniform = make("uniform", config=RunConfig(policy="uniform", min_rollouts=1))
    allocation = uniform.allocate(IDS, 8, 0)
    assert allocation.summary.policy == "uniform"
    uniform.report(allocation, [[1, 1]] * 4)
    assert uniform.run().config.min_rollouts == 1

    other = make("other")
    other.allocate(IDS, 8, 0)
    assert other.prompt_stats() == []

    with pytest.raises(RunConfigConflict):
        make("uniform", config={"policy": "posterior"}).allocate(IDS, 8, 1)
    assert make("uniform").allocate(IDS, 8, 1).summary.policy == "uniform"


def test_many_prompts_at_once(make: Make) -> None:
    """Ten thousand prompts fit into one call and their statistics into pages."""
    client = make()
    ids = [f"dataset/train/{i:06d}/é" for i in range(10_000)]
    allocation = client.allocate(ids, 40_000, 0)
    client.report(allocation, [[0.0] * n for n in allocation.num_rollouts])
    stats = client.prompt_stats()
    assert [s.prompt_id for s in stats] == sorted(ids)
    assert sum(s.total_rollouts for s in stats) == 40_000


def test_budget_in_tokens(make: Make) -> None:
    """With known lengths a budget may be in tokens."""
    client = make()
    first = client.allocate(IDS, 16, 0)
    client.report(first, [[1, 0, 1, 0]] * 4, completion_tokens=[[100] * 4] * 4)
    allocation = client.allocate(IDS, 0, 1, total_tokens=2000)
    assert 8 <= allocation.allocated_rollouts <= 20
    assert allocation.summary.expected_tokens <= 2000


def test_what_was_reported_outlives_the_client(make: Make) -> None:
    """A second client of the run knows what the first was told."""
    first = make()
    first.report(first.allocate(IDS, 16, 0), [[1] * 4] * 4)
    second = make()
    assert second.run().total_rollouts == 16


def test_a_training_that_begins_behind_its_run_is_told_once(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A second training under a run's name, or one resumed without a rewind, says so."""
    first = make()
    first.allocate(IDS, 8, 7)
    assert "asked for step" not in caplog.text

    again = make()
    again.allocate(IDS, 8, 0)
    again.allocate(IDS, 8, 1)
    assert caplog.text.count("has been at step 7 and is asked for step 0") == 1

    resumed = make()
    resumed.rewind(3)
    resumed.allocate(IDS, 8, 4)
    assert caplog.text.count("asked for step") == 1

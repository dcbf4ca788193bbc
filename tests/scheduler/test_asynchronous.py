"""Asynchronous training: what is known does not depend on when which report arrived."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.service import SchedulerService

BATCHES = (("a", "b", "c"), ("b", "a", "b"), ("d", "c", "a"), ("e", "b", "d"))


async def allocated(service: SchedulerService, calls: Any) -> list[tuple[pb.Allocation, list[int]]]:
    """Return an allocation per step with its rollouts of two waves, none reported yet."""
    made = []
    for step, prompts in enumerate(BATCHES):
        first = await service.allocate(
            calls.allocate(prompts, 40, step, f"step-{step}", wave_fraction=0.5)
        )
        second = await service.extend(
            calls.extend(first.allocation_id, f"step-{step}", keep_outstanding=True)
        )
        both = zip(first.num_rollouts, second.num_rollouts, strict=True)
        made.append((first, [a + b for a, b in both]))
    return made


def parts_of(
    made: list[tuple[pb.Allocation, list[int]]], draw: random.Random, calls: Any
) -> list[pb.ReportRequest]:
    """Return every rollout's reward, cut into reports of a few, by several policy versions."""
    parts = []
    for allocation, sizes in made:
        rollouts = [at for at, size in enumerate(sizes) for _ in range(size)]
        draw.shuffle(rollouts)
        while rollouts:
            cut, rollouts = rollouts[:2], rollouts[2:]
            parts.append(
                pb.ReportRequest(
                    run_id="run",
                    allocation_id=allocation.allocation_id,
                    report_id=f"part-{len(parts)}",
                    policy_version=allocation.step + draw.randrange(64),
                    prompt_indices=cut,
                    num_rewards=[1] * len(cut),
                    rewards=[float(draw.random() < 0.4) for _ in cut],
                    completion_tokens=[draw.randrange(1, 900) for _ in cut],
                )
            )
    for number in range(3):
        parts.append(
            calls.own_report(
                ["a", "new"], [[1.0, 0.0], [0.0]], step=number, report_id=f"own-{number}",
                policy_version=number,
            )
        )  # fmt: skip
    return parts


# The fixture only names things.
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), workers=st.integers(1, 8), late=st.integers(0, 80))
async def test_statistics_do_not_depend_on_the_order_of_arrival(
    calls: Any, seed: int, workers: int, late: int
) -> None:
    """Late by versions, in parts, from many workers, around an Extend, repeated: bit for bit.

    A step can fill a prompt's window, and the prompts that prior and drift are learned from are
    fewer than there are.
    """
    with few_are_learned_from():
        await statistics_are_alike(calls, seed, workers, late)


@contextmanager
def few_are_learned_from() -> Iterator[None]:
    """Fit the prior and the drift to one prompt at most."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("state.PRIOR_PROMPTS", "state.DRIFT_PROMPTS"):
            patched.setattr(f"knapsack_scheduler.{name}", 1)
        for name in ("posterior", "drift"):
            patched.setattr(f"knapsack_scheduler.core.{name}.FEWEST_PROMPTS", 1)
        yield


async def statistics_are_alike(calls: Any, seed: int, workers: int, late: int) -> None:
    """Report the same to two services, the second time in another order, and compare."""
    seen = []
    for shuffled in (False, True):
        draw = random.Random(seed)
        async with open_service("sqlite://") as service:
            made = await allocated(service, calls)
            parts = parts_of(made, draw, calls)
            if shuffled:
                draw.shuffle(parts)
                parts.insert(min(late, len(parts)), parts[0])

            async def work(mine: list[pb.ReportRequest], service: Any = service) -> None:
                for part in mine:
                    assert (await service.report(part)).accepted_rollouts == len(part.rewards)

            before, after = parts[:late], parts[late:]
            await asyncio.gather(*(work(before[w::workers]) for w in range(workers)))
            # A wave that is asked for meanwhile, and whose rollouts get lost.
            await service.extend(
                calls.extend(made[0][0].allocation_id, "third", keep_outstanding=True)
            )
            await asyncio.gather(*(work(after[w::workers]) for w in range(workers)))

            page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
            run = await service.get_run(pb.GetRunRequest(run_id="run"))
            run.ClearField("create_time")
            # Judges predictions against what had been reported of each wave when it ended.
            run.ClearField("calibration")
            answer = await service.allocate(calls.allocate([*"abcde", "new"], 60, 9, "next"))
            # Named for the run, of which there are two.
            answer.ClearField("allocation_id")
            seen.append([m.SerializeToString() for m in (page, run, answer)])
    assert seen[0] == seen[1]


async def test_a_late_report_of_no_rollouts_moves_no_policy_version(
    service: SchedulerService, calls: Any
) -> None:
    """Of a forgotten allocation nothing counts, not even the version that generated it."""
    lost = await service.allocate(calls.allocate(step=4))
    await service.rewind_run(calls.rewind(2))
    await service.report(calls.report(lost.allocation_id, [[], []], policy_version=9))
    run = await service.get_run(pb.GetRunRequest(run_id="run"))
    assert (run.last_policy_version, run.last_step) == (0, -1)

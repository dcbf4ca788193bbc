"""Three schedulers on one PostgreSQL, killed in turn: no call is lost, doubled or differs.

``KNAPSACK_TEST_KILLS=200`` makes a soak of it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import service as service_module
from knapsack_scheduler.embedded import open_service
from knapsack_scheduler.errors import Unavailable
from knapsack_trainer_client import AsyncBudgetClient

REPLICAS = 3
KILLS = int(os.environ.get("KNAPSACK_TEST_KILLS", "6"))
STEPS = 4 * KILLS
TRAINERS, TRAINER_STEPS, TRAINED_RUNS = 64, 2 * KILLS // 3, 16
SHARED = [f"shared-{i}" for i in range(8)]


class Worker:
    """Calls any replica, each call at another one, until it is answered."""

    def __init__(self, name: str, replicas: list[Any]) -> None:
        self.name = name
        self.replicas = replicas
        self.counted: Counter[str] = Counter()
        self.allocations: list[tuple[Any, Any]] = []
        self.wrong: list[object] = []
        self._random = random.Random(name)

    def call(self, method: str, request: Any) -> Any:
        """Return the answer of whoever gives one first."""
        for _ in range(400):
            stub = self._random.choice(self.replicas).stub
            try:
                return getattr(stub, method)(request, timeout=60)
            except grpc.RpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ):
                    raise
                # Its successor is being started; the others answer meanwhile.
                threading.Event().wait(0.02)
        raise AssertionError("nobody answered 400 times")

    def steps(self) -> Iterator[None]:
        """Allocate and report, one step after another."""
        ids = [f"{self.name}-a", f"{self.name}-b", *SHARED]
        for step in range(STEPS):
            request = pb.AllocateRequest(
                run_id="run",
                step=step,
                request_id=f"{self.name}-{step}",
                prompt_ids=ids,
                total_rollouts=4 * len(ids),
            )
            answer = self.call("Allocate", request)
            self.allocations.append((request, answer))
            rewards = [float(self._random.random() < 0.5) for _ in range(answer.allocated_rollouts)]
            report = pb.ReportRequest(
                run_id="run",
                allocation_id=answer.allocation_id,
                report_id=f"{self.name}-{step}",
                policy_version=step,
                prompt_indices=range(len(ids)),
                num_rewards=answer.num_rollouts,
                rewards=rewards,
            )
            reported = self.call("Report", report)
            if reported.accepted_rollouts != len(rewards):
                self.wrong.append(reported)
            self.counted.update(dict(zip(ids, answer.num_rollouts, strict=True)))
            yield

    def work(self, done: Callable[[], object]) -> None:
        """Do all steps; keeps what went wrong."""
        try:
            for _ in self.steps():
                done()
        except BaseException as error:
            self.wrong.append(error)
            for _ in range(STEPS):
                done()


async def train(
    number: int, address: str, counted: dict[str, Counter[str]], done: Callable[[], object]
) -> None:
    """Do the steps of a trainer with the client, on all replicas as one address."""
    run_id = f"run-{number % TRAINED_RUNS}"
    ids = [f"{number}-a", f"{number}-b", *SHARED]
    async with AsyncBudgetClient(
        address, run_id, timeout=60, on_unavailable="raise", outbox=False
    ) as client:
        for step in range(TRAINER_STEPS):
            allocation = await client.allocate(ids, 4 * len(ids), step)
            assert not allocation.is_fallback
            rewards = [[float(i % 2) for i in range(n)] for n in allocation.num_rollouts]
            await client.report(allocation, rewards, policy_version=step)
            counted[run_id].update(dict(zip(ids, allocation.num_rollouts, strict=True)))
            done()
        assert await client.flush(60)


@pytest.mark.timeout(600 + 60 * KILLS)
def test_replicas_killed_in_turn_lose_and_double_nothing(postgres, start_scheduler) -> None:
    """Workers and 64 trainers that retry see no error; afterwards every replica agrees."""
    store = postgres.new_store()
    replicas = [
        start_scheduler("--auto-create-runs", "--rewind-horizon=20", store=store)
        for _ in range(REPLICAS)
    ]
    workers = [Worker(f"w{i}", replicas) for i in range(2)]
    addresses = "ipv4:" + ",".join(replica.addresses["listen"] for replica in replicas)
    trained = {f"run-{number}": Counter[str]() for number in range(TRAINED_RUNS)}
    wrong: list[BaseException] = []
    finished = threading.Semaphore(0)

    def train_all() -> None:
        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(TRAINERS):
                    group.create_task(train(number, addresses, trained, finished.release))

        try:
            asyncio.run(together())
        except BaseException as error:
            wrong.append(error)
            for _ in range(TRAINERS * TRAINER_STEPS):
                finished.release()

    threads = [threading.Thread(target=w.work, args=(finished.release,)) for w in workers]
    threads.append(threading.Thread(target=train_all))
    for thread in threads:
        thread.start()
    for victim in itertools.islice(itertools.cycle(replicas), KILLS):
        for _ in range((2 * STEPS + TRAINERS * TRAINER_STEPS) // (KILLS + 1)):
            assert finished.acquire(timeout=300)
        assert victim.end(signal.SIGKILL) == -signal.SIGKILL
        victim.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()

    assert not wrong, wrong
    assert [worker.wrong for worker in workers] == [[], []]
    for run_id, counted in {"run": sum((w.counted for w in workers), Counter()), **trained}.items():
        request = pb.ListPromptStatsRequest(run_id=run_id)
        pages = [replica.stub.ListPromptStats(request, timeout=60) for replica in replicas]
        assert dict(zip(pages[0].prompt_ids, pages[0].total_rollouts, strict=True)) == counted
        assert pages[0].SerializeToString() == pages[1].SerializeToString()
        assert pages[0].SerializeToString() == pages[2].SerializeToString()
    for worker in workers:
        # The newest ones: what is more than the horizon behind is answered anew.
        for request, answer in worker.allocations[-10:]:
            again = [replica.stub.Allocate(request, timeout=60) for replica in replicas]
            assert again == [answer] * REPLICAS


async def test_one_replica_goes_on_where_another_stopped(postgres, calls) -> None:
    """Waves, reports and rewinds of one run over three services at once, as over one."""
    answers = []
    for count in (1, 3):
        store = postgres.new_store()
        async with (
            open_service(store) as one,
            open_service(store) as two,
            open_service(store) as three,
        ):
            services = itertools.cycle([one, two, three][:count])
            seen = []
            for step in range(6):
                ids = ["a", "b", f"c{step}"]
                answer = await next(services).allocate(
                    calls.allocate(ids, 24, step, f"{count}-{step}", wave_fraction=0.5)
                )
                rewards = [[float((step + i) % 2)] * n for i, n in enumerate(answer.num_rollouts)]
                await next(services).report(calls.report(answer.allocation_id, rewards))
                second = await next(services).extend(calls.extend(answer.allocation_id))
                seen += [list(answer.num_rollouts), list(second.num_rollouts)]
                if step == 4:
                    run = await next(services).rewind_run(calls.rewind(2))
                    assert run.rewinds == 1
            request = pb.ListPromptStatsRequest(run_id="run")
            for service in (one, two, three):
                page = await service.list_prompt_stats(request)
                seen.append(page.SerializeToString())
            answers.append(seen)
    assert answers[0] == answers[1]


async def test_rewinds_race_reports_on_other_replicas_while_the_database_restarts(
    postgres, calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call is half done: every replica has what the journal has, and knows every report.

    Some workers' batches are large, and so decided before the run is held, and others' small.
    """
    monkeypatch.setattr(service_module, "_FEW", 6)
    store = postgres.new_store()
    reported: list[tuple[Any, Any]] = []
    reached = [asyncio.Event() for _ in range(61)]
    rewound = 0
    async with open_service(store) as one, open_service(store) as two, open_service(store) as three:
        services = [one, two, three]
        draw = random.Random(3)

        async def answer(method: str, request: Any) -> Any:
            while True:
                try:
                    return await getattr(draw.choice(services), method)(request)
                except Unavailable:
                    await asyncio.sleep(0.05)

        async def work(worker: int) -> None:
            for step in range(12):
                ids = [f"{worker}-{step % 3}", *SHARED[worker:]]
                request = calls.allocate(ids, 36, step, f"{worker}-{step}")
                made = await answer("allocate", request)
                rewards = [[float(draw.randrange(2)) for _ in range(n)] for n in made.num_rollouts]
                report = calls.report(made.allocation_id, rewards, f"{worker}-{step}")
                reported.append((report, await answer("report", report)))
                reached[len(reported)].set()

        async def rewind() -> None:
            nonlocal rewound
            for number in range(10):
                await reached[5 * number + 1].wait()
                request = calls.rewind(draw.randrange(12), f"rewind-{number}")
                run = await answer("rewind_run", request)
                rewound = max(rewound, run.rewinds)

        async def restart() -> None:
            for number in (1, 2):
                await reached[18 * number].wait()
                await asyncio.to_thread(postgres.stop)
                await asyncio.to_thread(postgres.start)

        await asyncio.gather(*(work(worker) for worker in range(5)), rewind(), restart())
        assert rewound == 10
        async with open_service(store) as fresh:
            seen = []
            for service in (*services, fresh):
                page = await service.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
                run = await service.get_run(pb.GetRunRequest(run_id="run"))
                seen.append((page.SerializeToString(), run.SerializeToString()))
            assert seen[1:] == seen[:1] * 3
            rollouts = sum(page.total_rollouts)
            for report, before in reported:
                again = await answer("report", report)
                assert again == before or again.ignored_rollouts == len(report.rewards)
            page = await fresh.list_prompt_stats(pb.ListPromptStatsRequest(run_id="run"))
            assert sum(page.total_rollouts) == rollouts > 0


async def test_a_replica_that_hangs_with_runs_locked_holds_up_no_other_run(postgres, calls) -> None:
    """Each call of a locked run takes a thread until it is refused; there are more of them."""
    store = postgres.new_store()
    locked = [f"run-{number}" for number in range(6)]
    async with open_service(store) as service:
        for calls.run_id in (*locked, "free"):
            await service.create_run(pb.CreateRunRequest(run_id=calls.run_id))
            await service.allocate(calls.allocate())
        hanging = sa.create_engine(store.replace("postgresql:", "postgresql+psycopg:"))
        with hanging.begin() as connection:
            connection.execute(
                sa.text("SELECT 1 FROM runs WHERE run_id LIKE 'run-%' FOR UPDATE")
            ).all()
            waiting = []
            for calls.run_id in locked:
                waiting.append(asyncio.ensure_future(service.allocate(calls.allocate(step=1))))
            count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while await asyncio.to_thread(postgres.sql, count) != "6":
                assert not any(call.done() for call in waiting)
            calls.run_id = "free"
            assert (await service.allocate(calls.allocate(step=1))).step == 1
            assert not any(call.done() for call in waiting)
        hanging.dispose()
        assert [(await call).step for call in waiting] == [1] * 6

"""Real schedulers and trainers that die, and every report counted exactly once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from knapsack_trainer_client import Allocation, BudgetClient, Run, SchedulerUnavailable

from real_scheduler import PATIENCE

IDS = [f"prompt-{i}" for i in range(6)]


def run_at(address: str) -> Run:
    """Return the run as the scheduler has it, asked by somebody with time."""
    with BudgetClient(address, "run", timeout=PATIENCE, outbox=False) as client:
        return client.run()


class Trainer:
    """Trains on random rewards and remembers what it reported."""

    def __init__(self, client: BudgetClient, address: str) -> None:
        self.client = client
        self.address = address
        self.random = random.Random(7)
        self.rollouts: Counter[str] = Counter()
        self.successes: Counter[str] = Counter()
        self.fallbacks: list[bool] = []

    def step(self, step: int) -> None:
        """Do one step in two waves and three reports."""
        batch = self.random.sample(IDS, 4)
        first = self.client.allocate(batch, 24, step, wave_fraction=0.5)
        self._report(first, range(2), step)
        self._report(first, range(2, 4), step)
        second = self.client.extend(first)
        self._report(second, range(4), step)
        assert sum(first.num_rollouts) + sum(second.num_rollouts) == 24
        self.fallbacks.append(first.is_fallback or second.is_fallback)

    def _report(self, allocation: Allocation, positions: range, step: int) -> None:
        rewards: list[list[float]] = [[] for _ in allocation.prompt_ids]
        for i in positions:
            for _ in range(allocation.num_rollouts[i]):
                reward = float(self.random.random() < 0.4)
                rewards[i].append(reward)
                self.rollouts[allocation.prompt_ids[i]] += 1
                self.successes[allocation.prompt_ids[i]] += int(reward)
        self.client.report(allocation, rewards, policy_version=step)

    def assert_counted_once(self) -> None:
        """Compare what was sent with what is known."""
        assert self.client.flush(PATIENCE)
        with BudgetClient(self.address, "run", timeout=PATIENCE, outbox=False) as client:
            stats = client.prompt_stats()
        assert {s.prompt_id: s.total_rollouts for s in stats} == dict(self.rollouts)
        assert {s.prompt_id: s.total_successes for s in stats if s.total_successes} == {
            p: n for p, n in self.successes.items() if n
        }


def test_training_goes_on_while_the_scheduler_is_killed(scheduler: Any) -> None:
    """Thirty steps with a kill -9 and a restart: uniform meanwhile, complete afterwards."""
    # The first call after the kill waits for all of the timeout, the later ones do not.
    with BudgetClient(scheduler.address, "run", timeout=5.0) as client:
        trainer = Trainer(client, scheduler.address)
        for step in range(30):
            if step == 10:
                scheduler.kill()
            if step == 20:
                scheduler.start()
                assert client.flush(PATIENCE)
            trainer.step(step)

        assert trainer.fallbacks[10:20] == [True] * 10
        assert trainer.fallbacks[20:] == [False] * 10
        trainer.assert_counted_once()
        stats = client.stats()
        assert stats.reports_queued == stats.reports_delivered >= 30
        assert stats.reports_dropped == stats.reports_refused == 0


def test_kills_at_any_moment_lose_and_double_nothing(
    scheduler: Any, until: Callable[[Callable[[], object]], None]
) -> None:
    """Kills between, before and during calls leave every report counted exactly once."""
    done = threading.Event()
    steps = threading.Semaphore(0)
    failures: list[BaseException] = []

    def kill_and_restart(client: BudgetClient) -> None:
        moments = random.Random(3)
        try:
            for number in range(4):
                # Amid a step, whichever call of it is under way.
                assert steps.acquire(timeout=PATIENCE)
                done.wait(moments.uniform(0.0, 0.1))
                scheduler.kill()
                # Back before the client notices, or after.
                if number % 2:
                    until(lambda: client.stats().breaker_open)
                scheduler.start()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    with BudgetClient(scheduler.address, "run", timeout=0.5) as client:
        trainer = Trainer(client, scheduler.address)
        killer = threading.Thread(target=kill_and_restart, args=(client,))
        killer.start()
        step = 0
        while not done.is_set():
            trainer.step(step)
            steps.release()
            step += 1
        killer.join()

        assert not failures
        assert client.stats().fallbacks > 0
        trainer.assert_counted_once()


def test_frozen_scheduler_holds_up_nobody(
    scheduler: Any, until: Callable[[Callable[[], object]], None]
) -> None:
    """A scheduler that is stopped and goes on answers late calls without counting twice."""
    with BudgetClient(scheduler.address, "run", timeout=0.5) as client:
        trainer = Trainer(client, scheduler.address)
        trainer.step(0)
        scheduler.pause()
        for step in range(1, 4):
            trainer.step(step)
        assert client.stats().breaker_open
        scheduler.resume()
        until(lambda: not client.stats().breaker_open)
        assert client.flush(PATIENCE)
        trainer.step(4)
        trainer.assert_counted_once()


def test_scheduler_that_lost_its_store_learns_again(scheduler: Any) -> None:
    """Training goes on with an empty store, and late reports still count."""
    with BudgetClient(scheduler.address, "run", timeout=PATIENCE) as client:
        old = client.allocate(IDS, 24, 0, wave_fraction=0.5)
        scheduler.kill()
        scheduler.lose_store()
        scheduler.start()

        assert client.report(old, [[1.0] * n for n in old.num_rollouts]).delivered
        extension = client.extend(old)
        assert extension.is_fallback
        assert client.report(extension, [[1.0] * n for n in extension.num_rollouts]).delivered
        assert not client.allocate(IDS, 24, 1).is_fallback
        assert sum(s.total_rollouts for s in client.prompt_stats()) == 24


TRAINER = """
import json, sys
from knapsack_trainer_client import BudgetClient
client = BudgetClient(sys.argv[1], "run", timeout=0.3)
for step in range(5):
    allocation = client.allocate(["a", "b"], 8, step)
    client.report(allocation, [[1.0] * n for n in allocation.num_rollouts])
print(json.dumps(client.pending_reports), flush=True)
sys.stdin.read()
"""


def test_next_trainer_delivers_what_a_killed_one_queued(scheduler: Any) -> None:
    """Reports outlive kill -9 of the trainer, and a rewind of the next one binds them."""
    scheduler.kill()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, scheduler.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    assert json.loads(trainer.stdout.readline()) == 5
    trainer.kill()
    trainer.wait(PATIENCE)
    trainer.stdin.close()
    trainer.stdout.close()
    scheduler.start()

    with BudgetClient(scheduler.address, "run", timeout=PATIENCE) as client:
        assert client.flush(PATIENCE)
        assert client.run().total_rollouts == 40
        run = client.rewind(2)
        assert run is not None
        assert run.total_rollouts == 24


def test_ranks_share_an_outbox(scheduler: Any, tmp_path: Any) -> None:
    """Several clients of one run and one file deliver each report once."""
    scheduler.kill()
    outbox = tmp_path / "shared.outbox"
    ranks = [BudgetClient(scheduler.address, "run", timeout=0.3, outbox=outbox) for _ in range(3)]
    for step in range(4):
        for rank in ranks:
            allocation = rank.allocate(["a", "b"], 4, step)
            rank.report(allocation, [[1.0] * n for n in allocation.num_rollouts])
    scheduler.start()
    assert all(rank.flush(PATIENCE) for rank in ranks)
    assert run_at(scheduler.address).total_rollouts == 48
    assert sum(rank.stats().reports_delivered for rank in ranks) >= 12
    for rank in ranks:
        rank.close()


def test_the_health_port_is_told_from_an_outage(shared_scheduler: Any) -> None:
    """An address that answers without a scheduler behind it is named as such."""
    with (
        BudgetClient(
            shared_scheduler.health_address,
            "run",
            timeout=PATIENCE,
            on_unavailable="raise",
            outbox=False,
        ) as client,
        pytest.raises(SchedulerUnavailable, match="is it a health port"),
    ):
        client.allocate(IDS, 24, 0)


def test_two_trainings_of_one_run_are_told(
    shared_scheduler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A rewind by another client says so at the first report that it costs; its own does not."""
    address = shared_scheduler.address
    first, second = (BudgetClient(address, "twice", timeout=PATIENCE) for _ in range(2))
    with first, second:
        before = first.allocate(IDS, 12, 3)
        first.rewind(2)
        assert first.report(before, [[1.0] * 2] * 6).ignored_rollouts == 12
        assert "another client" not in caplog.text

        allocation = first.allocate(IDS, 12, 3)
        second.rewind(-1)
        assert first.report(allocation, [[1.0] * 2] * 6).ignored_rollouts == 12
    assert "rewound by another client while step 3 was generated; its 12 rollouts" in caplog.text

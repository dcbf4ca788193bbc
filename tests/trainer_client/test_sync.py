"""What is special about the client with a thread of its own: threads, forks, exits."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from knapsack_trainer_client import (
    AsyncBudgetClient,
    BudgetClient,
    ClientMisuse,
    ExtraMissing,
    InvalidRequest,
)
from knapsack_trainer_client.events import Event

IDS = ["a", "b", "c", "d"]


def script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_threads_may_share_a_client(scripted: Any) -> None:
    """Calls from many threads each get their own answer."""
    with BudgetClient(scripted.address, "run", timeout=20) as client:
        with ThreadPoolExecutor(8) as pool:
            steps = pool.map(lambda step: client.allocate(IDS, 8, step).step, range(40))
        assert list(steps) == list(range(40))


def test_client_works_inside_a_running_loop(scripted: Any) -> None:
    """Notebooks run a loop already, which does not matter."""
    import asyncio

    async def cell() -> bool:
        with BudgetClient(scripted.address, "run", timeout=20) as client:
            return client.allocate(IDS, 8, 0).is_fallback

    assert asyncio.run(cell()) is False


def test_closing_ends_calls_of_other_threads(
    scripted: Any, until: Callable[[Callable[[], object]], None]
) -> None:
    """A thread that waits for an answer does not wait for ever."""
    hang = threading.Event()
    scripted.scheduler.always("Allocate", hang)
    client = BudgetClient(scripted.address, "run", timeout=60)
    ended: list[object] = []

    def call() -> None:
        try:
            ended.append(client.allocate(IDS, 8, 0))
        except ClientMisuse as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: scripted.scheduler.names())
    client.close()
    thread.join(60)
    hang.set()

    assert not thread.is_alive()
    assert len(ended) == 1


def test_closed_client_says_so(scripted: Any) -> None:
    """Calls after close are a mistake; a second close is none."""
    client = BudgetClient(scripted.address, "run", timeout=20)
    client.allocate(IDS, 8, 0)
    client.close()
    client.close()
    with pytest.raises(ClientMisuse, match="closed"):
        client.allocate(IDS, 8, 0)


def test_forgotten_client_leaves_no_thread(
    scripted: Any, until: Callable[[Callable[[], object]], None]
) -> None:
    """A client that nobody refers to ends its thread."""

    def threads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("knapsack-rl")}

    before = threads()
    client = BudgetClient(scripted.address, "run")
    client.allocate(IDS, 8, 0)
    assert threads() - before
    del client
    gc.collect()
    until(lambda: not threads() - before)


def test_hook_may_not_call_the_client(scripted: Any) -> None:
    """A call that would wait for itself is refused instead."""
    refused: list[Exception] = []

    def hook(event: Event) -> None:
        try:
            client.flush(1.0)
        except ClientMisuse as error:
            refused.append(error)

    client = BudgetClient(scripted.address, "run", timeout=20, on_event=hook)
    client.allocate(IDS, 8, 0)
    client.close()
    assert len(refused) == 1


@pytest.mark.parametrize("kind", [BudgetClient, AsyncBudgetClient])
def test_client_cannot_be_pickled(scripted: Any, kind: Any) -> None:
    """A spawned worker makes its own client, and is told so."""
    client = kind(scripted.address, "run")
    with pytest.raises(ClientMisuse, match="pickled"):
        pickle.dumps(client)
    if kind is BudgetClient:
        client.close()


FORK = """
import os, sys
from knapsack_trainer_client import BudgetClient, ClientMisuse
client = BudgetClient(sys.argv[1], "run", timeout=20)
assert not client.allocate(["a"], 4, 0).is_fallback
child = os.fork()
if child == 0:
    try:
        client.allocate(["a"], 4, 1)
    except ClientMisuse as error:
        assert "fork" in str(error)
        client.close()
        own = BudgetClient(sys.argv[1], "run", timeout=20)
        own.allocate(["a"], 4, 2)
        own.close()
        sys.exit(7)
    sys.exit(1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert not client.allocate(["a"], 4, 3).is_fallback
client.close()
print("parent is fine")
"""


def test_forked_child_is_told_to_make_its_own(scripted: Any) -> None:
    """The child's call raises at once, its exit is clean, and the parent goes on."""
    result = script(FORK, scripted.address)
    assert result.stdout == "parent is fine\n", result.stderr
    assert result.returncode == 0
    assert 3 in [r.step for n, r in scripted.scheduler.calls if n == "Allocate"]


UNCLOSED = """
import sys
from knapsack_trainer_client import BudgetClient
if sys.argv[1] == "embedded":
    client = BudgetClient.embedded(sys.argv[2], "run", timeout=20)
else:
    client = BudgetClient(sys.argv[1], "run", timeout=20)
allocation = client.allocate(["a", "b"], 4, 0)
print(client.report(allocation, [[1, 0], [1, 0]]).delivered)
"""


@pytest.mark.parametrize("kind", ["server", "embedded"])
def test_script_without_close_ends_cleanly(scripted: Any, tmp_path: Path, kind: str) -> None:
    """Forgetting close costs nothing: no hang, no traceback, nothing lost."""
    where = "embedded" if kind == "embedded" else scripted.address
    result = script(UNCLOSED, where, str(tmp_path / "stats.db"))
    assert (result.stdout, result.stderr, result.returncode) == ("True\n", "", 0)
    if kind == "embedded":
        with BudgetClient.embedded(tmp_path / "stats.db", "run", timeout=20) as client:
            assert client.run().total_rollouts == 4


def _use(address: str, results: Any) -> None:
    with BudgetClient(address, "run", timeout=30) as client:
        results.put(client.allocate(IDS, 8, 0).num_rollouts)


def test_spawned_workers_have_their_own_clients(scripted: Any) -> None:
    """Ranks in processes of their own each get an answer."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_use, args=(scripted.address, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert [results.get() for _ in ranks] == [[2, 2, 2, 2]] * 2
    results.close()


def test_embedded_store_is_held_by_one(tmp_path: Path) -> None:
    """A second embedded client of the same store is refused in words."""
    with (
        BudgetClient.embedded(tmp_path / "stats.db", "run"),
        pytest.raises(InvalidRequest, match="store"),
    ):
        BudgetClient.embedded(tmp_path / "stats.db", "run")


def test_embedded_store_must_be_a_place(tmp_path: Path) -> None:
    """A store that cannot be opened is refused when the client is made."""
    (tmp_path / "file").touch()
    for store in (tmp_path / "file" / "stats.db", "nosuch://x", ""):
        with pytest.raises(InvalidRequest, match="store"):
            BudgetClient.embedded(store, "run")


WITHOUT_SCHEDULER = """
import sys
sys.modules["sqlalchemy"] = None
from knapsack_trainer_client import BudgetClient, ExtraMissing
try:
    BudgetClient.embedded(sys.argv[1], "run")
except ExtraMissing as error:
    print(error)
"""


def test_missing_extra_names_the_command(tmp_path: Path) -> None:
    """Without the scheduler's packages the error says what to install."""
    assert issubclass(ExtraMissing, ImportError)
    result = script(WITHOUT_SCHEDULER, str(tmp_path / "stats.db"))
    assert "pip install 'knapsack-rl[scheduler]'" in result.stdout, result.stderr

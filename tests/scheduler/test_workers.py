"""Work goes to a thread and its answer back, and somebody is told of it in any case."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from knapsack_scheduler.errors import Busy
from knapsack_scheduler.workers import Workers

from gates import LONG, Gate


@pytest.fixture
def workers() -> Iterator[Workers]:
    """One thread, for which nobody waits long."""
    made = Workers("tests", 1, patience=0.0)
    yield made
    made.close()


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[Any, type[BaseException] | None]] = []
        self.came = asyncio.Event()

    def __call__(self, answer: Any, error: BaseException | None) -> None:
        """Take note of an outcome."""
        assert threading.current_thread() is threading.main_thread()
        self.outcomes.append((answer, type(error) if error else None))
        self.came.set()


async def test_an_answer_and_an_error_are_told_once(workers: Workers) -> None:
    """After the caller, in the same turn of the event loop."""
    told = Told()
    assert await workers.run(lambda: 7, told) == 7
    assert told.outcomes == []
    await asyncio.sleep(0)
    assert told.outcomes == [(7, None)]
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0, told)
    await asyncio.sleep(0)
    assert told.outcomes == [(7, None), (None, ZeroDivisionError)]


async def test_work_of_a_caller_who_has_gone_is_told_of(workers: Workers, gate: Gate) -> None:
    """It had begun, so it is finished."""
    told = Told()
    work = gate.before(lambda: 7, lambda: True)
    caller = asyncio.ensure_future(workers.run(work, told))
    await gate.reached()
    caller.cancel()
    await asyncio.wait([caller])
    assert told.outcomes == []
    gate.open()
    await asyncio.wait_for(told.came.wait(), LONG)
    assert told.outcomes == [(7, None)]
    assert await workers.run(lambda: 8, told) == 8


async def test_work_that_cannot_be_begun_is_told_of(workers: Workers, gate: Gate) -> None:
    """No thread came free, or the caller did not wait for one, or there are none any more."""
    told = Told()
    held = asyncio.ensure_future(workers.run(gate.before(lambda: 7, lambda: True)))
    await gate.reached()
    with pytest.raises(Busy, match="were busy"):
        await workers.run(lambda: 1 // 0, told)
    patient = Workers("tests", 1)
    patient._free = workers._free
    waiting = asyncio.ensure_future(patient.run(lambda: 1 // 0, told))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    gate.open()
    assert await held == 7
    patient.close()
    with pytest.raises(RuntimeError, match="are closed"):
        await patient.run(lambda: 1 // 0, told)
    assert told.outcomes == [(None, Busy), (None, asyncio.CancelledError), (None, RuntimeError)]
    assert await workers.run(lambda: 8) == 8


async def test_an_answer_comes_even_if_who_is_told_fails(workers: Workers) -> None:
    """The caller would wait for ever; the event loop logs what went wrong."""
    failed: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failed.append(context))

    def then(_answer: Any, _error: BaseException | None) -> None:
        raise KeyError

    assert await workers.run(lambda: 7, then) == 7
    await asyncio.sleep(0)
    assert [type(each["exception"]) for each in failed] == [KeyError]
    assert await workers.run(lambda: 8) == 8

"""Nobody waits for ever for their turn at a run."""

from __future__ import annotations

import asyncio

import pytest

from knapsack_scheduler.errors import Busy
from knapsack_scheduler.turns import Turns


async def test_who_comes_as_a_turn_passes_on_waits_no_longer_than_others() -> None:
    """The turn is nobody's for a moment, between who ended it and who is to have it next."""
    turns = Turns(patience=0.01)
    await turns.take("run")
    following = asyncio.create_task(turns.take("run"))
    await asyncio.sleep(0)
    turns.end("run")
    async with asyncio.timeout(30):
        with pytest.raises(Busy, match="took longer than"):
            await turns.take("run")
    await following
    turns.end("run")
    assert len(turns) == 0

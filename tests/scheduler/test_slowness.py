"""What slowness leaves in the log."""

from __future__ import annotations

import logging

import pytest

from knapsack_scheduler.events import CallHandled, LoopLagged
from knapsack_scheduler.logs import SLOW_SECONDS, log_event


@pytest.mark.parametrize(
    ("method", "seconds", "told"),
    [
        ("Report", SLOW_SECONDS, True),
        ("Report", SLOW_SECONDS / 2, False),
        ("ImportOutcomes", 60.0, False),
    ],
)
def test_a_slow_call_is_told_with_its_time(
    caplog: pytest.LogCaptureFixture, method: str, seconds: float, told: bool
) -> None:
    """Whoever looks for what was slow finds the run; an import takes as long as its caller."""
    with caplog.at_level(logging.INFO):
        log_event(CallHandled(method, "OK", seconds, "run", "call"))
    assert [record.message for record in caplog.records] == ["call was slow"] * told
    if told:
        [fields] = [vars(record)["fields"] for record in caplog.records]
        assert (fields["run_id"], fields["milliseconds"]) == ("run", seconds * 1e3)


def test_a_blocked_event_loop_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its calls may have come after it and were quick; a usual delay is no news."""
    with caplog.at_level(logging.INFO):
        for seconds in (SLOW_SECONDS / 2, 2.5):
            log_event(LoopLagged(seconds))
    [record] = caplog.records
    assert record.message.startswith("event loop was blocked")
    assert vars(record)["fields"] == {"seconds": 2.5}

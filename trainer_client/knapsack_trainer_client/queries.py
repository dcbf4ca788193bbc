"""Calls that read the scheduler and have no fallback: they are not part of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from knapsack_trainer_client import wire
from knapsack_trainer_client.calls import Caller, Deadline, NotFound, Refused, Unanswered
from knapsack_trainer_client.errors import InvalidRequest, SchedulerUnavailable
from knapsack_trainer_client.nouns import PromptStats, Run


async def fetch_prompt_stats(caller: Caller, run_id: str, timeout: float) -> list[PromptStats]:
    """Return what is known of every prompt of a run, ordered by prompt id.

    Fetched in pages, each within ``timeout`` seconds. Raises what ``Caller.call`` raises.
    """
    stats: list[PromptStats] = []
    token = ""
    while True:
        request = wire.list_prompt_stats_request(run_id, token)
        page = await caller.call(wire.LIST_PROMPT_STATS, request, Deadline.after(timeout))
        stats.extend(wire.to_prompt_stats(page))
        token = page.next_page_token
        if not token:
            return stats


async def fetch_run(caller: Caller, run_id: str, timeout: float) -> Run:
    """Return a run, within ``timeout`` seconds. Raises what ``Caller.call`` raises."""
    request = wire.get_run_request(run_id)
    return wire.to_run(await caller.call(wire.GET_RUN, request, Deadline.after(timeout)))


async def fetch_runs(caller: Caller, timeout: float) -> list[Run]:
    """Return every run, ordered by run id.

    Fetched in pages, each within ``timeout`` seconds. Raises what ``Caller.call`` raises.
    """
    runs: list[Run] = []
    token = ""
    while True:
        request = wire.list_runs_request(token)
        page = await caller.call(wire.LIST_RUNS, request, Deadline.after(timeout))
        runs.extend(wire.to_run(run) for run in page.runs)
        token = page.next_page_token
        if not token:
            return runs


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    """Turn the failures of calls into the errors that a caller of the package may catch."""
    try:
        yield
    except Refused as error:
        raise InvalidRequest(str(error)) from None
    except NotFound as error:
        raise InvalidRequest(str(error) or "not found") from None
    except Unanswered as failure:
        raise SchedulerUnavailable(failure.reason) from None

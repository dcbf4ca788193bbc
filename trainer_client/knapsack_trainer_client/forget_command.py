"""``knapsack-rl rewind`` and ``delete``: what makes a run forget, after asking back."""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Awaitable
from typing import TypeVar

from knapsack_trainer_client import wire
from knapsack_trainer_client.arguments import LARGEST
from knapsack_trainer_client.calls import Caller, Deadline, NotFound, Unanswered
from knapsack_trainer_client.connection import SECONDS, ask
from knapsack_trainer_client.errors import InvalidRequest, KnapsackError
from knapsack_trainer_client.events import CallRetried, Event
from knapsack_trainer_client.nouns import Run
from knapsack_trainer_client.queries import fetch_run, fetch_runs
from knapsack_trainer_client.tables import counted, step_or_dash, table
from knapsack_trainer_client.terminal import printable

CHANGE_SECONDS = 60.0
"""Longest wait for a rewind or a deletion, unless ``--timeout`` says otherwise."""

AnswerT = TypeVar("AnswerT")

DECLINED = 1
"""Exit code where the person said no."""


class ChangeUnknown(KnapsackError):
    """A change was asked for and no answer came."""


def step_to_keep(text: str) -> int:
    """Return the step of a flag, -1 or more."""
    try:
        step = int(text)
    except ValueError:
        step = -2
    if not -1 <= step <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a whole number, -1 or more: the last step to keep; -1 keeps none"
        )
    return step


def rewind(arguments: argparse.Namespace) -> int:
    """Rewind a run and say what is left of it; returns the exit code."""
    before = ask(arguments, lambda caller: _look(caller, arguments))
    lost = isinstance(before, str) or before.last_step > arguments.step
    steps = "all its steps" if arguments.step < 0 else f"all steps after {arguments.step}"
    if lost and not _agreed(arguments, before, f"Forget {steps}, for good?"):
        return DECLINED

    async def change(caller: Caller) -> Run:
        request = wire.rewind_request(arguments.run, uuid.uuid4().hex, arguments.step)
        return wire.to_run(await caller.call(wire.REWIND_RUN, request, _end_of(arguments)))

    after = ask(arguments, lambda caller: _sure(change(caller), "the rewind"), _Retries())
    where = "its beginning" if arguments.step < 0 else f"step {arguments.step}"
    print(f"run {_quoted(after.run_id)}: rewound to {where}")
    print(_compared([before, after] if isinstance(before, Run) else [after]))
    print(
        "Reports of forgotten steps that still come are ignored, and counted as such."
        if lost
        else "It had not gone further, so nothing is forgotten."
    )
    return 0


def delete(arguments: argparse.Namespace) -> int:
    """Delete a run; returns the exit code."""
    before = ask(arguments, lambda caller: _look(caller, arguments))
    if not _agreed(arguments, before, "Delete it, for good?"):
        return DECLINED

    async def change(caller: Caller) -> None:
        try:
            request = wire.delete_run_request(arguments.run)
            await caller.call(wire.DELETE_RUN, request, _end_of(arguments))
        except NotFound:
            # It was there a moment ago: the answer to the first attempt was lost.
            pass

    ask(arguments, lambda caller: _sure(change(caller), "the deletion"), _Retries())
    print(f"deleted {_described(arguments.run, before)}")
    return 0


class _Retries:
    """Says once why a call is tried again: a change may take long."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallRetried) and not self._said:
            self._said = True
            print(f"trying again: {' '.join(event.reason.split())}", file=sys.stderr)


async def _look(caller: Caller, arguments: argparse.Namespace) -> Run | str:
    """Return the run, or why the scheduler cannot read it: a damaged one can be deleted."""
    seconds = arguments.timeout or SECONDS
    try:
        return await fetch_run(caller, arguments.run, seconds)
    except Unanswered as failure:
        # The status of a damaged run is that of a scheduler that is away; the list knows it.
        if not any(run.run_id == arguments.run for run in await fetch_runs(caller, seconds)):
            raise
        return failure.reason


async def _sure(change: Awaitable[AnswerT], noun: str) -> AnswerT:
    """Await a change; where no answer comes, say that it may have been made."""
    try:
        return await change
    except Unanswered as failure:
        if not failure.unreachable:
            raise
        raise ChangeUnknown(
            f"whether {noun} was made is not known ({failure.reason}): look with knapsack-rl runs, "
            "and ask again if it was not"
        ) from None


def _end_of(arguments: argparse.Namespace) -> Deadline:
    return Deadline.after(arguments.timeout or CHANGE_SECONDS)


def _agreed(arguments: argparse.Namespace, before: Run | str, question: str) -> bool:
    """Return whether the person wants it, who is asked unless ``--yes`` was given."""
    if arguments.yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidRequest("it cannot be undone, and there is no terminal to ask at: add --yes")
    print(_described(arguments.run, before), file=sys.stderr)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = ""
    try:
        answer = sys.stdin.readline()
    finally:
        if not answer.endswith("\n"):
            # Ctrl-C or Ctrl-D: what is said next begins a line.
            print(file=sys.stderr)
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("nothing was changed", file=sys.stderr)
    return False


def _described(run_id: str, run: Run | str) -> str:
    if isinstance(run, str):
        return f"run {_quoted(run_id)}, which could not be read ({' '.join(run.split())})"
    figures = [
        f"step {run.last_step}" if run.last_step >= 0 else "no step yet",
        counted(run.known_prompts, "known prompt"),
        counted(run.total_rollouts, "rollout"),
    ]
    return f"run {_quoted(run_id)}: {', '.join(figures)}"


def _quoted(run_id: str) -> str:
    return f"'{printable(run_id)}'"


def _compared(runs: list[Run]) -> str:
    figures = {
        "last step": [step_or_dash(run.last_step) for run in runs],
        "policy version": [str(run.last_policy_version) for run in runs],
        "known prompts": [f"{run.known_prompts:,}" for run in runs],
        "rollouts": [f"{run.total_rollouts:,}" for run in runs],
        "ignored": [f"{run.ignored_rollouts:,}" for run in runs],
        "rewinds": [f"{run.rewinds:,}" for run in runs],
    }
    heads = ["", *(["before", "now"] if len(runs) == 2 else ["now"])]
    return table(heads, [[name, *row] for name, row in figures.items()], left={0})

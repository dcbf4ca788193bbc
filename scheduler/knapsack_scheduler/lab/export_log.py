"""What ``knapsack-scheduler export`` wrote, as a log of outcomes.

The recorded calls hold everything a log needs: the prompts of each allocation, its step,
and the rewards of its reports. A rewind forgets what came after its step, as the run did.
Imported outcomes are not in an export one by one; they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_scheduler.core.problem import FloatArray, IntArray
from knapsack_scheduler.lab.log_columns import LogError
from knapsack_scheduler.lab.log_files import json_objects, open_bytes

_KINDS = ("allocate", "extend", "report", "rewind", "import")


@dataclass(frozen=True, slots=True)
class ExportedReport:
    """The rollouts of one report, parallel.

    Attributes:
        steps: int64[n].
        prompt_ids: of each rollout.
        rewards: float64[n], NaN for a rollout that never finished.
        tokens: float64[n], NaN where unknown; None if the report had none.
    """

    steps: IntArray
    prompt_ids: list[str]
    rewards: FloatArray
    tokens: FloatArray | None


def is_export(path: Path) -> bool:
    """Return whether a file begins as an export of recorded calls does."""
    if not {".jsonl", ".ndjson", ".json"} & {suffix.lower() for suffix in path.suffixes}:
        return False
    try:
        with open_bytes(path) as file:
            first = json.loads(file.readline() or b"0")
    except (ValueError, OSError, EOFError):
        return False
    return isinstance(first, dict) and "seq" in first and first.get("kind") in _KINDS


def read_export(path: Path) -> Iterator[ExportedReport]:
    """Yield the reports of an exported run that no rewind forgot, in their order.

    Raises:
        LogError: a line is not a recorded call.
    """
    allocations: dict[str, tuple[int, list[str]]] = {}
    kept: list[tuple[int, dict[str, Any], str]] = []
    for _, calls, numbers in json_objects(path):
        for call, number in zip(calls, numbers, strict=True):
            where = f"{path}, line {number}"
            try:
                kind, request = call["kind"], call.get("request", {})
                if kind == "allocate":
                    step = int(request.get("step", 0))
                    allocations[call["answer"]["allocation_id"]] = step, request["prompt_ids"]
                elif kind == "rewind":
                    last = int(request.get("step", 0))
                    kept = [one for one in kept if one[0] <= last]
                elif kind == "report":
                    if int(call["answer"].get("ignored_rollouts", 0)) == 0:
                        named = request.get("allocation_id")
                        step = allocations[named][0] if named else int(request.get("step", 0))
                        kept.append((step, request, where))
                elif kind not in _KINDS:
                    raise ValueError(f"kind is one of {', '.join(_KINDS)}")
            except (KeyError, TypeError, ValueError) as error:
                raise _not_a_call(where, error) from None
    for step, request, where in kept:
        try:
            yield _report(step, request, allocations)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _not_a_call(where, error) from None


def _report(
    step: int, request: dict[str, Any], allocations: dict[str, tuple[int, list[str]]]
) -> ExportedReport:
    rewards = np.array(request.get("rewards", ()), np.float64)
    named = request.get("allocation_id")
    prompt_ids = allocations[named][1] if named else request["prompt_ids"]
    places, counts = request.get("prompt_indices", ()), request.get("num_rewards", ())
    of = [prompt_ids[at] for at, n in zip(places, counts, strict=True) for _ in range(n)]
    if len(of) != rewards.size:
        raise ValueError(f"num_rewards add up to {len(of)} for {rewards.size} rewards")
    lengths = request.get("completion_tokens")
    tokens = None if lengths is None else np.array(lengths, np.float64)
    if tokens is not None and tokens.size != rewards.size:
        raise ValueError(f"{tokens.size} completion_tokens for {rewards.size} rewards")
    return ExportedReport(np.full(rewards.size, step, np.int64), of, rewards, tokens)


def _not_a_call(where: str, error: Exception) -> LogError:
    return LogError(f"{where}: not a call as export writes them: {type(error).__name__}: {error}")

"""Checks of request fields: each refusal names the field, its value and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from knapsack_scheduler.core.problem import IntArray
from knapsack_scheduler.errors import InvalidArgument
from knapsack_scheduler.limits import Limits

_NAME_LENGTH = 256
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LARGEST_INT32 = 2**31 - 1
LARGEST_INT64 = 2**63 - 1


def name(field: str, value: str) -> str:
    """Return an id of a run or a call: 1 to 256 characters, none of them a control."""
    if not value:
        raise InvalidArgument(field, value, "is required")
    if len(value) > _NAME_LENGTH:
        raise InvalidArgument(field, value, f"must have at most {_NAME_LENGTH} characters")
    # What is printable holds none, and is told sooner than by a pattern.
    if not value.isprintable() and _CONTROL.search(value):
        raise InvalidArgument(field, value, "must not contain control characters")
    return value


def within(field: str, value: int, low: int, high: int) -> int:
    """Return a whole number within bounds."""
    if not low <= value <= high:
        raise InvalidArgument(field, value, f"must be from {low} to {high}")
    return value


def fraction(field: str, value: float) -> float:
    """Return a number from 0 to 1."""
    if not 0.0 <= value <= 1.0:
        raise InvalidArgument(field, value, "must be from 0 to 1")
    return value


def discount(field: str, value: float) -> float:
    """Return a number above 0 and at most 1."""
    if not 0.0 < value <= 1.0:
        raise InvalidArgument(field, value, "must be above 0 and at most 1")
    return value


def finite(field: str, value: float) -> float:
    """Return a finite number."""
    if not math.isfinite(value):
        raise InvalidArgument(field, value, "must be a finite number")
    return value


def prompts(field: str, values: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """Return the prompt ids of a call: at least one, none of them empty or too long."""
    count = len(values)
    if count == 0:
        raise InvalidArgument(field, [], "must name at least one prompt")
    if count > limits.prompts:
        raise InvalidArgument(
            field, f"{count} prompts", f"must be at most {limits.prompts} in one call"
        )
    ids = tuple(values)
    if not all(ids):
        raise InvalidArgument(f"{field}[{ids.index('')}]", "", "must not be empty")
    if max(map(len, ids)) > limits.id_length:
        longest = max(ids, key=len)
        raise InvalidArgument(
            f"{field}[{ids.index(longest)}]",
            longest,
            f"must have at most {limits.id_length} characters",
        )
    return ids


def per_position(field: str, values: Sequence[int], count: int, default: int) -> IntArray:
    """Return one bound per position, int64[count], from none, one, or one each."""
    if len(values) not in (0, 1, count):
        raise InvalidArgument(
            field,
            f"{len(values)} numbers",
            f"must be empty, one number, or one per prompt ({count})",
        )
    if not len(values):
        return np.full(count, default, np.int64)
    given = np.asarray(values, np.int64)
    if given.min() < 0:
        at = int(np.argmax(given < 0))
        raise InvalidArgument(f"{field}[{at}]", int(given[at]), "must be 0 or more")
    return np.array(np.broadcast_to(given, (count,)))


def reward_positions(
    indices: Sequence[int], counts: Sequence[int], count: int, rewards: int
) -> tuple[IntArray, IntArray, int]:
    """Return positions and how many rewards each has, int64[k] both, and the highest position.

    That is 0 if there are none.
    """
    places = np.asarray(indices, np.int64)
    each = np.asarray(counts, np.int64)
    if places.size != each.size:
        raise InvalidArgument(
            "num_rewards",
            f"{each.size} numbers",
            f"must be one for each of prompt_indices ({places.size})",
        )
    highest = _highest(places)
    within_positions(places, highest, count)
    return places, reward_counts(each, rewards), highest


def within_positions(places: IntArray, highest: int, count: int) -> None:
    """Refuse positions, int64[k], that are not among so many; ``highest`` is of ``_highest``."""
    if places.size and highest >= count:
        at = int(np.argmax((places < 0) | (places >= count)))
        raise InvalidArgument(
            f"prompt_indices[{at}]", int(places[at]), f"must be from 0 to {count - 1}"
        )


def _highest(numbers: IntArray) -> int:
    """Return the highest of some numbers, where those below 0 are beyond all others.

    One pass instead of two: NumPy takes longer to begin one than for some hundred numbers.
    """
    return int(np.maximum.reduce(numbers.view(np.uint64), initial=0))


def reward_counts(each: IntArray, rewards: int) -> IntArray:
    """Return how many rewards belong to each position, checked against how many came."""
    if _highest(each) > LARGEST_INT64:
        at = int(np.argmax(each < 0))
        raise InvalidArgument(f"num_rewards[{at}]", int(each[at]), "must be 0 or more")
    if int(each.sum()) != rewards:
        raise InvalidArgument(
            "num_rewards",
            f"a sum of {int(each.sum())}",
            f"must add up to the number of rewards ({rewards})",
        )
    return each

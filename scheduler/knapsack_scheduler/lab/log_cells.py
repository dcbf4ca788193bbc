"""The cells of a log's columns: what a step, a prompt, a reward and a length may look like.

Columns that are plain numbers or plain text are taken as whole arrays; only where that
fails is every cell looked at by itself, which also finds the one to blame.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray
from knapsack_scheduler.lab.log_columns import LogError

LARGEST_STEP = 2**53
"""Beyond it a step read from a number with a point would not be exact."""

LONGEST_KEPT_ID = 200
"""A longer prompt id, such as a prompt's whole text, is kept by its first words and a hash."""

Place = Callable[[int], str]
"""Names the place in the log of the i-th row of a batch."""

_Value = TypeVar("_Value")
_ABSENT = {"", "nan", "none", "null", "na", "n/a"}
_TRUTH = {"true": 1.0, "false": 0.0}


def parse_steps(cells: Sequence[Any], column: str, place: Place) -> IntArray:
    """Return steps, int64[n]; LogError where one is not a whole number of 0 or more."""
    try:
        whole = np.array(cells, np.float64)
    except (TypeError, ValueError, OverflowError):
        whole = np.array([np.nan])
    if whole.ndim == 1 and whole.size == len(cells) and bool(_is_step(whole).all()):
        return whole.astype(np.int64)
    allowed = f"must be a whole number from 0 to {LARGEST_STEP}"
    return np.array(_each(cells, column, place, allowed, _step), np.int64)


def parse_rewards(cells: Sequence[Any], column: str, place: Place) -> FloatArray | list[FloatArray]:
    """Return rewards, float64[n] with NaN where there is none, or a list of them per row.

    A list comes back when any cell holds a list: then every row is a whole group.

    Raises:
        LogError: a cell is neither a finite number nor empty.
    """
    try:
        rewards = np.array(cells, np.float64)
    except (TypeError, ValueError, OverflowError):
        rewards = np.array([np.inf])
    if rewards.ndim == 1 and rewards.size == len(cells) and not np.isinf(rewards).any():
        return rewards
    allowed = (
        "must be a finite number, true, false or a list of them; leave it empty, null or NaN "
        "for a rollout that never finished"
    )
    parsed = _each(cells, column, place, allowed, _reward)
    if any(isinstance(value, np.ndarray) for value in parsed):
        return [np.atleast_1d(np.asarray(value, np.float64)) for value in parsed]
    return np.array(parsed, np.float64)


def parse_tokens(cells: Sequence[Any], column: str, place: Place) -> FloatArray | list[FloatArray]:
    """Return lengths, float64[n] with NaN where there is none, or a list of them per row."""
    tokens = parse_rewards(cells, column, place)
    parts = tokens if isinstance(tokens, list) else [tokens]
    for at, part in enumerate(parts):
        wrong = (part < 0) | (part > 2**31 - 1)
        if wrong.any():
            row = at if isinstance(tokens, list) else int(np.argmax(wrong))
            raise LogError(
                f"{place(row)}: {column!r} = {float(part[wrong][0]):g}: "
                "must be a number of tokens, 0 or more"
            )
    return tokens


def parse_ids(cells: Sequence[Any], column: str, place: Place) -> list[str]:
    """Return prompt ids as text; 7 and "7" are the same, and messages are their JSON.

    Raises:
        LogError: a cell is empty.
    """
    if isinstance(cells, np.ndarray):
        cells = cells.tolist()
    if all(type(cell) is str and 0 < len(cell) <= LONGEST_KEPT_ID for cell in cells):
        return list(cells)
    allowed = "must be text, a whole number or messages, the same whenever the prompt comes back"
    return _each(cells, column, place, allowed, _prompt_id)


def _each(
    cells: Sequence[Any],
    column: str,
    place: Place,
    allowed: str,
    parse: Callable[[Any], _Value | None],
) -> list[_Value]:
    parsed = []
    for at, cell in enumerate(cells.tolist() if isinstance(cells, np.ndarray) else cells):
        value = parse(cell)
        if value is None:
            shown = repr(cell)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise LogError(f"{place(at)}: {column!r} = {shown}: {allowed}")
        parsed.append(value)
    return parsed


def _is_step(numbers: FloatArray) -> BoolArray:
    fits: BoolArray = (numbers >= 0) & (numbers <= LARGEST_STEP) & (numbers == np.floor(numbers))
    return fits


def _number(cell: Any) -> float | None:
    """Return the number in a cell, NaN if it is empty, None if it holds something else."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        text = cell.strip().lower()
        if text in _ABSENT:
            return math.nan
        if text in _TRUTH:
            return _TRUTH[text]
        try:
            return float(text)
        except ValueError:
            return None
    if isinstance(cell, int | float):
        try:
            return float(cell)
        except OverflowError:
            return None
    return None


def _step(cell: Any) -> int | None:
    number = None if isinstance(cell, bool) else _number(cell)
    if number is None or not _is_step(np.array([number]))[0]:
        return None
    return int(number)


def _reward(cell: Any) -> float | FloatArray | None:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if isinstance(cell, list | tuple | np.ndarray):
        numbers = [_number(one) for one in cell]
        if any(n is None or math.isinf(n) for n in numbers):
            return None
        return np.array(numbers, np.float64)
    number = _number(cell)
    return None if number is None or math.isinf(number) else number


def _prompt_id(cell: Any) -> str | None:
    if isinstance(cell, bool) or cell is None:
        return None
    if isinstance(cell, float):
        if not cell.is_integer():
            return None
        cell = int(cell)
    text = cell if isinstance(cell, str) else json.dumps(cell, sort_keys=True, default=str)
    if len(text) > LONGEST_KEPT_ID:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
        return f"{text[:40]} ... {digest.hexdigest()}"
    return text or None

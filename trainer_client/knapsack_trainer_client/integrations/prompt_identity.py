"""Rows of a dataset -> prompt ids that are the same in every epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from knapsack_trainer_client.arguments import LONGEST_PROMPT_ID
from knapsack_trainer_client.errors import refused

_COMPARED = 10_000
"""Most pairs of rows with one id whose prompts are looked at."""


def prompt_id(row: Mapping[str, Any], column: str | None) -> str:
    """Return the prompt id of a row: its column's value, or a hash of its prompt.

    Args:
        row: columns of the dataset.
        column: a column of strings or integers that name the prompt; None for the first
            16 hex digits of the BLAKE2b hash of the prompt's JSON, keys sorted.

    Raises:
        InvalidRequest: no such column, or a value that is not a name.
    """
    if column is None:
        if "prompt" not in row:
            raise refused("prompt_id_column", None, "must be given where rows have no prompt")
        try:
            text = json.dumps(row["prompt"], sort_keys=True, ensure_ascii=False)
        except TypeError as error:
            raise refused(
                "prompt_id_column", None, f"must be given where prompts are not text ({error})"
            ) from None
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    if column not in row:
        raise refused("prompt_id_column", column, f"must be one of the columns {sorted(row)}")
    return _name(row[column], column)


def check_column(columns: Sequence[str], column: str | None) -> None:
    """Refuse a dataset in which prompts have no identity.

    Raises:
        InvalidRequest: no such column, or prompts told apart by more than their text.
    """
    if column is not None:
        if column not in columns:
            raise refused(
                "prompt_id_column", column, f"must be one of the columns {sorted(columns)}"
            )
        return
    beside = sorted({"image", "images", "environment"} & set(columns))
    if beside:
        raise refused(
            "prompt_id_column", None, f"must be given where prompts have columns {beside} as well"
        )


def check_rows(
    values: Iterable[Any], prompts_of: Callable[[list[int]], Sequence[Any]], column: str
) -> None:
    """Refuse a column that does not name the prompts of a dataset, before it is trained on.

    Rows of one id must have one prompt; of more than 10,000 pairs of them, the first are
    compared.

    Args:
        values: the column, by row.
        prompts_of: returns the prompts of rows.
        column: its name.

    Raises:
        InvalidRequest: a value that is not a name, or different prompts of one name.
    """
    first: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for row, value in enumerate(values):
        earlier = first.setdefault(_name(value, column, f" (row {row})"), row)
        if earlier != row and len(pairs) < _COMPARED:
            pairs.append((earlier, row))
    if not pairs:
        return
    rows = sorted({row for pair in pairs for row in pair})
    texts = dict(zip(rows, map(text_digest, prompts_of(rows)), strict=True))
    names = {row: name for name, row in first.items()}
    for earlier, row in pairs:
        if texts[earlier] != texts[row]:
            raise refused(
                "prompt_id_column",
                column,
                f"must tell prompts apart; rows {earlier} and {row} of the training set have "
                f"different prompts and are both {names[earlier]!r}",
            )


def check_ids(ids: Sequence[str], prompts: Sequence[Any], column: str | None) -> None:
    """Refuse a batch with different prompts under one id.

    Raises:
        InvalidRequest: names the id.
    """
    if len(set(ids)) == len(ids):
        return
    texts: dict[str, bytes] = {}
    for name, prompt in zip(ids, prompts, strict=True):
        text = text_digest(prompt)
        if texts.setdefault(name, text) != text:
            raise refused(
                "prompt_id_column",
                column,
                f"must tell prompts apart; different ones of a batch are {name!r}",
            )


def text_digest(prompt: Any) -> bytes:
    """Return a hash of a prompt's text; of pictures and sounds, that they are there."""
    text = json.dumps(prompt, sort_keys=True, default=lambda part: type(part).__name__)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _name(value: Any, column: str, where: str = "") -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and 0 < len(value) <= LONGEST_PROMPT_ID:
        return value
    raise refused(
        f"column {column!r}{where}",
        value,
        f"must hold integers, or strings of 1 to {LONGEST_PROMPT_ID:,} characters, that name the "
        "prompt",
    )

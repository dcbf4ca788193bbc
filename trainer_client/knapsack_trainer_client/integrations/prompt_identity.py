"""Rows of a dataset -> prompt ids that are the same in every epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from knapsack_trainer_client.errors import refused


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
    value = row[column]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise refused(
        f"column {column!r}", value, "must hold non-empty strings or integers that name the prompt"
    )


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


def check_ids(ids: Sequence[str], prompts: Sequence[Any], column: str | None) -> None:
    """Refuse a batch of different prompts under one id.

    Raises:
        InvalidRequest: the column is constant.
    """
    if len(ids) > 1 and len(set(ids)) == 1 and any(p != prompts[0] for p in prompts[1:]):
        raise refused(
            "prompt_id_column", column, f"must tell prompts apart; all of a batch are {ids[0]!r}"
        )

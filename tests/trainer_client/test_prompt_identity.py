"""Names of prompts: what is taken for one, and what would be two prompts of one name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from knapsack_trainer_client import InvalidRequest
from knapsack_trainer_client.integrations.prompt_identity import check_ids, check_rows, prompt_id


def check(values: Sequence[Any], prompts: Sequence[Any]) -> list[list[int]]:
    """Check a dataset's column; return which rows' prompts were read."""
    read: list[list[int]] = []

    def prompts_of(rows: list[int]) -> list[Any]:
        read.append(rows)
        return [prompts[row] for row in rows]

    check_rows(values, prompts_of, "id")
    return read


def test_rows_of_one_name_must_have_one_prompt() -> None:
    """Prompts are read only where names meet, and may be there twice under one name."""
    assert check([3, 1, 2], ["c", "a", "b"]) == []
    assert check(["a", "b", "a"], [[{"role": "user", "content": "é"}], "b"] * 2) == [[0, 2]]
    with pytest.raises(InvalidRequest) as caught:
        check(["a", "b", "a", "b"], ["x", "y", "x", "z"])
    assert str(caught.value) == (
        "prompt_id_column = 'id': must tell prompts apart; rows 1 and 3 of the training set "
        "have different prompts and are both 'b'"
    )


@pytest.mark.parametrize("value", [None, "", 1.0, True, "x" * 1025])
def test_what_is_no_name_is_found_by_its_row(value: object) -> None:
    """Before training, and by row, as the scheduler would refuse it later."""
    with pytest.raises(InvalidRequest, match=r"^column 'id' \(row 1\) = "):
        check(["a", value], ["a", "b"])
    with pytest.raises(InvalidRequest, match=r"^column 'id' = "):
        prompt_id({"id": value, "prompt": "b"}, "id")


def test_a_batch_with_two_prompts_of_a_name_is_refused() -> None:
    """Also where the other prompts of the batch are told apart; a prompt may come twice."""
    check_ids(["a", "b", "a"], ["x", "y", "x"], "id")
    with pytest.raises(InvalidRequest, match="different ones of a batch are 'a'"):
        check_ids(["a", "b", "a"], ["x", "y", "z"], "id")


def test_names_without_a_column_are_those_of_the_text() -> None:
    """The same in every process and version: a run goes on under its old names."""
    chat = [{"role": "user", "content": "2 + 2?"}]
    assert prompt_id({"prompt": "2 + 2?"}, None) == "583633d4dc918bfc"
    assert prompt_id({"prompt": chat}, None) == "1f68860eb50bcae9"
    assert prompt_id({"prompt": [dict(reversed(chat[0].items()))]}, None) == "1f68860eb50bcae9"

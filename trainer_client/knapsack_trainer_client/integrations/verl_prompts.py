"""Rows of a batch of verl -> prompt ids that are the same in every epoch.

verl's ``uid`` is new in every step, and its ``index`` is 0 for every row whose
``extra_info`` has none, so neither is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knapsack_trainer_client.errors import InvalidRequest, refused
from knapsack_trainer_client.integrations.prompt_identity import text_digest

REMEMBERED = 100_000
"""Prompt ids whose text is remembered: 10 MB. Of more, the first come are."""

_HOW = (
    "give every row of data.train_files an extra_info.index that is unique within its "
    "data_source, for example its row number, when the files are written"
)


class PromptNames:
    """Names prompts ``data_source/index``, and refuses names that do not tell them apart.

    Args:
        may_change: whether one name may come with another text later, as where prompts
            are augmented anew in every epoch. Within a batch it may not.
    """

    def __init__(self, may_change: bool = False) -> None:
        self._may_change = may_change
        self._texts: dict[str, bytes] = {}

    def name(
        self,
        prompts: Sequence[Any],
        extra_info: Sequence[Any] | None,
        index: Sequence[Any] | None,
        data_source: Sequence[Any] | None,
    ) -> list[str]:
        """Return the prompt ids of a batch, by row.

        Args:
            prompts: ``raw_prompt``, lists of messages.
            extra_info: of the rows; None where the dataset has no such column.
            index: of the rows, taken where there is no ``extra_info``.
            data_source: of the rows; None where the dataset has no such column.

        Raises:
            InvalidRequest: a row has no index, or different prompts have the same name.
        """
        keys = _indices(extra_info, index, len(prompts))
        sources = [""] * len(prompts) if data_source is None else data_source
        names = [
            f"{source}/{key}" if source else str(key)
            for source, key in zip(sources, keys, strict=True)
        ]
        self._check(names, prompts)
        return names

    def _check(self, names: Sequence[str], prompts: Sequence[Any]) -> None:
        batch: dict[str, bytes] = {}
        for name, prompt in zip(names, prompts, strict=True):
            text = text_digest(prompt)
            if batch.setdefault(name, text) != text:
                raise _ambiguous(name, "two prompts of a batch have this name")
            known = self._texts.get(name)
            if known is None and len(self._texts) < REMEMBERED:
                self._texts[name] = text
            elif known is not None and known != text and not self._may_change:
                raise _ambiguous(
                    name,
                    "another prompt had this name in an earlier batch; where that is meant, "
                    "set trainer.v1.sampler.sampler_kwargs.prompts_may_change=true",
                )


def _indices(
    extra_info: Sequence[Any] | None, index: Sequence[Any] | None, rows: int
) -> list[int | str]:
    if extra_info is None and index is None:
        raise refused("extra_info.index", None, f"must name the prompt: {_HOW}")
    found: list[int | str] = []
    for row in range(rows):
        value: Any
        if extra_info is not None:
            info = extra_info[row]
            value = info.get("index") if isinstance(info, Mapping) else None
        else:
            assert index is not None
            value = index[row]
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise refused(
                "extra_info.index",
                value,
                f"must be an integer or a string in every row (row {row} of the batch): {_HOW}",
            )
        found.append(value)
    return found


def _ambiguous(name: str, said: str) -> InvalidRequest:
    return refused("data_source/extra_info.index", name, f"must name one prompt; {said}. {_HOW}")

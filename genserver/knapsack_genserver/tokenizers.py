"""The model's tokenizer, where its folder has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knapsack_genserver.engine import Tokenizer
from knapsack_genserver.errors import InvalidArgument

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder; None if it has none."""
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    return FolderTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))


class FolderTokenizer:
    """A Hugging Face tokenizer behind the server's interface."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(map(int, self._tokenizer.encode(text)))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the tokens of (role, content) messages, ready for an answer."""
        if not self._tokenizer.chat_template:
            raise InvalidArgument("prompts.chat", "a conversation", "needs a chat template")
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except TemplateError as error:
            # Many templates refuse roles, or an order of them, by raising one.
            roles = [role for role, _ in messages]
            raise InvalidArgument(
                "prompts.chat", roles, f"must suit the model's chat template, which says: {error}"
            ) from None
        return list(map(int, self._tokenizer.encode(text, add_special_tokens=False)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

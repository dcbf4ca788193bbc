"""Which columns of a log are the step, the prompt, the reward and the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "step": (
        "step", "global_step", "global_steps", "train_step", "training_step", "trainer_step",
        "rollout_step", "iteration", "iter", "rollout_id",
    ),
    "prompt": (
        "prompt_id", "problem_id", "question_id", "example_id", "task_id", "sample_id",
        "instance_id", "data_id", "uid", "index", "prompt_index", "example_index", "id",
        "prompt", "problem", "question", "input",
    ),
    "reward": (
        "reward", "rewards", "score", "scores", "acc", "accuracy", "correct", "is_correct",
        "success", "passed",
    ),
    "tokens": (
        "completion_tokens", "num_completion_tokens", "response_tokens", "num_tokens",
        "response_length", "completion_length", "output_tokens",
    ),
}  # fmt: skip
"""Names that trainers and people give the columns, likeliest first."""

_OPTIONS = {role: f"--{role}-column" for role in COMMON_NAMES}


class LogError(ValueError):
    """A log that cannot be read; the message names file, place, value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of a log's columns.

    Attributes:
        step, prompt, reward: as they stand in the log.
        tokens: None where lengths are not in the log.
    """

    step: str
    prompt: str
    reward: str
    tokens: str | None

    def __str__(self) -> str:
        tokens = "none" if self.tokens is None else repr(self.tokens)
        return (
            f"step = {self.step!r}, prompt = {self.prompt!r}, reward = {self.reward!r}, "
            f"tokens = {tokens}"
        )


@dataclass(frozen=True, slots=True)
class WantedColumns:
    """What the user says of the columns; None is to be guessed from common names."""

    step: str | None = None
    prompt: str | None = None
    reward: str | None = None
    tokens: str | None = None

    def find(self, present: Sequence[str], where: str) -> Columns:
        """Return the columns among those present in a log.

        Args:
            present: names of all columns of the log.
            where: names the log in errors.

        Raises:
            LogError: a named column is not there, or none has a common name.
        """
        return Columns(
            _find("step", self.step, present, where),
            _find("prompt", self.prompt, present, where),
            _find("reward", self.reward, present, where),
            _find("tokens", self.tokens, present, where, optional=True) or None,
        )


def _find(
    role: str, wanted: str | None, present: Sequence[str], where: str, optional: bool = False
) -> str:
    shown = ", ".join(repr(name) for name in present[:30]) + (" ..." if len(present) > 30 else "")
    if wanted is not None:
        if wanted in present:
            return wanted
        raise LogError(f"{where}: no column {wanted!r} ({_OPTIONS[role]}); there are {shown}")
    by_name = {name.strip().lower(): name for name in reversed(present)}
    for name in COMMON_NAMES[role]:
        if name in by_name:
            return by_name[name]
    if optional:
        return ""
    raise LogError(
        f"{where}: none of the columns {shown} is called {', '.join(COMMON_NAMES[role][:4])} "
        f"or the like; name the one with the {role} with {_OPTIONS[role]}"
    )

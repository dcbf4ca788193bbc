"""The task: arithmetic on a clock face with operators whose tables must be learned.

A prompt is an hour and one to six operators; each operator is a random permutation of
the twelve hours. The response is the worked chain, the hour after each operator, and an
end token. The reward is 1 if the last hour is right and the end follows at once, with as
many hours as operators; the hours between are not looked at.

    prompt    7 c a f =        response   2 11 4 <end>

The examples of the warm-up come from a demonstrator who knows some entries of the tables
well, is unsure of others, and mostly wrong about the rest, always in the same way. So
the success rates of prompts after the warm-up spread from about 0, where a chain needs
an entry that the demonstrator mostly has wrong, to about 1. What a prompt teaches about
an entry helps every other prompt that needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

HOURS = 12
OPERATORS = 16
LONGEST = 6
EQUALS = HOURS + OPERATORS
END = EQUALS + 1
PAD = EQUALS + 2
VOCABULARY = EQUALS + 3

# How well the demonstrator knows an entry of a table: the share of entries, and the range
# of probabilities of getting it right.
_KNOWN = (0.60, 0.97, 0.995)
_UNSURE = (0.24, 0.40, 0.90)
_WRONG = (0.16, 0.03, 0.30)


@dataclass(frozen=True, slots=True)
class Problem:
    """An hour and the operators to apply to it.

    Attributes:
        prompt_id: its name, the same whenever it is drawn.
        prompt: token ids.
        answer: token ids of the correct chain, the end token last.
    """

    prompt_id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def reward(self, response: list[int]) -> float:
        """Return 1.0 if the response has the right length and ends right, else 0.0."""
        right = len(response) == len(self.answer) and response[-2:] == list(self.answer[-2:])
        return float(right)


class World:
    """The operators' tables and the demonstrator's knowledge of them, fixed by a seed."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.tables = np.array([rng.permutation(HOURS) for _ in range(OPERATORS)])
        kinds = rng.choice(3, (OPERATORS, HOURS), p=[_KNOWN[0], _UNSURE[0], _WRONG[0]])
        low = np.array([_KNOWN[1], _UNSURE[1], _WRONG[1]])[kinds]
        high = np.array([_KNOWN[2], _UNSURE[2], _WRONG[2]])[kinds]
        self._knows = rng.uniform(low, high)
        # The hour that the demonstrator says when not right: always the same wrong one.
        self._slip = (self.tables + rng.integers(1, HOURS, (OPERATORS, HOURS))) % HOURS

    def problem(self, hour: int, operators: tuple[int, ...]) -> Problem:
        """Return the problem with its correct chain."""
        chain, now = [], hour
        for operator in operators:
            now = int(self.tables[operator, now])
            chain.append(now)
        prompt = (hour, *(HOURS + operator for operator in operators), EQUALS)
        return Problem("-".join(map(str, prompt[:-1])), prompt, (*chain, END))

    def problems(self, count: int, seed: int, without: set[str] | None = None) -> list[Problem]:
        """Return different problems of one to six operators, as many of each length as can be.

        Args:
            count: how many.
            seed: of the draw.
            without: ids of problems with two or more operators that must not be among
                them. Those with one operator are few, and may be.
        """
        rng = np.random.default_rng(seed)
        found: dict[str, Problem] = {}
        while len(found) < count:
            problem = self.problem(*_draw(rng))
            if problem.prompt_id in (without or ()) and len(problem.answer) > 2:
                continue
            found.setdefault(problem.prompt_id, problem)
        return list(found.values())

    def demonstrations(
        self, count: int, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return tokens and labels of worked examples, int64[count, 2 * LONGEST + 3] both.

        Labels are -100 on the prompt and the padding.
        """
        width = 2 * LONGEST + 3
        tokens = np.full((count, width), PAD)
        labels = np.full((count, width), -100)
        for row in range(count):
            hour, operators = _draw(rng)
            chain, now = [], hour
            for operator in operators:
                right = rng.random() < self._knows[operator, now]
                now = int((self.tables if right else self._slip)[operator, now])
                chain.append(now)
            prompt = [hour, *(HOURS + operator for operator in operators), EQUALS]
            response = [*chain, END]
            size = len(prompt) + len(response)
            tokens[row, :size] = prompt + response
            labels[row, len(prompt) : size] = response
        return tokens, labels


def _draw(rng: np.random.Generator) -> tuple[int, tuple[int, ...]]:
    length = int(rng.integers(1, LONGEST + 1))
    return int(rng.integers(HOURS)), tuple(map(int, rng.integers(0, OPERATORS, length)))

"""An engine whose rollouts finish when a test says so, and in which order."""

from __future__ import annotations

from pathlib import Path

from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    Tokenizer,
    WeightSpan,
)
from knapsack_genserver.inbox import Inbox


def tokens_of(seed: int, index: int, most: int) -> list[int]:
    """Return the tokens that a rollout has, whatever else happens."""
    return [(seed + index * 7 + place) % 50 for place in range(1 + (seed + index) % most)]


class ManualEngine:
    """Holds every rollout until ``finish``.

    Attributes:
        held: (group, index, its inbox) of rollouts that have not finished.
        given: groups in the order they were given.
        most_held: most rollouts that were ever held at once.
    """

    name = "manual"
    tokenizer: Tokenizer | None = None

    def __init__(self, capacity: int = 8) -> None:
        self.capacity = capacity
        self.held: list[tuple[Group, int, Inbox]] = []
        self.given: list[Group] = []
        self.most_held = 0
        self.refuses: Exception | None = None

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Nothing to free."""

    def generate(self, group: Group) -> Inbox:
        """Hold a group."""
        if self.refuses is not None:
            raise self.refuses

        def cancel() -> None:
            self.held = [held for held in self.held if held[2] is not inbox]

        inbox = Inbox(group.num_rollouts, cancel)
        indices = range(group.first_index, group.first_index + group.num_rollouts)
        self.held += [(group, index, inbox) for index in indices]
        self.given.append(group)
        self.most_held = max(self.most_held, len(self.held))
        return inbox

    def finish(self, at: int = 0, error: str = "") -> None:
        """Let one of the held rollouts finish, or fail."""
        group, index, inbox = self.held.pop(at)
        if error:
            inbox.put([Completion(index, [], [], FinishReason.ERROR, (), error)])
            return
        tokens = tokens_of(group.seed, index, group.sampling.max_tokens)
        span = (WeightSpan(0, 0, len(tokens)),)
        inbox.put([Completion(index, tokens, [-1.0] * len(tokens), FinishReason.LENGTH, span)])

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Say they are loaded."""
        return LoadedWeights(version, "manual")

    def status(self) -> EngineStatus:
        """Return what is held."""
        return EngineStatus("manual", 0, 1, len(self.held), 0, 0, 64, self.capacity)

"""What generates: the interface between the server and an engine, and its promises.

An engine holds one model. It is asked for the rollouts of one prompt at a time, may be
asked for many prompts at once, and batches as it likes:

- ``generate`` queues the work when it is called, not when the iterator is first read,
  so that what is asked for together is batched together.
- Every rollout asked for arrives once: finished, or with ``error`` set. Order is free.
- The same (prompt, seed, rollout index, sampling) gives the same tokens under the same
  weights, whatever else is in the batch, as far as the arithmetic allows. Rollouts
  ``first_index .. first_index + n - 1`` of a group may therefore be asked for in parts
  and on several replicas.
- Closing the iterator ends the work it stands for, within one decoding step.
- ``load_weights`` lets running rollouts end or continue, never mixes two sets within a
  token, and each rollout says which versions made it. If it raises, the old weights
  serve on; or it raises ``Unavailable``, ``generate`` does too, and an attribute
  ``broken`` of the engine says why until an update succeeds.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


class FinishReason(enum.Enum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_tokens: most tokens of a completion, 1 or more.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: in (0, 1]; 1 keeps every token.
        top_k: most probable tokens kept; 0 keeps every token.
        stop_token_ids: end a completion, besides the model's own end tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Group:
    """Rollouts wanted of one prompt.

    Attributes:
        prompt: token ids, at least one.
        num_rollouts: how many, 1 or more.
        sampling: how.
        seed: 64 bits; with the rollout's index it determines what is drawn.
        first_index: index of the first of them in the whole group.
        request: equal for groups that came in one request; requests share fairly.
        priority: lower is sooner.
    """

    prompt: Sequence[int]
    num_rollouts: int
    sampling: Sampling
    seed: int
    first_index: int = 0
    request: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Tokens ``start`` to ``end`` were made by one weight version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One rollout.

    Attributes:
        index: of the rollout in its group.
        token_ids: the end token among them; not the prompt's.
        logprobs: natural log-probability of each, under what it was drawn from.
        reason: why it ended.
        weights: versions that made it, in token order.
        error: why it failed; empty if it did not.
    """

    index: int
    token_ids: list[int]
    logprobs: list[float]
    reason: FinishReason
    weights: tuple[WeightSpan, ...] = ()
    error: str = ""


class ReplicaState(enum.Enum):
    """Where a replica is in its life.

    STARTING: waits for room on a node, loads the model or the weights that serve, or was
        lost and is started again.
    SERVING: generates.
    DRAINING: finishes what it holds, and is then gone.
    """

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How one of an engine's replicas is.

    Attributes:
        number: its name, for as long as the engine lives.
        state: where it is in its life.
        running: rollouts that it holds.
        losses: how often it was lost while it served or drained.
        place: where it runs, such as a host and a process, or an address; empty if nowhere.
        problem: why it does not serve, or failed last; empty if nothing is known.
    """

    number: int
    state: ReplicaState
    running: int
    losses: int = 0
    place: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """How an engine is.

    Attributes:
        model: its folder or name.
        weight_version: of the weights that serve.
        replicas: copies that generate.
        running: rollouts being generated.
        waiting: rollouts waiting for a place.
        max_model_tokens: most tokens of prompt and completion; 0 for no limit.
        vocabulary_size: token ids are below it.
        capacity: rollouts that the engine should be given at once, running and waiting:
            enough to keep it full, and no more, since what it holds it cannot share out
            anew. The server keeps the rest.
        prefix_queried_tokens: prompt tokens looked up in the prefix cache so far.
        prefix_hit_tokens: those that were found in it.
        first_fingerprint: of the weights that it started with, equal for equal weights;
            empty if it does not know.
        wanted_replicas: copies that there should be.
        members: each of them, with those that leave; none if the engine is one copy.
        lost_replicas: how often a replica that served has been lost.
        redone_rollouts: how often a rollout that a replica did not make was asked for anew.
    """

    model: str
    weight_version: int
    replicas: int
    running: int
    waiting: int
    max_model_tokens: int
    vocabulary_size: int
    capacity: int = 1024
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    first_fingerprint: str = ""
    wanted_replicas: int = 1
    members: tuple[ReplicaStatus, ...] = ()
    lost_replicas: int = 0
    redone_rollouts: int = 0


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """Weights that serve.

    Attributes:
        version: theirs.
        fingerprint: equal for equal weights.
        paused_seconds: time in which no token was made; None if the engine does not know.
    """

    version: int
    fingerprint: str
    paused_seconds: float | None = None


class Tokenizer(Protocol):
    """Text to tokens and back, where the model has a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the tokens of (role, content) messages, ready for an answer."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""


class Engine(Protocol):
    """See the module's promises."""

    name: str
    tokenizer: Tokenizer | None

    async def start(self) -> None:
        """Load the model; ConfigError if it cannot be."""

    async def close(self) -> None:
        """End all work and free everything."""

    def generate(self, group: Group) -> AsyncIterator[Completion]:
        """Queue a group; return the iterator of its rollouts as they finish."""

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve the safetensors of a folder; FailedPrecondition leaves the old ones."""

    def status(self) -> EngineStatus:
        """Return how the engine is."""


@runtime_checkable
class Scalable(Protocol):
    """An engine whose number of replicas can be changed while it runs."""

    def set_replicas(self, wanted: int) -> None:
        """Have so many, 1 or more: returns at once, see ``status`` for what has come of it.

        Those that are new serve once they hold the weights that the others serve. Those
        that are too many take nothing more, finish what they hold, and go.

        Raises:
            FailedPrecondition: this engine's replicas are not its own to start.
        """

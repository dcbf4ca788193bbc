"""Groups as requests of vLLM's ``/inference/v1/generate``, and its answers as rollouts.

Nothing of an answer is taken on trust: what is not a whole rollout is an error that says
what is wrong with it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from knapsack_genserver.engine import Completion, FinishReason, Group, WeightSpan

ANY_VOCABULARY = 2**31 - 1
"""Token ids are below it in every model."""

_SEEDS = 2**62
"""Seeds are below it, so that a seed plus an index stays a signed 64-bit number."""

BUSY = frozenset({429, 502, 503, 504})
"""Statuses that ask for patience."""

_REASONS = {
    "stop": FinishReason.STOP,
    "repetition": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}
"""Ends of whole rollouts. An "abort" is none: we ask for it only when we have left, so here
it is a server that shuts down."""


class Garbage(Exception):
    """An answer that is not what the endpoint promises."""


class Restarted(Exception):
    """A rollout was made by weights that the server held before others were loaded."""


class RequestFailed(Exception):
    """The server says that it failed at the request.

    Attributes:
        refused: it would fail at it again, and so would another.
    """

    def __init__(self, message: str, refused: bool = False) -> None:
        self.refused = refused
        super().__init__(message)


def is_greedy(group: Group) -> bool:
    """Return whether all rollouts of a group are one and the same."""
    return group.sampling.temperature == 0


def request_body(group: Group, request_id: str, model: str) -> dict[str, Any]:
    """Return the JSON that asks for a group.

    vLLM gives the i-th rollout of a request the request's seed plus i, so that a rollout's
    seed is its group's plus its index, in whichever part and on whichever server. It makes
    no more than one greedy rollout; that one stands for all.
    """
    sampling = group.sampling
    return {
        "request_id": request_id,
        "model": model,
        "token_ids": list(group.prompt),
        "stream": True,
        "sampling_params": {
            "n": 1 if is_greedy(group) else group.num_rollouts,
            "seed": group.seed % _SEEDS + group.first_index,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": sorted(sampling.stop_token_ids),
            # A message when a rollout has ended, and not one per token.
            "stream_interval": sampling.max_tokens,
            "logprobs": 0,
            "detokenize": False,
        },
    }


def version_of(label: str, labels: dict[str, int]) -> int:
    """Return the number of a weight version's label.

    Args:
        label: such as "7" or "step-7".
        labels: those that are known.

    Raises:
        Garbage: it is not known and does not end in a number.
    """
    if label in labels:
        return labels[label]
    number = re.search(r"[0-9]{1,18}$", label)
    if number is None:
        raise Garbage(f"the server's weight version {label!r} does not end in a number")
    return int(number[0])


class Answer:
    """Puts together what the server sends for a group.

    Args:
        group: asked for.
        version: of the weights, where the server does not say.
        labels: numbers of weight versions that do not end in them.
        gone: a weight version that the server has only if it was restarted.
        vocabulary_size: token ids are below it.
    """

    def __init__(
        self,
        group: Group,
        version: int,
        labels: dict[str, int],
        gone: str | None = None,
        vocabulary_size: int = ANY_VOCABULARY,
    ) -> None:
        self._group = group
        self._gone = gone
        self._vocabulary_size = vocabulary_size
        self._version = version
        self._labels = labels
        self._parts: dict[int, tuple[list[int], list[float]]] = {}
        self._left = set(range(1 if is_greedy(group) else group.num_rollouts))

    @property
    def missing(self) -> int:
        """How many rollouts the server has yet to send."""
        return len(self._left)

    def message(self, body: bytes) -> Iterator[Completion]:
        """Take one message of the stream; yield the rollouts that have ended.

        Raises:
            RequestFailed: the server says so.
            Garbage: it is no such message.
            Restarted: the server has lost its weights.
        """
        try:
            message = json.loads(body)
        except ValueError:
            raise Garbage(f"the answer is no JSON: {_shown(body)}") from None
        if not isinstance(message, dict):
            raise Garbage(f"the answer is no JSON object: {_shown(body)}")
        error = message.get("error")
        if error:
            # What vLLM refuses once the stream has begun has its status inside.
            code = error.get("code") if isinstance(error, dict) else None
            refused = isinstance(code, int) and 400 <= code < 500 and code not in BUSY
            raise RequestFailed(f"{code}: {error_text(body)}", refused)
        choices = message.get("choices")
        if not isinstance(choices, list):
            raise Garbage(f"the answer has no choices: {_shown(body)}")
        for choice in choices:
            try:
                yield from self._choice(choice)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                why = f"{type(error).__name__}: {error}"
                raise Garbage(f"a choice cannot be read ({why}): {_shown(body)}") from None

    def _choice(self, choice: dict[str, Any]) -> Iterator[Completion]:
        at = choice["index"]
        if at not in self._left:
            raise Garbage(f"the server sent choice {at!r} unasked or twice")
        tokens, logprobs = self._parts.setdefault(at, ([], []))
        new = [int(token) for token in choice.get("token_ids") or ()]
        content = (choice.get("logprobs") or {}).get("content") or ()
        tokens += new
        logprobs += [float(entry["logprob"]) for entry in content]
        if len(tokens) != len(logprobs):
            raise Garbage(f"{len(tokens)} tokens have {len(logprobs)} log-probabilities")
        finish = choice.get("finish_reason")
        if finish is None:
            return
        self._left.discard(at)
        del self._parts[at]
        yield from self._ended(at, tokens, logprobs, finish, choice.get("weight_versions"))

    def _ended(
        self, at: int, tokens: list[int], logprobs: list[float], finish: str, versions: Any
    ) -> Iterator[Completion]:
        if finish not in _REASONS:
            raise RequestFailed(f"the server ended a rollout with {finish!r}")
        reason = _REASONS[finish]
        most = self._group.sampling.max_tokens
        if not 1 <= len(tokens) <= most:
            raise Garbage(f"a rollout has {len(tokens)} tokens; 1 to {most} were asked for")
        size = self._vocabulary_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise Garbage(f"a rollout has token {wrong}; 0 to {size - 1} are the model's")
        if not all(map(math.isfinite, logprobs)):
            raise Garbage("a rollout has a log-probability that is no number")
        spans = tuple(self._spans(versions, len(tokens)))
        first = self._group.first_index
        indices = range(first, first + self._group.num_rollouts)
        for index in indices if is_greedy(self._group) else [first + at]:
            yield Completion(index, tokens, logprobs, reason, spans)

    def _spans(self, versions: Any, length: int) -> Iterator[WeightSpan]:
        if not versions:
            yield WeightSpan(self._version, 0, length)
            return
        for span in versions:
            start, end = int(span["start"]), int(span["end"])
            if str(span["version"]) == self._gone:
                raise Restarted(f"it has weight version {self._gone!r} again")
            if start < end:
                yield WeightSpan(version_of(str(span["version"]), self._labels), start, end)


def error_text(body: bytes) -> str:
    """Return what the server says went wrong, in one line."""
    try:
        message = json.loads(body)
        error = message.get("error", message)
        text = error.get("message") or error.get("detail") or error
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300]


def _shown(body: bytes) -> str:
    text = body.decode(errors="replace")
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)")

"""Protobuf to the engine's nouns and back: the only file that knows both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from knapsack_genserver import seeds
from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    LoadedWeights,
    Sampling,
    Tokenizer,
)
from knapsack_genserver.errors import InvalidArgument
from knapsack_proto.v1 import generation_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_LEAST_TEMPERATURE = 0.01
"""Above 0: divided by less, logits leave what a float holds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest requests that are served.

    Attributes:
        prompts: of one call.
        group: rollouts of one prompt, in all waves.
        waves: of one prompt that are unfinished.
    """

    prompts: int = 100_000
    group: int = 100_000
    waves: int = 1000


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A prompt of a call.

    Attributes:
        tokens: at least one.
        sampling: how its rollouts are drawn.
        seed: of its group.
    """

    tokens: Sequence[int]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rollouts wanted of a prompt.

    Attributes:
        position: of the prompt in its call.
        rollouts: beyond those asked for before, 1 or more.
        expected_tokens: of a completion, as far as is known.
    """

    position: int
    rollouts: int
    expected_tokens: int


def wanted_of(
    request: pb.GenerateRequest | pb.AddRollouts,
    asked: Sequence[int],
    limits: Limits,
    field: str = "",
) -> list[Wanted]:
    """Return how many rollouts of which prompts a request asks for; those with none are left out.

    Args:
        request: its prompts are looked at by ``prompts_of``.
        asked: rollouts that were asked for of each prompt of the call before.
        limits: largest requests that are served.
        field: in which the request is, with a dot, for messages.

    Raises:
        InvalidArgument: names the field, the value and what is allowed.
    """
    count = len(asked) + len(request.prompts)
    if count == 0:
        raise InvalidArgument(f"{field}prompts", [], "must hold at least one prompt")
    if count > limits.prompts:
        raise InvalidArgument(
            f"{field}prompts", f"{count} prompts", f"must be at most {limits.prompts}"
        )
    positions: Sequence[int] = range(count)
    if isinstance(request, pb.AddRollouts) and request.prompt_indices:
        positions = request.prompt_indices
        _check_positions(positions, count, field)
    for name in ("num_rollouts", "expected_tokens"):
        length = len(getattr(request, name))
        if length != len(positions) and (length or name == "num_rollouts"):
            raise InvalidArgument(
                f"{field}{name}", f"{length} numbers", f"must be one per prompt ({len(positions)})"
            )
    for at, expected in enumerate(request.expected_tokens):
        if expected < 0:
            raise InvalidArgument(f"{field}expected_tokens[{at}]", expected, "must be 0 or more")
    wanted = []
    for at, (position, rollouts, expected) in enumerate(
        zip(
            positions,
            request.num_rollouts,
            request.expected_tokens or itertools.repeat(0, len(positions)),
            strict=True,
        )
    ):
        before = asked[position] if position < len(asked) else 0
        if not 0 <= rollouts <= limits.group - before:
            more = f" beside the {before} before" if before else ""
            raise InvalidArgument(
                f"{field}num_rollouts[{at}]",
                rollouts,
                f"must be from 0 to {limits.group - before}{more}",
            )
        if rollouts:
            wanted.append(Wanted(position, rollouts, expected))
    return wanted


def stopped_of(request: pb.StopGroups, prompts: int) -> set[int]:
    """Return the positions of the prompts whose groups are to be stopped.

    Raises:
        InvalidArgument: names the field, the value and what is allowed.
    """
    _check_positions(request.prompt_indices, prompts, "stop.")
    return set(request.prompt_indices)


def _check_positions(positions: Sequence[int], prompts: int, field: str) -> None:
    for at, position in enumerate(positions):
        if not 0 <= position < prompts:
            allowed = f"must be from 0 to {prompts - 1}" if prompts else "there is no prompt yet"
            raise InvalidArgument(f"{field}prompt_indices[{at}]", position, allowed)
    if len(set(positions)) < len(positions):
        raise InvalidArgument(f"{field}prompt_indices", list(positions), "must hold none twice")


def prompts_of(
    prompts: Sequence[pb.Prompt],
    params: pb.SamplingParams,
    seed: int,
    status: EngineStatus,
    tokenizer: Tokenizer | None,
    *,
    first: int = 0,
    field: str = "",
) -> list[AskedPrompt]:
    """Return the prompts of a request, looked at whole.

    Args:
        prompts: in their order.
        params: checked by ``check_sampling``.
        seed: of the call.
        status: of the engine.
        tokenizer: of the model, or None.
        first: position of the first of them in the call.
        field: in which the prompts are, with a dot, for messages.

    Raises:
        InvalidArgument: names the field, the value and what is allowed.
    """
    asked = []
    same: dict[int, Sampling] = {}
    group_seeds = seeds.group_seeds(seed, first, len(prompts))
    for at, prompt in enumerate(prompts):
        tokens = _tokens(prompt, f"{field}prompts[{at}]", status, tokenizer)
        most = _max_tokens(params, len(tokens), f"{field}prompts[{at}]", status)
        if most not in same:
            same[most] = _sampling(params, most)
        asked.append(AskedPrompt(tokens, same[most], group_seeds[at]))
    return asked


def _tokens(
    prompt: pb.Prompt, field: str, status: EngineStatus, tokenizer: Tokenizer | None
) -> Sequence[int]:
    kind = prompt.WhichOneof("content")
    if kind is None:
        raise InvalidArgument(field, "", "must hold tokens, text or chat")
    if kind == "tokens":
        # Four bytes a token, where a list has eight and more.
        tokens: Sequence[int] = prompt.tokens.ids
        field += ".tokens.ids"
    elif tokenizer is None:
        raise InvalidArgument(f"{field}.{kind}", "given", "needs a tokenizer in the model folder")
    elif kind == "text":
        tokens = tokenizer.encode(prompt.text)
        field += ".text"
    else:
        field += ".chat"
        if not prompt.chat.messages:
            raise InvalidArgument(f"{field}.messages", [], "must hold at least one message")
        tokens = tokenizer.encode_chat([(m.role, m.content) for m in prompt.chat.messages])
    if not tokens:
        raise InvalidArgument(field, [], "must hold at least one token")
    if min(tokens) < 0 or max(tokens) >= status.vocabulary_size:
        bad = next(k for k, t in enumerate(tokens) if not 0 <= t < status.vocabulary_size)
        raise InvalidArgument(
            f"{field}[{bad}]", tokens[bad], f"must be from 0 to {status.vocabulary_size - 1}"
        )
    return tokens


def check_sampling(params: pb.SamplingParams, status: EngineStatus) -> None:
    """Look at how tokens are to be drawn; InvalidArgument names what is wrong."""
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise InvalidArgument("sampling.max_tokens", params.max_tokens, "must be 1 or more")
    if params.temperature != 0 and not _LEAST_TEMPERATURE <= params.temperature < math.inf:
        raise InvalidArgument(
            "sampling.temperature",
            params.temperature,
            f"must be 0, or {_LEAST_TEMPERATURE} or more",
        )
    if not (status.max_model_tokens or params.HasField("max_tokens")):
        raise InvalidArgument("sampling.max_tokens", "absent", "is needed; the model has no limit")
    if params.HasField("top_p") and not 0 < params.top_p <= 1:
        raise InvalidArgument("sampling.top_p", params.top_p, "must be above 0 and at most 1")
    if params.HasField("top_k") and params.top_k < 0:
        raise InvalidArgument("sampling.top_k", params.top_k, "must be 0 or more")
    for at, token in enumerate(params.stop_token_ids):
        if not 0 <= token < status.vocabulary_size:
            raise InvalidArgument(
                f"sampling.stop_token_ids[{at}]",
                token,
                f"must be from 0 to {status.vocabulary_size - 1}",
            )


def _max_tokens(params: pb.SamplingParams, tokens: int, field: str, status: EngineStatus) -> int:
    if not status.max_model_tokens:
        return params.max_tokens
    room = status.max_model_tokens - tokens
    if room < 1:
        raise InvalidArgument(
            field,
            f"{tokens} tokens",
            f"must leave room for a completion; the model holds {status.max_model_tokens}",
        )
    return min(params.max_tokens, room) if params.HasField("max_tokens") else room


def _sampling(params: pb.SamplingParams, max_tokens: int) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        top_k=params.top_k,
        stop_token_ids=frozenset(params.stop_token_ids),
    )


def rollout_message(
    prompt_index: int, completion: Completion, tokenizer: Tokenizer | None
) -> pb.Rollout:
    """Return a completion as a message."""
    return pb.Rollout(
        prompt_index=prompt_index,
        rollout_index=completion.index,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        text=tokenizer.decode(completion.token_ids) if tokenizer else "",
        finish_reason=_REASONS[completion.reason],
        weight_versions=[
            pb.WeightSpan(weight_version=span.version, start=span.start, end=span.end)
            for span in completion.weights
        ],
        error=completion.error,
    )


def status_message(engine: str, status: EngineStatus) -> pb.GeneratorStatus:
    """Return an engine's status as a message."""
    return pb.GeneratorStatus(
        model=status.model,
        engine=engine,
        weight_version=status.weight_version,
        replicas=status.replicas,
        running_rollouts=status.running,
        waiting_rollouts=status.waiting,
        max_model_tokens=status.max_model_tokens,
        vocabulary_size=status.vocabulary_size,
        wanted_replicas=status.wanted_replicas,
        members=[
            pb.Replica(
                number=each.number,
                state=f"REPLICA_STATE_{each.state.name}",
                running_rollouts=each.running,
                losses=each.losses,
                place=each.place,
                problem=each.problem,
            )
            for each in status.members
        ],
    )


def weights_message(loaded: LoadedWeights) -> pb.WeightStatus:
    """Return loaded weights as a message."""
    return pb.WeightStatus(weight_version=loaded.version, fingerprint=loaded.fingerprint)

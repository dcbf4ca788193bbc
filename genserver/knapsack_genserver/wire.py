"""Protobuf to the engine's nouns and back: the only file that knows both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knapsack_genserver import seeds
from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    Group,
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


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest requests that are served.

    Attributes:
        prompts: of one call.
        group: rollouts of one prompt.
    """

    prompts: int = 100_000
    group: int = 100_000


def groups_of(
    request: pb.GenerateRequest,
    status: EngineStatus,
    tokenizer: Tokenizer | None,
    limits: Limits,
    *,
    request_number: int,
    default_seed: int,
) -> dict[int, Group]:
    """Return the groups that a request asks for, by position in its prompts.

    Args:
        request: checked whole before anything is made of it.
        status: of the engine.
        tokenizer: of the model, or None.
        limits: largest requests that are served.
        request_number: tells requests apart in the engine.
        default_seed: where the request has none.

    Raises:
        InvalidArgument: names the field, the value and what is allowed.
    """
    count = len(request.prompts)
    if count == 0:
        raise InvalidArgument("prompts", [], "must hold at least one prompt")
    if count > limits.prompts:
        raise InvalidArgument("prompts", f"{count} prompts", f"must be at most {limits.prompts}")
    if len(request.num_rollouts) != count:
        raise InvalidArgument(
            "num_rollouts",
            f"{len(request.num_rollouts)} numbers",
            f"must be one per prompt ({count})",
        )
    for at, wanted in enumerate(request.num_rollouts):
        if not 0 <= wanted <= limits.group:
            raise InvalidArgument(
                f"num_rollouts[{at}]", wanted, f"must be from 0 to {limits.group}"
            )
    params = request.sampling
    _check_sampling(params, status)
    seed = params.seed if params.HasField("seed") else default_seed
    groups = {}
    for at, (prompt, wanted) in enumerate(zip(request.prompts, request.num_rollouts, strict=True)):
        tokens = _tokens(prompt, at, status, tokenizer)
        sampling = _sampling(params, tokens, at, status)
        if wanted:
            groups[at] = Group(
                tokens, wanted, sampling, seeds.group_seed(seed, at), request=request_number
            )
    return groups


def _tokens(
    prompt: pb.Prompt, at: int, status: EngineStatus, tokenizer: Tokenizer | None
) -> list[int]:
    field = f"prompts[{at}]"
    kind = prompt.WhichOneof("content")
    if kind is None:
        raise InvalidArgument(field, "", "must hold tokens, text or chat")
    if kind == "tokens":
        tokens = list(prompt.tokens.ids)
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


def _check_sampling(params: pb.SamplingParams, status: EngineStatus) -> None:
    if params.HasField("max_tokens") and params.max_tokens < 1:
        raise InvalidArgument("sampling.max_tokens", params.max_tokens, "must be 1 or more")
    if params.HasField("temperature") and not (
        math.isfinite(params.temperature) and params.temperature >= 0
    ):
        raise InvalidArgument("sampling.temperature", params.temperature, "must be 0 or more")
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


def _sampling(
    params: pb.SamplingParams, tokens: Sequence[int], at: int, status: EngineStatus
) -> Sampling:
    room = status.max_model_tokens - len(tokens)
    if status.max_model_tokens and room < 1:
        raise InvalidArgument(
            f"prompts[{at}]",
            f"{len(tokens)} tokens",
            f"must leave room for a completion; the model holds {status.max_model_tokens}",
        )
    if params.HasField("max_tokens"):
        most = min(params.max_tokens, room) if status.max_model_tokens else params.max_tokens
    elif status.max_model_tokens:
        most = room
    else:
        raise InvalidArgument("sampling.max_tokens", "absent", "is needed; the model has no limit")
    return Sampling(
        max_tokens=most,
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
    )


def weights_message(loaded: LoadedWeights) -> pb.WeightStatus:
    """Return loaded weights as a message."""
    return pb.WeightStatus(weight_version=loaded.version, fingerprint=loaded.fingerprint)

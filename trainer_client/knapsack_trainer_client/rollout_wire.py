"""What the clients of the generation server share: rollouts, prompts and errors on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import grpc

from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_trainer_client.errors import (
    GeneratorBusy,
    GeneratorUnavailable,
    InvalidRequest,
    WeightUpdateFailed,
    refused,
)

_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
    pb.FINISH_REASON_ERROR: "error",
}

MESSAGE_BYTES = 64 * 2**20
"""Most bytes of a message, on both sides."""

PromptLike = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout.

    Attributes:
        prompt_index: position in the prompts asked for.
        rollout_index: which of the prompt's rollouts, from 0.
        token_ids: of the completion, the end token among them.
        logprobs: natural log-probability of each, under what it was drawn from.
        text: the completion, where the model has a tokenizer.
        finish_reason: "stop", "length", "abort" or "error".
        weight_versions: (version, start, end) of the tokens each version made.
        error: why it failed; empty if it did not.
    """

    prompt_index: int
    rollout_index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    weight_versions: tuple[tuple[int, int, int], ...]
    error: str

    @property
    def weight_version(self) -> int:
        """The version that made its last token; -1 for a rollout without tokens."""
        return self.weight_versions[-1][0] if self.weight_versions else -1


class RolloutGroups(list[list[Rollout]]):
    """A list of rollouts per prompt, in the order of their indices.

    Attributes:
        failed: rollouts that failed or that the engine gave up; they are in no group and
            were never completions. Leave them out of the report: fewer rollouts than
            allocated is normal.
        stopped: (prompt_index, rollout_index) of rollouts that were stopped before they
            had finished.
    """

    def __init__(self, prompts: int) -> None:
        super().__init__([] for _ in range(prompts))
        self.failed: list[Rollout] = []
        self.stopped: list[tuple[int, int]] = []

    def put(self, rollout: Rollout) -> None:
        """Put a rollout into its group, or among those that failed."""
        if rollout.error or rollout.finish_reason == "abort":
            self.failed.append(rollout)
        else:
            self[rollout.prompt_index].append(rollout)

    def sort_groups(self) -> None:
        """Put every group in the order of its rollouts' indices."""
        for group in self:
            group.sort(key=lambda rollout: rollout.rollout_index)


def prompt_messages(prompts: Sequence[PromptLike], prompt_ids: Sequence[str]) -> list[pb.Prompt]:
    """Return prompts with their names as messages; InvalidRequest if the names do not fit."""
    if len(prompt_ids) not in (0, len(prompts)):
        raise refused("prompt_ids", prompt_ids, f"must be one per prompt ({len(prompts)})")
    names = prompt_ids or [""] * len(prompts)
    return [_prompt_message(prompt, name) for prompt, name in zip(prompts, names, strict=True)]


def _prompt_message(prompt: PromptLike, name: str) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(prompt_id=name, text=prompt)
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        messages = [pb.ChatMessage(role=m["role"], content=m["content"]) for m in items]  # type: ignore[index]
        return pb.Prompt(prompt_id=name, chat=pb.ChatMessages(messages=messages))
    return pb.Prompt(prompt_id=name, tokens=pb.TokenIds(ids=items))  # type: ignore[arg-type]


def rollout_of(message: pb.Rollout) -> Rollout:
    """Return a message as a rollout."""
    return Rollout(
        message.prompt_index,
        message.rollout_index,
        list(message.token_ids),
        list(message.logprobs),
        message.text,
        _REASONS.get(message.finish_reason, ""),
        tuple((span.weight_version, span.start, span.end) for span in message.weight_versions),
        message.error,
    )


def raise_status(error: grpc.RpcError, address: str, missing: str = "") -> NoReturn:
    """Raise what a status of the generation server means to a caller.

    Args:
        error: the status.
        address: of the server.
        missing: what the caller has not got of it, for a server that has gone.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        raise InvalidRequest(details) from None
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        raise WeightUpdateFailed(details) from None
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        raise GeneratorBusy(details) from None
    if code is grpc.StatusCode.UNIMPLEMENTED:
        raise GeneratorUnavailable(
            f"{address}: what answers there does not know this call ({details}): it is no "
            "generation server, or one that is older than this client"
        ) from None
    raise GeneratorUnavailable(f"{address}: {code.name}: {details}{missing}") from error

"""A stream of outcomes: checked as it arrives, stored as one, and read back."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_scheduler import validation
from knapsack_scheduler.errors import InvalidArgument, ResourceExhausted
from knapsack_scheduler.facts import ImportedPart, OutcomesImported
from knapsack_scheduler.limits import Limits
from knapsack_scheduler.wire.requests import rewards_at


@dataclass(slots=True)
class ImportStream:
    """Collects the messages of an import, checked one by one as they arrive."""

    limits: Limits
    run_id: str = ""
    request_id: str = ""
    rollouts: int = 0
    size: int = 0
    messages: list[pb.ImportOutcomesRequest] | None = None

    def add(self, message: pb.ImportOutcomesRequest) -> None:
        """Take one message; InvalidArgument or ResourceExhausted refuses the stream."""
        if self.messages is None:
            self.messages = []
            self.run_id = validation.name("run_id", message.run_id)
            self.request_id = validation.name("request_id", message.request_id)
        for field in ("run_id", "request_id"):
            value, first = getattr(message, field), getattr(self, field)
            if value not in ("", first):
                raise InvalidArgument(field, value, f"must be {first!r} as before, or empty")
        _imported_part(message, self.limits)
        self.rollouts += len(message.rewards)
        self.size += message.ByteSize()
        if self.rollouts > self.limits.import_rollouts or self.size > self.limits.import_bytes:
            raise ResourceExhausted(
                f"an import may hold {self.limits.import_rollouts} rollouts and "
                f"{self.limits.import_bytes} bytes; split it into several"
            )
        self.messages.append(message)

    def prompts(self) -> int:
        """Count the prompts that have an outcome."""
        return len(
            {
                prompt_id
                for message in self.messages or ()
                for prompt_id, n in zip(message.prompt_ids, message.num_rewards, strict=True)
                if n
            }
        )

    def payload(self) -> bytes:
        """Return the messages as the journal stores them."""
        if self.messages is None:
            raise InvalidArgument("run_id", "", "is required; the stream held no message")
        parts = [m.SerializeToString(deterministic=True) for m in self.messages]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def _imported_part(message: pb.ImportOutcomesRequest, limits: Limits) -> ImportedPart:
    validation.within("step", message.step, 0, limits.step)
    ids = validation.prompts("prompt_ids", message.prompt_ids, limits)
    each = np.asarray(message.num_rewards, np.int64)
    if each.size != len(ids):
        raise InvalidArgument(
            "num_rewards", f"{each.size} numbers", f"must be one per prompt ({len(ids)})"
        )
    counts = validation.reward_counts(each, len(message.rewards))
    places = np.arange(len(ids))
    rewards = rewards_at(places, counts, len(ids) - 1, message.rewards, message.completion_tokens)
    return ImportedPart(message.step, ids, rewards)


def imported_of(payload: bytes, limits: Limits) -> OutcomesImported:
    """Return what an import's stored messages hold."""
    parts, at = [], 0
    while at < len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        message = pb.ImportOutcomesRequest.FromString(payload[at + 4 : at + 4 + size])
        parts.append(_imported_part(message, limits))
        at += 4 + size
    return OutcomesImported(tuple(parts))

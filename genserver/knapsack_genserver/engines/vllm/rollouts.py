"""From groups to vLLM's requests, and from its stream of deltas to finished rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from knapsack_genserver.engine import Completion, FinishReason, Group, WeightSpan

_SEEDS = 2**62
"""Seeds are below it, so that a seed plus an index stays a signed 64-bit number."""

_REASONS = {
    "stop": FinishReason.STOP,
    "repetition": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
}


def sampling_params(group: Group, first: int, count: int) -> SamplingParams:
    """Return how vLLM draws rollouts ``first .. first + count - 1`` of a group.

    vLLM gives the i-th of a request's rollouts the request's seed plus i, so a rollout's
    seed is the group's plus its index, in whichever part it is asked for. Greedy rollouts
    are all the same, and vLLM makes no more than one of them.
    """
    sampling = group.sampling
    greedy = sampling.temperature == 0
    return SamplingParams(
        n=1 if greedy else count,
        seed=group.seed % _SEEDS + first,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=sorted(sampling.stop_token_ids),
        max_tokens=sampling.max_tokens,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        # Each rollout comes when it has ended, whatever the others do.
        output_kind=RequestOutputKind.DELTA,
        stream_interval=sampling.max_tokens,
    )


class Gathered:
    """Puts the deltas of one request together.

    Args:
        first, count: which rollouts of the group the request stands for.
        greedy: the request has one rollout that stands for all of them.
        version_of: the number of a weight version's label.

    Attributes:
        first, count: as given.
        missing: indices of the rollouts that have not ended.
    """

    def __init__(
        self, first: int, count: int, greedy: bool, version_of: Callable[[str], int]
    ) -> None:
        self.first = first
        self.count = count
        self._greedy = greedy
        self._version_of = version_of
        self._parts: dict[int, tuple[list[int], list[float]]] = {}
        self.missing = set(range(first, first + count))

    def add(self, output: Any) -> Iterator[Completion]:
        """Take a message of vLLM's; yield the rollouts that ended with it."""
        for part in output.outputs:
            tokens, logprobs = self._parts.setdefault(part.index, ([], []))
            if part.token_ids:
                tokens.extend(part.token_ids)
            if part.logprobs:
                # The sampled token's is the first of each position.
                flat = part.logprobs
                logprobs.extend(flat.logprobs[start] for start in flat.start_indices)
            if part.finish_reason is not None:
                del self._parts[part.index]
                yield from self._ended(part, tokens, logprobs)

    def _ended(self, part: Any, tokens: list[int], logprobs: list[float]) -> Iterator[Completion]:
        spans = tuple(
            WeightSpan(self._version_of(span.version), span.start, span.end)
            for span in part.weight_versions or ()
            if span.end > span.start
        )
        reason = _REASONS.get(part.finish_reason)
        error = "" if reason else f"vLLM ended it with {part.finish_reason!r}"
        indices = sorted(self.missing) if self._greedy else [self.first + part.index]
        for index in indices:
            self.missing.discard(index)
            yield Completion(index, tokens, logprobs, reason or FinishReason.ERROR, spans, error)

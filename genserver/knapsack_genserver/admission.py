"""How much work the server takes on: counted before any of it is begun."""

from __future__ import annotations

from dataclasses import dataclass

from knapsack_genserver.errors import InvalidArgument, ResourceExhausted


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """What the server holds at most.

    Attributes:
        waiting_rollouts: admitted and not finished, of all calls.
        call_rollouts: the same, of one call.
        prompt_tokens: of the prompts of all calls under way.
        calls: that generate at once.
    """

    waiting_rollouts: int = 4_000_000
    call_rollouts: int = 1_000_000
    prompt_tokens: int = 100_000_000
    calls: int = 256


class Admission:
    """Counts what is admitted, and refuses what is too much."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self.calls = 0
        self.rollouts = 0
        self.prompt_tokens = 0

    def admit_call(self) -> None:
        """Count a call; ResourceExhausted if there are too many."""
        if self.calls >= self._limits.calls:
            raise ResourceExhausted(
                f"{self.calls} calls are under way; at most {self._limits.calls} may be "
                "(max_calls)",
                "calls",
            )
        self.calls += 1

    def admit(self, rollouts: int, prompt_tokens: int, of_call: int) -> None:
        """Count work.

        Args:
            rollouts: wanted.
            prompt_tokens: of the new prompts.
            of_call: rollouts of the same call that are not finished.

        Raises:
            InvalidArgument, ResourceExhausted: it would never fit, or does not now; names
                the limit, and nothing is counted.
        """
        limits = self._limits
        if rollouts > limits.call_rollouts:
            raise InvalidArgument(
                "num_rollouts",
                f"{rollouts} in all",
                f"must be at most {limits.call_rollouts} (max_call_rollouts)",
            )
        if of_call + rollouts > limits.call_rollouts:
            raise ResourceExhausted(
                f"{rollouts} rollouts do not fit beside the {of_call} of the same call that wait; "
                f"at most {limits.call_rollouts} may (max_call_rollouts)",
                "call_rollouts",
            )
        if self.rollouts + rollouts > limits.waiting_rollouts:
            raise ResourceExhausted(
                f"{rollouts} rollouts do not fit beside the {self.rollouts} that wait; "
                f"at most {limits.waiting_rollouts} may (max_waiting_rollouts)",
                "waiting_rollouts",
            )
        if self.prompt_tokens + prompt_tokens > limits.prompt_tokens:
            raise ResourceExhausted(
                f"prompts of {prompt_tokens} tokens do not fit beside those of "
                f"{self.prompt_tokens} that are held; at most {limits.prompt_tokens} tokens are "
                "(max_prompt_tokens)",
                "prompt_tokens",
            )
        self.rollouts += rollouts
        self.prompt_tokens += prompt_tokens

    def accounted(self, rollouts: int) -> None:
        """Count rollouts that are accounted for."""
        self.rollouts -= rollouts

    def ended(self, prompt_tokens: int) -> None:
        """Count a call that has ended, with the tokens of its prompts."""
        self.calls -= 1
        self.prompt_tokens -= prompt_tokens

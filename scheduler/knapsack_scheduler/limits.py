"""What one call may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest requests that are served.

    Attributes:
        prompts: positions of one call.
        id_length: characters of a prompt id.
        total_rollouts: budget of one allocation, and rollouts of one report.
        group_rollouts: min_rollouts of a position. A larger max_rollouts is no bound.
        step: step, policy version and token budget.
        jump: how far a step or policy version may be beyond its run's newest one.
        import_rollouts: rollouts of one import.
        import_bytes: bytes of one import.
        import_message_bytes: bytes of one message of an import.
        message_bytes: bytes of one message.
        concurrent_calls: calls served at once.
        inflight_bytes: bytes of requests and answers in memory at once.
        imports: streams of outcomes received or applied at once.
        large_bytes: a call with more bytes than this waits for its turn among large calls.
        large_calls: large calls worked on at once; fewer than there are worker threads, so
            that small calls never wait for large ones.
        connections: open connections of the API.
        transfer_seconds: within which a message must arrive, or be taken.
    """

    prompts: int = 200_000
    id_length: int = 1024
    total_rollouts: int = 10_000_000
    group_rollouts: int = 100_000
    step: int = 2**53
    jump: int = 100_000
    import_rollouts: int = 10_000_000
    import_bytes: int = 64 * 2**20
    import_message_bytes: int = 8 * 2**20
    message_bytes: int = 64 * 2**20
    concurrent_calls: int = 1024
    inflight_bytes: int = 512 * 2**20
    imports: int = 2
    large_bytes: int = 2**20
    large_calls: int = 2
    connections: int = 4096
    transfer_seconds: float = 30.0

    @property
    def receiving_bytes(self) -> int:
        """Memory that a message may take while it arrives: as frames, then copied."""
        return 2 * self.message_bytes

    @property
    def memory_bytes(self) -> int:
        """What calls may take at most, beside what is known of the runs themselves.

        Requests and answers, two large calls worked on and one parsed (40 times a message,
        measured), imports.
        """
        return (
            self.inflight_bytes
            + 40 * self.message_bytes
            + self.imports * (3 * self.import_bytes + self.receiving_bytes)
        )

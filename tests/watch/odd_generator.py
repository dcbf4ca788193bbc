"""The real generation server on two engines without a model, which can be told to misbehave.

odd_generator.py [--fail-every N] [--lose-every N] [--hold] [--missing]
"""

from __future__ import annotations

import argparse
import asyncio
import signal

from knapsack_genserver.engine import Group
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.errors import ReplicaLost
from knapsack_genserver.inbox import Inbox
from knapsack_genserver.replicas import ReplicaPool
from knapsack_genserver.server import ServerOptions, serve


class OddEngine(FakeEngine):
    """A replica that can be lost, and may never start.

    Args:
        lose_every: requests of which one loses it; 0 for none.
        missing: whether it does not start.
        hold, fails: of the engine.
    """

    def __init__(self, lose_every: int, missing: asyncio.Event, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._lose_every = lose_every
        self._missing = missing
        self._asked = 0

    async def start(self) -> None:
        """Begin another life, unless it is missing."""
        if self._missing.is_set():
            raise ReplicaLost("there is no node with room")
        self._closing = False

    async def check(self) -> None:
        """Be lost when it is missing."""
        if self._missing.is_set():
            raise ReplicaLost("its node is gone")

    def generate(self, group: Group) -> Inbox:
        """Queue a group, or be lost with it."""
        self._asked += 1
        if self._lose_every and self._asked % self._lose_every == 0:
            raise ReplicaLost("told to be lost")
        return super().generate(group)


def main() -> None:
    """Serve until SIGTERM; SIGUSR1 takes the second replica away, too, if one is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fail-every", type=int, default=0, help="rollouts of which one fails")
    parser.add_argument("--lose-every", type=int, default=0, help="requests that lose a replica")
    parser.add_argument("--hold", action="store_true", help="no rollout ever finishes")
    parser.add_argument("--missing", action="store_true", help="one replica never starts")
    options = parser.parse_args()

    def fails(_group: Group, index: int) -> bool:
        return bool(options.fail_every) and (index + 1) % options.fail_every == 0

    async def run() -> None:
        hold = asyncio.Event() if options.hold else None
        never, later = asyncio.Event(), asyncio.Event()
        if options.missing:
            never.set()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, later.set)
        engines = [
            OddEngine(options.lose_every, missing, hold=hold, fails=fails)
            for missing in (never, later)
        ]
        any_port = "127.0.0.1:0"
        await serve(
            ReplicaPool("odd", engines),
            ServerOptions(listen=any_port, admin_listen=any_port, health_listen=any_port),
        )

    asyncio.run(run())


if __name__ == "__main__":
    main()

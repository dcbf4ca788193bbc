"""The real generation server on the engine without a model, which can be told to misbehave.

odd_generator.py [--fail-every N] [--hold]
"""

from __future__ import annotations

import argparse
import asyncio

from knapsack_genserver.engine import Group
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.server import ServerOptions, serve


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fail-every", type=int, default=0, help="rollouts of which one fails")
    parser.add_argument("--hold", action="store_true", help="no rollout ever finishes")
    options = parser.parse_args()

    def fails(_group: Group, index: int) -> bool:
        return bool(options.fail_every) and (index + 1) % options.fail_every == 0

    async def run() -> None:
        engine = FakeEngine(hold=asyncio.Event() if options.hold else None, fails=fails)
        any_port = "127.0.0.1:0"
        await serve(
            engine,
            ServerOptions(listen=any_port, admin_listen=any_port, health_listen=any_port),
        )

    asyncio.run(run())


if __name__ == "__main__":
    main()

"""The program knapsack-genserver, which ends when it is asked to from its first moment on.

In a container it is process 1, for which the system's answer to SIGTERM, to end it, does not
hold. What the commands need takes seconds to import, an engine tens of them, and a SIGTERM
that came meanwhile would be lost.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line; SIGTERM ends it with 143 until the server has its own answer."""
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    from knapsack_genserver import cli

    cli.main()


if __name__ == "__main__":
    main()

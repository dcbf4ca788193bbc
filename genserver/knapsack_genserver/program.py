"""The program knapsack-genserver, which ends when it is asked to from its first moment on.

In a container it is process 1, for which the system's answer to SIGTERM, to end it, does not
hold. What the commands need takes seconds to import, an engine tens of them, and a SIGTERM
that came meanwhile would be lost.

Python itself takes a tenth of a second to begin. Whoever starts this with SIGTERM blocked, as
the images do, has one of that time kept until there is a handler: of process 1 the system
throws away what nothing handles, but not what is blocked.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line; SIGTERM ends it with 143 until the server has its own answer."""
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    from knapsack_genserver import cli

    cli.main()


if __name__ == "__main__":
    main()

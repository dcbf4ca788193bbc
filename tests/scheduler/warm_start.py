"""Starts schedulers by fork from a process that has imported everything.

A scheduler of a fresh interpreter needs a second to import its libraries, which a test that
kills hundreds of them cannot spare. Reads commands from stdin, ``start FLAGS`` as JSON;
answers on stdout with the line of the scheduler itself. Each start reaps the one before.
"""

from __future__ import annotations

import json
import os
import sys

import knapsack_scheduler.server  # noqa: F401
from knapsack_scheduler.cli import main


def serve_forks() -> None:
    """Fork a scheduler for every line, until the input ends."""
    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        child = os.fork()
        if child == 0:
            # Its own input, so that it cannot take a command.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            main(["serve", *json.loads(line)])
        print(json.dumps({"pid": child}), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve_forks()

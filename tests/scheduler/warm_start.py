"""Starts schedulers by fork from a process that has imported everything.

A scheduler of a fresh interpreter needs a second to import its libraries, which a test that
kills hundreds of them cannot spare. Reads commands from stdin, ``start FLAGS`` as JSON;
answers on stdout with the line of the scheduler itself. Each start reaps the one before.
Snapshots are made all the time, so that kills fall into them and into compaction.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

from knapsack_scheduler import server
from knapsack_scheduler.cli import main
from knapsack_scheduler.journal.compaction import Retention


def serve_forks() -> None:
    """Fork a scheduler for every line, until the input ends."""
    server.Retention = partial(Retention, snapshot_calls=8)  # type: ignore[misc, assignment]
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

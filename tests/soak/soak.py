"""The long versions of the tests that draw: fuzzing, kills, and the reference model.

    make soak SOAK_ARGS="--minutes 60"            an hour, a third of it each
    make soak SOAK_ARGS="--parts fuzz --requests 1000000 --minutes 120"
    make soak SOAK_ARGS="--parts chaos --kills 5000 --minutes 120"

Each part ends when its time is over or its count is reached, whichever comes first, and says
how far it got; two or three kills a second are usual. A failure ends the soak, with the flags that
begin with the round that failed. Of kills the timing decides too: the same seed may pass.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import hypothesis
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "scheduler"))

import test_chaos
import test_fuzz
import test_model
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from knapsack_proto.v1 import scheduler_pb2 as pb
from knapsack_proto.v1 import scheduler_pb2_grpc as rpc

ROUND_REQUESTS = 20_000
ROUND_KILLS = 100
ROUND_EXAMPLES = 50
MIB = 2**20


def folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder in memory where there is one: the disk is not what is tested."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


@contextmanager
def shown_again(part: str, seed: int) -> Iterator[None]:
    """Say how to begin with this round if it fails."""
    try:
        yield
    except BaseException:
        print(f"{part}: again with --parts {part} --seed {seed}", flush=True)
        raise


def soak_fuzz(seconds: float, most: int, seed: int) -> None:
    """Mutated requests against one server, which must neither fail nor grow."""
    with folder() as place:
        scheduler = test_chaos.WarmScheduler(Path(place))
        scheduler.start()
        scheduler.serving()
        try:
            process = psutil.Process(scheduler.pid)
            begin, done, answered, resident = time.monotonic(), 0, 0, []
            while done < most and time.monotonic() - begin < seconds:
                with shown_again("fuzz", seed):
                    answered += asyncio.run(test_fuzz.fuzz(scheduler.address, seed, ROUND_REQUESTS))
                done += ROUND_REQUESTS
                seed += 1
                # Each round leaves the server with nothing to remember.
                with grpc.insecure_channel(scheduler.address) as channel:
                    stub = rpc.BudgetSchedulerStub(channel)  # type: ignore[no-untyped-call]
                    for run in stub.ListRuns(pb.ListRunsRequest(page_size=1000)).runs:
                        stub.DeleteRun(pb.DeleteRunRequest(run_id=run.run_id))
                resident.append(process.memory_info().rss)
                rate = done / (time.monotonic() - begin)
                print(
                    f"fuzz: {done:,} requests, {answered:,} answered OK, {rate:,.0f} per second, "
                    f"{resident[-1] / MIB:,.0f} MiB",
                    flush=True,
                )
            warm = resident[len(resident) // 4]
            growth = (resident[-1] - warm) / MIB
            print(f"fuzz: memory changed by {growth:+.0f} MiB after the first quarter")
            assert growth < 50
            log = (Path(place) / "log").read_text()
            assert log == "", log[:2000]
        finally:
            scheduler.close()


def soak_chaos(seconds: float, most: int, seed: int) -> None:
    """Kills under load, a new store every hundred."""
    begin, kills, rollouts = time.monotonic(), 0, 0
    while kills < most and time.monotonic() - begin < seconds:
        with tempfile.TemporaryDirectory() as place:
            scheduler = test_chaos.WarmScheduler(Path(place))
            try:
                with shown_again("chaos", seed):
                    rollouts += asyncio.run(test_chaos.chaos(scheduler, ROUND_KILLS, seed))
            finally:
                scheduler.close()
        kills += ROUND_KILLS
        seed += 1
        print(
            f"chaos: {kills:,} kills, {rollouts:,} acknowledged rollouts, each counted once, "
            f"in {time.monotonic() - begin:,.0f} s",
            flush=True,
        )


def soak_model(seconds: float, most: int, seed: int) -> None:
    """Sequences of calls against the reference model."""
    begin, examples = time.monotonic(), 0
    while examples < most and time.monotonic() - begin < seconds:
        test_model.Machine.TestCase.settings = settings(
            max_examples=ROUND_EXAMPLES,
            stateful_step_count=80,
            deadline=None,
            database=None,
            phases=[Phase.generate],
        )
        with shown_again("model", seed):
            run_state_machine_as_test(hypothesis.seed(seed)(test_model.Machine))
        examples += ROUND_EXAMPLES
        seed += 1
        print(
            f"model: {examples:,} sequences of up to 80 calls in {time.monotonic() - begin:,.0f} s",
            flush=True,
        )


PARTS = {"fuzz": soak_fuzz, "chaos": soak_chaos, "model": soak_model}


def main() -> None:
    """Run the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=10**6, help="most of fuzz")
    parser.add_argument("--kills", type=int, default=2000, help="most of chaos")
    parser.add_argument("--examples", type=int, default=10**5, help="most of model")
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    most = {"fuzz": options.requests, "chaos": options.kills, "model": options.examples}
    for part in options.parts:
        PARTS[part](60 * options.minutes / len(options.parts), most[part], options.seed)


if __name__ == "__main__":
    main()

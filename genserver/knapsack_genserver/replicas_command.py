"""The command line: knapsack-genserver replicas, for whoever runs a server with replicas."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import grpc

from knapsack_genserver.helptext import ShownDefaults
from knapsack_genserver.server import ServerOptions, host_and_port
from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_proto.v1 import generation_pb2_grpc as rpc

_POLL_SECONDS = 1.0
_STATE = "REPLICA_STATE_"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, with ``run`` as what it does."""
    command = commands.add_parser(
        "replicas",
        help="list the replicas of a running server, or change how many there are",
        description="List the replicas of a running server: where each is, what it holds, and "
        "why it does not serve. With --set, have so many: new ones serve once they hold the "
        "weights that serve, those that are too many finish what they hold. Exits with 0, 1 if "
        "--wait was too short, or 2 if the server refuses or does not answer.",
        formatter_class=ShownDefaults,
    )
    add = command.add_argument
    add("--address", default=ServerOptions().listen, help="HOST:PORT of the server's API")
    add("--set", type=int, metavar="N", help="how many replicas there should be")
    add(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait until as many serve as should and no other is left, at most so long",
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    host_and_port("address", options.address)
    end = time.monotonic() + options.wait
    with grpc.insecure_channel(options.address) as channel:
        stub = rpc.RolloutGeneratorStub(channel)  # type: ignore[no-untyped-call]
        try:
            if options.set is not None:
                status = stub.SetReplicas(pb.SetReplicasRequest(replicas=options.set), timeout=10)
            else:
                status = stub.GetStatus(pb.GetStatusRequest(), timeout=10)
            while not _settled(status) and time.monotonic() < end:
                time.sleep(min(_POLL_SECONDS, max(0.0, end - time.monotonic())))
                status = stub.GetStatus(pb.GetStatusRequest(), timeout=10)
        except grpc.RpcError as error:
            print(f"knapsack-genserver: {options.address}: {_said(error)}", file=sys.stderr)
            return 2
    for line in _lines(status):
        print(line)
    return 0 if _settled(status) or not options.wait else 1


def _settled(status: pb.GeneratorStatus) -> bool:
    gone = all(each.state != pb.REPLICA_STATE_DRAINING for each in status.members)
    # A server that is older says nothing of how many there should be.
    return gone and status.replicas == (status.wanted_replicas or status.replicas)


def _said(error: grpc.RpcError) -> str:
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in str(error.details()):
        return "no generation server answers there"
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return "that server is older than this command"
    return str(error.details())


def _lines(status: pb.GeneratorStatus) -> Iterator[str]:
    yield (
        f"{status.replicas} of {status.wanted_replicas or status.replicas} replicas serve weight "
        f"version {status.weight_version}; {status.running_rollouts} rollouts run, "
        f"{status.waiting_rollouts} wait"
    )
    if not status.members:
        return
    rows = [("replica", "state", "rollouts", "losses", "where", "why")]
    rows += [
        (
            str(each.number),
            pb.ReplicaState.Name(each.state).removeprefix(_STATE).lower(),
            str(each.running_rollouts),
            str(each.losses),
            each.place or "-",
            each.problem or "-",
        )
        for each in status.members
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

"""Which scheduler a command asks, and how: its flags, and one question."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

from knapsack_trainer_client.calls import Caller, NotFound, Refused, Unanswered
from knapsack_trainer_client.errors import InvalidRequest, SchedulerUnavailable
from knapsack_trainer_client.events import Event
from knapsack_trainer_client.nouns import TLS
from knapsack_trainer_client.transport import GrpcTransport

DEFAULT_ADDRESS = "localhost:50051"

SECONDS = 5.0
"""Longest wait for an answer that reads, unless ``--timeout`` says otherwise."""

AnswerT = TypeVar("AnswerT")


class Unreached(SchedulerUnavailable):
    """Nobody answered, as against an answer that was a failure."""


def add_connection(parser: argparse.ArgumentParser, change: float | None = None) -> None:
    """Add the flags that say where the scheduler is and who asks.

    Args:
        parser: of the command.
        change: seconds that the command gives to what it changes, for the help; it finds
            ``timeout`` None where the caller named none. None: it changes nothing.
    """
    parser.add_argument(
        "--address",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="gRPC address of the scheduler (default: %(default)s)",
    )
    apart = "" if change is None else f"; {change:g} for the change itself"
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=SECONDS if change is None else None,
        metavar="SECONDS",
        help=f"longest wait for an answer (default: {SECONDS}{apart})",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file that holds the bearer token alone (default: no token)",
    )
    parser.add_argument("--tls", action="store_true", help="use TLS with the system's authorities")
    parser.add_argument("--tls-ca", metavar="FILE", help="use TLS and trust this PEM file")
    parser.add_argument("--tls-cert", metavar="FILE", help="client certificate, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")


def ask(
    arguments: argparse.Namespace,
    question: Callable[[Caller], Awaitable[AnswerT]],
    emit: Callable[[Event], None] = lambda event: None,
) -> AnswerT:
    """Return the answer to a question, over a connection of its own.

    Args:
        arguments: with the flags of ``add_connection``.
        question: makes its calls.
        emit: told of what happens to them.

    Raises:
        InvalidRequest: the call, a flag or a file is wrong, or the run does not exist.
        AccessDenied: the scheduler does not accept the caller.
        Unreached: nobody answers.
        SchedulerUnavailable: the answer is a failure of the scheduler.
    """

    async def connected() -> AnswerT:
        transport = GrpcTransport(arguments.address, _token(arguments), _tls(arguments))
        caller = Caller(transport, emit, lambda: 0, lambda: None)
        await transport.open()
        try:
            return await question(caller)
        finally:
            await transport.close()

    try:
        with _grpc_silent():
            return asyncio.run(connected())
    except Refused as error:
        raise InvalidRequest(str(error)) from None
    except NotFound as error:
        raise InvalidRequest(f"{error}; knapsack-rl runs lists those that do") from None
    except Unanswered as failure:
        kind = Unreached if failure.unreachable else SchedulerUnavailable
        raise kind(failure.reason) from None


def uses_tls(arguments: argparse.Namespace) -> bool:
    """Return whether the flags of ``add_connection`` ask for an encrypted connection."""
    return bool(_tls(arguments))


def seconds(text: str) -> float:
    """Return the seconds of a flag, above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: must be seconds above 0")
    return number


@contextmanager
def _grpc_silent() -> Iterator[None]:
    """Keep what gRPC's core writes to file descriptor 2 from among the lines of the command.

    It reads ``GRPC_VERBOSITY`` when it is imported, which is before a command can set it; who
    sets it sees its lines.
    """
    if "GRPC_VERBOSITY" in os.environ or sys.stderr is None:
        yield
        return
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere, open(kept, "w", buffering=1) as ours:
        os.dup2(nowhere.fileno(), 2)
        try:
            # Where Python's own is not the descriptor, it needs no other.
            with redirect_stderr(ours if sys.stderr is sys.__stderr__ else sys.stderr):
                yield
        finally:
            os.dup2(kept, 2)


def _token(arguments: argparse.Namespace) -> str | None:
    if arguments.token_file is None:
        return None
    try:
        with open(arguments.token_file) as file:
            token = file.read().strip()
    except OSError as error:
        raise InvalidRequest(f"--token-file {arguments.token_file}: {error.strerror}") from None
    if len(token.split()) != 1:
        raise InvalidRequest(
            f"--token-file {arguments.token_file}: must hold one token and nothing else; is it the "
            "scheduler's own file, which has a run prefix beside each token?"
        )
    return token


def _tls(arguments: argparse.Namespace) -> TLS | bool | None:
    if arguments.tls_ca or arguments.tls_cert or arguments.tls_key:
        return TLS(arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    return True if arguments.tls else None

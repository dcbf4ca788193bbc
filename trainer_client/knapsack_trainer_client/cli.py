"""The command line: what a scheduler knows of runs and prompts, the demo, and the lab."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from knapsack_trainer_client.calls import Caller
from knapsack_trainer_client.errors import InvalidRequest, KnapsackError, SchedulerUnavailable
from knapsack_trainer_client.nouns import TLS, PromptStats, Run
from knapsack_trainer_client.queries import fetch_prompt_stats, fetch_runs, no_fallback
from knapsack_trainer_client.terminal import printable, shortened, width
from knapsack_trainer_client.top import Screen, show
from knapsack_trainer_client.transport import GrpcTransport

DEFAULT_ADDRESS = "localhost:50051"

_SORTS: dict[str, Callable[[PromptStats], tuple[Any, ...]]] = {
    "prompt": lambda s: (s.prompt_id,),
    "rollouts": lambda s: (-s.total_rollouts, s.prompt_id),
    "successes": lambda s: (-s.total_successes, s.prompt_id),
    "rate": lambda s: (s.success_rate, s.prompt_id),
    "step": lambda s: (-s.last_step, s.prompt_id),
    "tokens": lambda s: (-s.mean_completion_tokens, s.prompt_id),
}


@dataclass(frozen=True, slots=True)
class _WholeCommand:
    """A command of another package, loaded only when it is asked for.

    Attributes:
        noun: what it is called in a sentence.
        help: its line in the list of commands.
        extra: of this distribution that installs what it needs.
        load: imports it; takes arguments, returns an exit code.
    """

    noun: str
    help: str
    extra: str
    load: Callable[[], Callable[[list[str]], int | None]]


def _load_demo() -> Callable[[list[str]], int | None]:
    # Read when torch is loaded, here and in the demo's servers. More threads gain nothing on a
    # model of this size, and on a busy machine they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from knapsack_trainer_client.demo.main import run

    return run


def _load_simulate() -> Callable[[list[str]], int | None]:
    from knapsack_scheduler.lab.simulate_command import main

    return main


def _load_replay() -> Callable[[list[str]], int | None]:
    from knapsack_scheduler.lab.replay_command import main

    return main


_WHOLE_COMMANDS = {
    "demo": _WholeCommand(
        "the demo", "train a small model, uniform against knapsack", "demo", _load_demo
    ),
    "simulate": _WholeCommand(
        "the simulation", "what each policy wins on simulated prompts", "lab", _load_simulate
    ),
    "replay": _WholeCommand(
        "the replay", "what each policy would have done in a run you have", "lab", _load_replay
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 after one line of error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _WHOLE_COMMANDS:
        # These read their own arguments, --help among them.
        return _whole_command(_WHOLE_COMMANDS[argv[0]], argv[1:])
    # Read when the first channel is made; its lines would stand among those of the command.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except SchedulerUnavailable as error:
        where = arguments.address
        return _failed(f"is a scheduler serving its API at {where}? --address names it. {error}")
    except KnapsackError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-rl",
        description="Look into a budget scheduler, see the demo, or see what the policies would "
        "do in a simulation or on a log of your own.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=version("knapsack-rl"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    runs = commands.add_parser(
        "runs",
        help="list the runs of a scheduler",
        description="List the runs of a scheduler: one line per experiment. effective: share of "
        "groups whose rewards are not all equal. predicted, came: of the chances to become "
        "effective that were predicted in each wave, the mean, and the share that came true.",
    )
    _add_connection(runs)
    runs.set_defaults(command=_runs)
    top = commands.add_parser(
        "top",
        help="watch the runs of a scheduler, refreshed in place",
        description="Watch the runs of a scheduler, refreshed in place, those that move most "
        "first. effective, predicted and came: as for runs; success: share of rewards above the "
        "run's threshold; ignored: rollouts reported of steps that a rewind had forgotten.",
    )
    _add_connection(top)
    top.add_argument(
        "--every",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="time between refreshes (default: %(default)s)",
    )
    top.add_argument("--once", action="store_true", help="print one table and end, for scripts")
    top.set_defaults(command=_top)
    stats = commands.add_parser(
        "stats",
        help="list what is known of each prompt of a run",
        description="List what is known of each prompt of a run: rollouts, successes and the "
        "posterior mean of the success rate.",
    )
    _add_connection(stats)
    stats.add_argument("--run", required=True, metavar="RUN", help="name of the run")
    stats.add_argument(
        "--sort",
        choices=_SORTS,
        default="rollouts",
        help="rate: lowest first; prompt: by name; all others: highest first "
        "(default: %(default)s)",
    )
    stats.add_argument(
        "--limit",
        type=_count,
        default=20,
        metavar="N",
        help="most prompts to show; 0 for all (default: %(default)s)",
    )
    stats.set_defaults(command=_stats)
    for name, command in _WHOLE_COMMANDS.items():
        commands.add_parser(
            name, help=f"{command.help} (needs knapsack-rl[{command.extra}])", add_help=False
        )
    return parser


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="gRPC address of the scheduler (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="longest wait for an answer (default: %(default)s)",
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


def _runs(arguments: argparse.Namespace) -> int:
    runs: list[Run] = _ask(arguments, lambda caller: fetch_runs(caller, arguments.timeout))
    rows = [
        [
            run.run_id,
            run.config.policy or "",
            run.config.objective or "",
            str(run.last_step) if run.last_step >= 0 else "-",
            f"{run.known_prompts:,}",
            f"{run.total_rollouts:,}",
            _share(run.total_successes, run.total_rollouts),
            _share(run.effective_groups, run.reported_groups),
            _percent(run.calibration.predicted_effective_group_rate),
            _percent(run.calibration.effective_group_rate),
            f"{run.create_time:%Y-%m-%d %H:%M}" if run.create_time else "",
        ]
        for run in runs
    ]
    heads = ["run", "policy", "objective", "step", "prompts", "rollouts", "success"]
    heads += ["effective", "predicted", "came", "created"]
    print(_table(heads, rows, left={0, 1, 2, 10}) if rows else "no runs")
    return 0


def _top(arguments: argparse.Namespace) -> int:
    def fetch() -> list[Run]:
        return list(_ask(arguments, lambda caller: fetch_runs(caller, arguments.timeout)))

    screen = Screen(_table, _percent)
    if arguments.once:
        print("\n".join(screen.lines(fetch(), time.monotonic())))
    elif sys.stdout.isatty():
        show(fetch, arguments.address, arguments.every, screen)
    else:
        raise InvalidRequest("top needs a terminal; --once prints one table")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    stats: list[PromptStats] = _ask(
        arguments, lambda caller: fetch_prompt_stats(caller, arguments.run, arguments.timeout)
    )
    shown = sorted(stats, key=_SORTS[arguments.sort])[: arguments.limit or None]
    rows = [
        [
            s.prompt_id,
            f"{s.total_rollouts:,}",
            f"{s.total_successes:,}",
            f"{s.success_rate:.3f}",
            str(s.last_step) if s.last_step >= 0 else "-",
            f"{s.mean_completion_tokens:,.0f}" if s.mean_completion_tokens else "-",
        ]
        for s in shown
    ]
    heads = ["prompt", "rollouts", "successes", "rate", "step", "tokens"]
    print(_table(heads, rows, left={0}) if rows else "no outcomes yet")
    if len(shown) < len(stats):
        print(f"{len(shown):,} of {len(stats):,} prompts; --limit 0 shows all")
    return 0


def _whole_command(command: _WholeCommand, argv: Sequence[str]) -> int:
    try:
        main = command.load()
    except ImportError as error:
        return _failed(
            f"{command.noun} needs more packages: pip install 'knapsack-rl[{command.extra}]' "
            f"({error})"
        )
    try:
        return int(main(list(argv)) or 0)
    except (KnapsackError, OSError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return 130


def _ask(arguments: argparse.Namespace, question: Callable[[Caller], Any]) -> Any:
    async def ask() -> Any:
        transport = GrpcTransport(arguments.address, _token(arguments), _tls(arguments))
        caller = Caller(transport, lambda event: None, lambda: 0, lambda: None)
        await transport.open()
        try:
            with no_fallback():
                return await question(caller)
        finally:
            await transport.close()

    return asyncio.run(ask())


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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> str:
    """Return rows under their heads, columns aligned, those in ``left`` to the left."""
    # Names come from users: a control character must not steer the terminal.
    lines = [list(heads), *([shortened(printable(cell)) for cell in row] for row in rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(_padded(line, widths, left)).rstrip() for line in lines)


def _padded(line: Sequence[str], widths: Sequence[int], left: set[int]) -> Iterator[str]:
    for i, cell in enumerate(line):
        blank = " " * (widths[i] - width(cell))
        yield cell + blank if i in left else blank + cell


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: must be seconds above 0")
    return seconds


def _failed(message: str) -> int:
    print(f"knapsack-rl: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

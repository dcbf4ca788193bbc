"""The command line: what a scheduler knows of runs and prompts, the demo, and the lab."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from knapsack_trainer_client.connection import Unreached, add_connection, ask, seconds, uses_tls
from knapsack_trainer_client.errors import InvalidRequest, KnapsackError
from knapsack_trainer_client.forget_command import CHANGE_SECONDS, delete, rewind, step_to_keep
from knapsack_trainer_client.nouns import PromptStats, Run
from knapsack_trainer_client.queries import fetch_prompt_stats, fetch_runs
from knapsack_trainer_client.tables import percent, step_or_dash, table
from knapsack_trainer_client.top import Screen, show

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
    """Run the command line; return its exit code.

    0, 1 where a person was asked and said no, or 2 after one line of error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _WHOLE_COMMANDS:
        # These read their own arguments, --help among them.
        return _whole_command(_WHOLE_COMMANDS[argv[0]], argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except Unreached as error:
        tls = uses_tls(arguments)
        return _failed(
            f"is a scheduler serving its API{' with TLS' if tls else ''} at {arguments.address}? "
            f"--address names it{'' if tls else '; where it has TLS, add --tls or --tls-ca'}. "
            f"{error}"
        )
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
        description="Look into a budget scheduler, rewind or delete its runs, see the demo, or see "
        "what the policies would do in a simulation or on a log of your own.",
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
    add_connection(runs)
    runs.set_defaults(command=_runs)
    top = commands.add_parser(
        "top",
        help="watch the runs of a scheduler, refreshed in place",
        description="Watch the runs of a scheduler, refreshed in place, those that move most "
        "first. effective, predicted and came: as for runs; success: share of rewards above the "
        "run's threshold; ignored: rollouts reported of steps that a rewind had forgotten.",
    )
    add_connection(top)
    top.add_argument(
        "--every",
        type=seconds,
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
    add_connection(stats)
    _add_run(stats)
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
    _add_forgetting(commands)
    for name, command in _WHOLE_COMMANDS.items():
        commands.add_parser(
            name, help=f"{command.help} (needs knapsack-rl[{command.extra}])", add_help=False
        )
    return parser


def _add_forgetting(commands: Any) -> None:
    rewound = commands.add_parser(
        "rewind",
        help="forget what came after a step of a run",
        description="Forget every allocation and report of a run that came after a step, for "
        "good: it goes on as a run that never went further. Stop its trainer first, or it goes "
        "on from where it is. Outcomes that were imported stay. Reports of forgotten steps that "
        "still come are counted as ignored, and not otherwise. How far back it goes: the "
        "scheduler's --rewind-horizon, 1,000 steps by default.",
        epilog="The exit code is 0, 1 if you said no, or 2 after a line of error. A trainer that "
        "resumes from a checkpoint calls rewind(step) itself.",
    )
    _add_change(rewound, rewind)
    rewound.add_argument(
        "--step",
        required=True,
        type=step_to_keep,
        metavar="STEP",
        help="the last step to keep; -1 keeps none",
    )
    deleted = commands.add_parser(
        "delete",
        help="delete a run",
        description="Delete a run with all that is known of its prompts, for good. Stop its "
        "trainer first, or its next call begins the run anew. One that the scheduler cannot read "
        "can be deleted, too. To keep a copy, where the store is: knapsack-scheduler export "
        "--store URL --run RUN --to FILE.",
        epilog="The exit code is 0, 1 if you said no, or 2 after a line of error.",
    )
    _add_change(deleted, delete)


def _add_change(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]
) -> None:
    add_connection(parser, CHANGE_SECONDS)
    _add_run(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask back, for scripts")
    parser.set_defaults(command=command)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN", help="name of the run")


def _runs(arguments: argparse.Namespace) -> int:
    runs: list[Run] = ask(arguments, lambda caller: fetch_runs(caller, arguments.timeout))
    rows = [[run.run_id, *_figures(run)] for run in runs]
    heads = ["run", "policy", "objective", "step", "prompts", "rollouts", "success"]
    heads += ["effective", "predicted", "came", "created"]
    print(table(heads, rows, left={0, 1, 2, 10}) if rows else "no runs")
    return 0


def _figures(run: Run) -> list[str]:
    if not run.is_known:
        return ["cannot be read", *[""] * 9]
    return [
        run.config.policy or "",
        run.config.objective or "",
        step_or_dash(run.last_step),
        f"{run.known_prompts:,}",
        f"{run.total_rollouts:,}",
        _share(run.total_successes, run.total_rollouts),
        _share(run.effective_groups, run.reported_groups),
        percent(run.calibration.predicted_effective_group_rate),
        percent(run.calibration.effective_group_rate),
        f"{run.create_time:%Y-%m-%d %H:%M}",
    ]


def _top(arguments: argparse.Namespace) -> int:
    def fetch() -> list[Run]:
        return list(ask(arguments, lambda caller: fetch_runs(caller, arguments.timeout)))

    screen = Screen()
    if arguments.once:
        print("\n".join(screen.lines(fetch(), time.monotonic())))
    elif sys.stdout.isatty():
        show(fetch, arguments.address, arguments.every, screen)
    else:
        raise InvalidRequest("top needs a terminal; --once prints one table")
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    stats: list[PromptStats] = ask(
        arguments, lambda caller: fetch_prompt_stats(caller, arguments.run, arguments.timeout)
    )
    shown = sorted(stats, key=_SORTS[arguments.sort])[: arguments.limit or None]
    rows = [
        [
            s.prompt_id,
            f"{s.total_rollouts:,}",
            f"{s.total_successes:,}",
            f"{s.success_rate:.3f}",
            step_or_dash(s.last_step),
            f"{s.mean_completion_tokens:,.0f}" if s.mean_completion_tokens else "-",
        ]
        for s in shown
    ]
    heads = ["prompt", "rollouts", "successes", "rate", "step", "tokens"]
    print(table(heads, rows, left={0}) if rows else "no outcomes yet")
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


def _share(part: int, whole: int) -> str:
    return percent(part / whole if whole else None)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _failed(message: str) -> int:
    print(f"knapsack-rl: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

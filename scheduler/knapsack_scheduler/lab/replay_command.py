"""``knapsack-rl replay``: what each policy would have done in a run that you have."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.lab.arms import ARMS, BASELINE, ORACLE, find_arms
from knapsack_scheduler.lab.log_checks import Remark, check_log
from knapsack_scheduler.lab.log_columns import COMMON_NAMES, LogError, WantedColumns
from knapsack_scheduler.lab.outcome_log import OutcomeLog, read_log
from knapsack_scheduler.lab.progress import Progress
from knapsack_scheduler.lab.replay import ReplaySettings, replay
from knapsack_scheduler.lab.replay_json import as_json
from knapsack_scheduler.lab.replay_outcome import Replay
from knapsack_scheduler.lab.replay_words import (
    Words,
    answer_table,
    bands_table,
    best_of,
    in_words,
    parts_table,
)
from knapsack_scheduler.lab.report import Section, Table, printable, write_report
from knapsack_scheduler.lab.terminal import table_text
from knapsack_scheduler.lab.waste import Waste, waste_of

_WIDTH = 100
_REPLAYED_ROLLOUTS = 1_000_000
_MOST_REPLICATES = 8
_ARMS = [name for name in ARMS if name != ORACLE]


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0, or 2 after one line of error."""
    options = _parser().parse_args(argv)
    try:
        _run(options, argv)
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        sys.stderr.close()
    except (LogError, OSError) as error:
        return _failed(str(error))
    except ImportError as error:
        return _failed(f"this needs more packages: pip install 'knapsack-rl[lab]' ({error})")
    return 0


def _run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    for file in (options.report, options.json):
        # Now, because a file that cannot be written is no news for the end.
        if file is not None and not file.absolute().parent.is_dir():
            raise LogError(f"{str(file)!r}: there is no folder {str(file.parent)!r}")
    if options.report is not None:
        from knapsack_scheduler.lab import replay_plots  # noqa: F401
    progress = Progress(sys.stderr)
    wanted = WantedColumns(
        options.step_column, options.prompt_column, options.reward_column, options.tokens_column
    )
    log = read_log(options.log, wanted, lambda rows: progress.show(f"{rows:,} rows read"))
    progress.clear()
    remarks = check_log(log, options.success_threshold)
    waste = waste_of(log, options.success_threshold)
    replicates = options.replicates or _replicates(log)
    settings = ReplaySettings(
        find_arms([BASELINE, *options.arms], options.objective),
        options.min_rollouts,
        options.max_rollouts,
        options.success_threshold,
        options.budget_share,
        replicates,
        options.seed,
    )
    replayed = replay(
        log, settings, lambda done, steps: progress.show(f"step {done:,} of {steps:,} replayed")
    )
    half = _with_half(log, settings, replayed, progress)
    progress.clear()
    words = in_words(replayed, waste, options.budget_share, half)
    _print(log, replayed, words, remarks)
    if options.json is not None:
        found = as_json(replayed, waste, settings, remarks, half)
        options.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if options.report is not None:
        command = shlex.join(["knapsack-rl", "replay", *argv])
        _write_report(options.report, replayed, waste, words, remarks, command, settings)
        print(f"\nreport: {options.report}")


def _with_half(
    log: OutcomeLog, settings: ReplaySettings, replayed: Replay, progress: Progress
) -> Replay | None:
    """Return the best arm against uniform with half the budget, where that tells more.

    What arms give beyond a uniform log is never in it; with half of the rollouts most is.
    """
    best, baseline = best_of(replayed), replayed.outcome(BASELINE)
    if settings.budget_share < 1.0 or best is None or baseline is None:
        return None
    if np.median(log.group_sizes) < 2 * settings.min_rollouts or best.beyond_log == 0.0:
        return None
    return replay(
        log,
        replace(settings, arms=(baseline.arm, best.arm), budget_share=0.5),
        lambda done, steps: progress.show(f"step {done:,} of {steps:,} replayed with half"),
        replayed.hindsight,
    )


def _replicates(log: OutcomeLog) -> int:
    """Return as many random orders as make about a million replayed rollouts."""
    return min(max(_REPLAYED_ROLLOUTS // log.rewards.size, 1), _MOST_REPLICATES)


def _print(log: OutcomeLog, replayed: Replay, words: Words, remarks: list[Remark]) -> None:
    columns = "" if log.columns is None else f" Columns: {log.columns}."
    _paragraph(words.log + columns)
    for remark in remarks:
        _paragraph(("WARNING: " if remark.serious else "note: ") + remark.text)
    print()
    for sentence in words.answer:
        _paragraph(sentence)
    print()
    _print_table(answer_table(replayed))
    _print_table(parts_table(replayed))
    _print_table(bands_table(replayed))
    for sentence in (*words.support, *words.limits):
        _paragraph(sentence)


def _paragraph(text: str) -> None:
    print(textwrap.fill(printable(text), _WIDTH, break_on_hyphens=False))


def _print_table(table: Table) -> None:
    print(table_text(table))
    _paragraph(table.caption)
    print()


def _write_report(
    path: Path,
    replayed: Replay,
    waste: Waste,
    words: Words,
    remarks: list[Remark],
    command: str,
    settings: ReplaySettings,
) -> None:
    from knapsack_scheduler.lab import replay_plots as plots

    warnings = [one.text for one in remarks if one.serious]
    notes = [one.text for one in remarks if not one.serious]
    sections = [
        Section("The policies", (), [answer_table(replayed)], [plots.plot_figures(replayed)]),
        Section("How far the log supports this", words.support, [parts_table(replayed)]),
        Section("What the run wasted", (), (), [plots.plot_waste(replayed, waste)]),
        Section(
            "Who got the rollouts",
            (),
            [bands_table(replayed)],
            [plots.plot_bands(replayed), plots.plot_sizes(replayed)],
        ),
        Section(
            "What the policies expected",
            ["Before its last wave of a step a policy says how likely each group is to become "
             "effective. This is how often they did."],
            (),
            [plots.plot_calibration(replayed)],
        ),
        Section("What a replay cannot tell", words.limits),
    ]  # fmt: skip
    if warnings or notes:
        sections.insert(0, Section("The log", [words.log, *notes]))
    write_report(
        path,
        "Replay of a log",
        [*(f"Warning: {text}" for text in warnings), *words.answer],
        sections,
        {
            "command": command,
            "version": version("knapsack-rl"),
            "columns": str(replayed.log.columns or "an export of knapsack-scheduler"),
            "orders": f"{settings.replicates}, seed {settings.seed}",
            "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-rl replay",
        description="Replay the log of a run that you have: how many rollouts lay in groups that "
        "teach nothing, what each policy would have given which prompt, what would have come "
        "out, and how far the log can tell.",
        epilog="A log has one row per rollout: step, prompt id, reward and, if you like, its "
        "tokens; or one row per group with a list of rewards. JSON lines, CSV and Parquet are "
        "read, also several files or a folder of them, such as the completions that TRL logs "
        "or verl's rollout_data_dir; and what `knapsack-scheduler export` writes.",
    )
    parser.add_argument("log", nargs="+", type=Path, metavar="LOG", help="files or folders")
    for role, names in COMMON_NAMES.items():
        parser.add_argument(
            f"--{role}-column",
            metavar="NAME",
            help=f"column of the {'number of tokens' if role == 'tokens' else role} "
            f"(default: the first of {', '.join(names[:3])} ...)",
        )
    parser.add_argument(
        "--arms",
        nargs="+",
        type=_arm,
        default=_ARMS,
        metavar="ARM",
        help=f"what to compare, uniform always among it (default: all: {', '.join(_ARMS)})",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="paper",
        help="what the policies maximise; value is counted in it too, but in paper where it is "
        "another paper's rule (default: %(default)s)",
    )
    parser.add_argument(
        "--success-threshold",
        type=_reward,
        default=0.5,
        metavar="REWARD",
        help="a reward above this is a success (default: %(default)s)",
    )
    parser.add_argument(
        "--min-rollouts",
        type=_positive,
        default=2,
        metavar="N",
        help="fewest of a group (default: %(default)s)",
    )
    parser.add_argument(
        "--max-rollouts",
        type=_positive,
        default=128,
        metavar="N",
        help="most of a group (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-share",
        type=_share,
        default=1.0,
        metavar="SHARE",
        help="share of each step's rollouts that all policies may spend; less of them, and "
        "more of what they generate is in the log (default: %(default)s)",
    )
    parser.add_argument(
        "--replicates",
        type=_positive,
        metavar="R",
        help="random orders of each group to average over (default: 1 to 8, for about a "
        "million rollouts)",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of the random orders (default: %(default)s)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a report")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser


def _arm(text: str) -> str:
    if text not in _ARMS:
        why = ": nobody knows the success rates of a log" if text == ORACLE else ""
        raise argparse.ArgumentTypeError(f"{text!r}{why}: must be some of {', '.join(_ARMS)}")
    return text


def _reward(text: str) -> float:
    try:
        reward = float(text)
    except ValueError:
        reward = math.nan
    if not math.isfinite(reward):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number")
    return reward


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to 100000")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be above 0 and at most 1")
    return share


def _failed(message: str) -> int:
    print(f"knapsack-rl replay: {' '.join(printable(message).split())}", file=sys.stderr)
    return 2

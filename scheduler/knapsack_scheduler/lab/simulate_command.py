"""``knapsack-rl simulate``: what each policy wins on simulated prompts."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from knapsack_scheduler.core.catalogue import OBJECTIVES
from knapsack_scheduler.errors import ConfigError
from knapsack_scheduler.lab import simulate_tables as tables
from knapsack_scheduler.lab.arms import ARMS, BASELINE, find_arms
from knapsack_scheduler.lab.intervals import LEVEL, Interval
from knapsack_scheduler.lab.measures import SIDE_BY_SIDE, SUCCESS, TOKENS, Results
from knapsack_scheduler.lab.population import BANDS
from knapsack_scheduler.lab.random_scenarios import random_scenario
from knapsack_scheduler.lab.report import Section, printable, write_report, write_whole
from knapsack_scheduler.lab.scenario import Scenario, load_scenario, shipped_names
from knapsack_scheduler.lab.simulate import simulate
from knapsack_scheduler.lab.terminal import table_text

_WIDTH = 100
_MOST_DRAWN = 12
"""Scenarios with plots of their own; beyond, the page would be tens of megabytes."""

_CANNOT_TELL = (
    "A simulation shows what follows from its assumptions: bands of success rates, drift, and a "
    "learning rate that turns information gain into progress. They are invented. It does not "
    "train anything, knows no noise in rewards, no prompts that help each other in particular, "
    "and no cost of waiting for a wave. What a policy does on a run you have, replay shows; what "
    "it does to learning, only training shows."
)


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit code: 0, or 2 after one line of error."""
    options = _parser().parse_args(argv)
    try:
        return _list() if options.list else _run(options, argv)
    except BrokenPipeError:
        # The reader, such as head, has seen enough.
        sys.stderr.close()
        return 0
    except (ConfigError, ValueError, OSError) as error:
        return _failed(str(error))
    except ImportError as error:
        return _failed(
            f"--report needs more packages: pip install 'knapsack-rl[lab]' ({error})",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-rl simulate",
        description="Simulate training runs on prompts whose success rates are known, and see what "
        "each policy wins: every arm gets the same prompts in the same order with the same luck.",
        epilog="A scenario is a small TOML file; write one after those that --list names the "
        "folder of.",
    )
    parser.add_argument("--list", action="store_true", help="list the scenarios there are and stop")
    parser.add_argument(
        "--scenario",
        action="extend",
        nargs="+",
        metavar="NAME|FILE",
        help="what to simulate, one or more (default: base)",
    )
    parser.add_argument(
        "--random",
        type=_count,
        default=0,
        metavar="N",
        help="simulate N scenarios drawn at random as well, or alone without --scenario",
    )
    parser.add_argument(
        "--random-seed",
        type=_count,
        default=0,
        metavar="S",
        help="draw the random scenarios numbered from S (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=5,
        metavar="K",
        help="repeat with seeds 0 to K-1; intervals need 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="ARM",
        help=f"what to compare, uniform always among it (default: all: {', '.join(ARMS)})",
    )
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="paper",
        help="what the arms maximise and value is measured in (default: %(default)s)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a page of HTML")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    return parser


def _list() -> int:
    names = shipped_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name.ljust(width)}  {load_scenario(name).about}")
    print(f"\nfiles: {Path(__file__).with_name('scenarios')}")
    return 0


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    arms = find_arms([BASELINE, *options.arms], options.objective)
    scenarios = [load_scenario(name) for name in options.scenario or ()]
    first = options.random_seed
    scenarios += [random_scenario(first + k) for k in range(options.random)]
    if not scenarios:
        scenarios = [load_scenario("base")]
    for file in (options.report, options.json):
        # Now, because a file that cannot be written is no news for the end.
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{str(file)!r}: there is no folder {str(file.parent)!r}")
        if file is not None and file.is_dir():
            raise ConfigError(f"{str(file)!r}: is a folder, must be a file")
    if options.report:
        from knapsack_scheduler.lab import simulate_plots  # noqa: F401
    all_results = []
    for number, scenario in enumerate(scenarios):
        label = f"{printable(scenario.name)} ({number + 1} of {len(scenarios)})"
        runs = []
        for seed in range(options.seeds):
            show = _progress(f"{label}: seed {seed + 1} of {options.seeds}", scenario)
            traces = simulate(scenario, arms, seed, show)
            runs.append({trace.arm.name: trace for trace in traces})
        _clear()
        results = Results(scenario, arms, tuple(runs))
        all_results.append(results)
        _print(results, last=scenario is scenarios[-1])
    if len(all_results) > 1:
        overview = tables.overview_table(all_results)
        print(f"\n{overview.caption}\n\n{table_text(overview)}")
        for sentence in tables.against_oracle(all_results):
            print(f"\n{_wrapped(sentence)}")
    command = "knapsack-rl simulate " + shlex.join(argv)
    if options.report:
        _write_page(options.report, all_results, command)
        print(f"\nreport: {options.report}")
    if options.json:
        text = json.dumps(_data(all_results, command), indent=1, allow_nan=False)
        write_whole(options.json, text + "\n")
    return 0


def _print(results: Results, last: bool) -> None:
    scenario = results.scenario
    about = f": {printable(scenario.about)}" if scenario.about else ""
    print(f"{printable(scenario.name)}{about}")
    print(_wrapped(tables.heading(results)))
    print(f"\n{table_text(tables.main_table(results))}\n")
    for sentence in tables.verdicts(results):
        print(_wrapped(sentence, "- "))
    if last:
        print("\n" + _wrapped(f"{tables.LEGEND} ({tables.certainty(len(results.seeds))})."))
    else:
        print()


def _wrapped(text: str, bullet: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _write_page(path: Path, all_results: Sequence[Results], command: str) -> None:
    from knapsack_scheduler.lab import simulate_plots

    drawn = len(all_results) <= _MOST_DRAWN
    sections = []
    if len(all_results) > 1:
        sections.append(
            Section(
                "All scenarios",
                tables.against_oracle(all_results),
                tables=[tables.overview_table(all_results)],
                figures=[simulate_plots.overview(all_results)],
            )
        )
    for results in all_results:
        sections.append(
            Section(
                results.scenario.name,
                [results.scenario.about, *tables.verdicts(results)],
                [
                    tables.main_table(results),
                    tables.difference_table(results),
                    tables.band_table(results),
                    tables.calibration_table(results),
                ],
                simulate_plots.figures(results) if drawn else (),
            )
        )
    sections.append(Section("What this cannot tell", [_CANNOT_TELL]))
    first = all_results[0]
    summary = [
        f"Simulated runs of {len(first.arms)} arms on "
        f"{len(all_results)} scenario{'s' if len(all_results) > 1 else ''}, with the same prompts, "
        "order and luck for every arm. Value is what effective groups teach under the true "
        "success rates, which no policy but the oracle knows. Read it beside the effective group "
        "rate and the effective rollout rate: a rule can win any one of the three by losing the "
        "others.",
    ]
    if not drawn:
        summary.append(f"Plots of single scenarios are drawn for up to {_MOST_DRAWN} of them.")
    write_report(
        path,
        "What each policy wins: a simulation",
        summary,
        sections,
        {
            "version": f"knapsack-rl {version('knapsack-rl')}",
            "command": command,
            "seeds": f"0 to {len(first.seeds) - 1}",
            "intervals": f"{LEVEL:.0%}, Student's t over seeds, paired with uniform",
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        },
    )


def _data(all_results: Sequence[Results], command: str) -> dict[str, Any]:
    """Return every number, with nulls where a number has no meaning."""
    return {
        "version": version("knapsack-rl"),
        "command": command,
        "level": LEVEL,
        "scenarios": [
            {
                "scenario": results.scenario.model_dump(mode="json"),
                "arms": {arm.name: _arm_data(results, arm.name) for arm in results.arms},
            }
            for results in all_results
        ],
    }


def _arm_data(results: Results, arm: str) -> dict[str, Any]:
    measures = (*SIDE_BY_SIDE, SUCCESS, TOKENS)
    return {
        "measures": {
            window: {
                m.name: {
                    "level": _interval(results.level(arm, m, window)),
                    ("per cent" if m.relative else "points") + " against uniform": _interval(
                        results.against_uniform(arm, m, window)
                    ),
                }
                for m in measures
            }
            for window in results.windows
        },
        "largest group": results.largest_group(arm),
        "share of rollouts": dict(zip(BANDS, results.band_shares(arm).tolist(), strict=True)),
    }


def _interval(found: Interval) -> dict[str, Any]:
    return {
        "mean": _number(found.mean),
        "half": _number(found.half),
        "seeds": [_number(value) for value in found.values],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _progress(label: str, scenario: Scenario) -> Callable[[int], None]:
    """Return what shows the steps done on a terminal, and does nothing elsewhere."""
    steps = scenario.run.steps_per_epoch * scenario.run.epochs

    def show(step: int) -> None:
        if step % 8 == 0 or step == steps:
            print(f"\r\x1b[K{label}, step {step} of {steps}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda step: None


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def _failed(message: str) -> int:
    print(f"knapsack-rl simulate: {' '.join(printable(message).split())}", file=sys.stderr)
    return 2

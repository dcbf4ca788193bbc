"""``knapsack-rl demo``: the experiment from end to end, on real parts."""

from __future__ import annotations

import argparse
import copy
import itertools
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_trainer_client import BudgetClient, RunConfig
from knapsack_trainer_client.demo import plot, processes, results
from knapsack_trainer_client.demo.model import exact_accuracy, new_model, save, warm_up
from knapsack_trainer_client.demo.screen import Screen
from knapsack_trainer_client.demo.task import Problem, World
from knapsack_trainer_client.demo.train import History, Schedule, train
from knapsack_trainer_client.rollouts import RolloutClient


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to divide the rollouts."""

    policy: str
    wave_fraction: float = 0.0


ARMS: Mapping[str, Arm] = {
    results.BASELINE: Arm("uniform"),
    "knapsack": Arm("posterior"),
    "knapsack 2 waves": Arm("posterior", wave_fraction=0.5),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much work the experiment is."""

    warm_up_steps: int
    problems: int
    held_out: int
    schedule: Schedule


FULL = Size(1000, 1024, 1024, Schedule(72, 128, 1024, 1e-3, 6, seed=0))
QUICK = replace(FULL, schedule=replace(FULL.schedule, steps=18, evaluate_every=3))
SMOKE = Size(20, 64, 64, Schedule(4, 16, 96, 1e-3, 2, seed=0))


def run(arguments: list[str]) -> int:
    """Run the demo with command line arguments; returns the exit code."""
    options = _parser().parse_args(arguments)
    out: Path = options.out
    # Now, because a folder that cannot be made is no news for the end of a run.
    out.mkdir(parents=True, exist_ok=True)
    size = SMOKE if options.smoke else QUICK if options.quick else FULL
    screen = Screen()
    started = time.monotonic()
    folder = _memory_folder()
    try:
        runs = _experiment(size, options.seeds, folder, screen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results.write(out / "results.json", asdict(size) | {"seeds": options.seeds}, runs)
    plot.draw(out / "demo.png", runs)
    screen.conclude(runs, out, time.monotonic() - started)
    if size is QUICK:
        screen.say(
            "This was --quick: two visits per prompt and one seed, so that history has hardly "
            "begun to pay. The whole demo takes more steps; --seeds tells luck from lead."
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="knapsack-rl demo",
        description="Train a small transformer with GRPO three times at the same number of "
        "rollouts: divided uniformly, by knapsack, and by knapsack in two waves. A scheduler and "
        "a generation server are started as processes of their own and stopped at the end.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the training steps, in about a minute"
    )
    parser.add_argument(
        "--seeds",
        type=_positive,
        default=1,
        metavar="N",
        help="repeat with N seeds (world, warm-up, prompts and sampling) for error bars "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-results"),
        metavar="DIR",
        help="folder for the picture and the results (default: %(default)s)",
    )
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, 1 or more")
    return int(text)


def _memory_folder() -> Path:
    """Return a new folder, in memory where there is such a disk: weights pass through it."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="knapsack-demo-", dir=shared if shared.is_dir() else None))


def _experiment(size: Size, seeds: int, folder: Path, screen: Screen) -> dict[str, list[History]]:
    runs: dict[str, list[History]] = {name: [] for name in ARMS}
    save(new_model(0), folder / "model")
    store = f"sqlite:///{folder / 'scheduler.db'}"
    with (
        processes.scheduler(store, screen.say) as scheduler,
        processes.generation_server(str(folder / "model"), screen.say) as generator,
        RolloutClient(generator.address) as rollouts,
        screen,
    ):
        screen.say(
            f"scheduler pid {scheduler.pid} at {scheduler.address}, page http://{scheduler.admin}/"
        )
        screen.say(f"generation server pid {generator.pid} at {generator.address}")
        screen.say(f"try kill -9 {scheduler.pid}: the training goes on")
        for seed in range(seeds):
            world = World(seed)
            model = new_model(seed)
            label = f"seed {seed + 1} of {seeds}: " if seeds > 1 else ""
            with screen.bar(f"{label}warm-up", size.warm_up_steps) as advance:
                warm_up(model, world, size.warm_up_steps, seed, advance)
            held_out = world.problems(size.held_out, 1_000_000 + seed)
            problems = world.problems(size.problems, seed, {p.prompt_id for p in held_out})
            screen.say(label + _spread(model, problems))
            for name, arm in ARMS.items():
                with (
                    BudgetClient(
                        scheduler.address,
                        f"{name}-{seed}",
                        config=RunConfig(policy=arm.policy),
                        # So long that a busy machine makes no wave a fallback.
                        timeout=20.0,
                        outbox=folder / "outbox.db",
                    ) as budget,
                    screen.bar(label + name, size.schedule.steps) as advance,
                ):
                    runs[name].append(
                        train(
                            copy.deepcopy(model),
                            problems,
                            held_out,
                            replace(size.schedule, seed=seed),
                            budget,
                            rollouts,
                            folder / "weights",
                            wave_fraction=arm.wave_fraction,
                            on_step=advance,
                        )
                    )
    return runs


def _spread(model: Any, problems: list[Problem]) -> str:
    """Return how hard the problems are before GRPO, in one line."""
    rates = exact_accuracy(model, problems)
    edges = [0, 0.02, 0.25, 0.75, 0.98, 1]
    shares = np.histogram(rates, edges)[0] / len(rates)
    bands = ", ".join(
        f"{share:.0%} in {low:g}–{high:g}"
        for share, (low, high) in zip(shares, itertools.pairwise(edges), strict=True)
    )
    return f"success rates after the warm-up: {bands}"

"""``knapsack-rl top``: the runs of a scheduler, refreshed in place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from shutil import get_terminal_size

from knapsack_trainer_client.errors import SchedulerUnavailable
from knapsack_trainer_client.nouns import Run
from knapsack_trainer_client.tables import counted, percent, step_or_dash, table
from knapsack_trainer_client.terminal import LONGEST, cut, printable, shortened, width

_HOME_AND_CLEAR = "\x1b[H\x1b[J"
_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"

HEADS = (
    *("run", "policy", "objective", "step", "version", "prompts", "rollouts", "rollouts/s"),
    *("success", "effective", "predicted", "came", "ignored", "rewinds"),
)
LEFT = {0, 1, 2}
EXPENDABLE = ("objective", "policy", "version", "rewinds", "prompts", "ignored", "success")
"""Columns that a narrow terminal does without, the first one first: what never changes goes
before what came of the rollouts."""

_SHORTEST = 16
"""Columns of a run's name that there are on the narrowest terminal."""


class Screen:
    """Remembers the answer before, for what changes per second."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}

    def lines(
        self, runs: Sequence[Run], now: float, name_columns: int = LONGEST, columns: int = 0
    ) -> list[str]:
        """Return the heads and a line per run, those that move most first.

        Args:
            runs: as the scheduler lists them.
            now: seconds on the clock of the calls before.
            name_columns: most that a run's name takes.
            columns: of the terminal; what does not fit is left out as ``EXPENDABLE`` says, and
                where that does not suffice lines are longer. 0: nothing is left out.
        """
        rates = {run.run_id: self._rate(run, now) for run in runs}
        self._before = {run.run_id: (now, run.total_rollouts) for run in runs}
        moving = sorted(runs, key=lambda run: (-(rates[run.run_id] or 0.0), run.run_id))
        names = [shortened(printable(run.run_id), name_columns) for run in moving]
        figures = [self._figures(run, rates[run.run_id]) for run in moving]
        for spared in range(len(EXPENDABLE) + 1):
            kept = [i for i, head in enumerate(HEADS) if head not in EXPENDABLE[:spared]]
            lines = _laid_out(names, figures, kept)
            if not columns or max(map(width, lines)) <= columns:
                break
        return lines

    def _rate(self, run: Run, now: float) -> float | None:
        before = self._before.get(run.run_id)
        if before is None or now <= before[0]:
            return None
        # After a rewind there are fewer than before.
        return max(run.total_rollouts - before[1], 0) / (now - before[0])

    def _figures(self, run: Run, rate: float | None) -> list[str] | None:
        if not run.is_known:
            return None
        total, groups, calibration = run.total_rollouts, run.reported_groups, run.calibration
        return [
            run.config.policy or "",
            run.config.objective or "",
            step_or_dash(run.last_step),
            str(run.last_policy_version),
            f"{run.known_prompts:,}",
            f"{total:,}",
            "-" if rate is None else f"{rate:,.1f}",
            percent(run.total_successes / total if total else None),
            percent(run.effective_groups / groups if groups else None),
            percent(calibration.predicted_effective_group_rate),
            percent(calibration.effective_group_rate),
            f"{run.ignored_rollouts:,}",
            f"{run.rewinds:,}",
        ]


def _laid_out(
    names: Sequence[str], figures: Sequence[list[str] | None], kept: Sequence[int]
) -> list[str]:
    """Return the lines of a table of some of the columns; no figures: the run cannot be read."""
    blank = [""] * (len(kept) - 2)
    rows = [
        [name, "cannot be read", *blank] if row is None else [[name, *row][i] for i in kept]
        for name, row in zip(names, figures, strict=True)
    ]
    left = {at for at, i in enumerate(kept) if i in LEFT}
    return table([HEADS[i] for i in kept], rows, left).splitlines()


def show(fetch: Callable[[], list[Run]], address: str, seconds: float, screen: Screen) -> None:
    """Refresh until Ctrl-C; an answer that fails to come leaves the last one, and says so.

    Args:
        fetch: asks for the runs.
        address: of the scheduler, for the title.
        seconds: between refreshes.
        screen: lays out the runs.
    """
    out, lines, state = sys.stdout, [], ""
    out.write(_ALTERNATE)
    try:
        while True:
            try:
                # What a name takes the figures lose.
                columns = get_terminal_size().columns
                names = max(columns // 3, _SHORTEST)
                lines = screen.lines(fetch(), time.monotonic(), names, columns)
                state = "serving"
            except SchedulerUnavailable as error:
                state = "no answer: " + " ".join(str(error).split())
            out.write(_HOME_AND_CLEAR + _frame(address, state, seconds, lines))
            out.flush()
            time.sleep(seconds)
    finally:
        out.write(_NORMAL)
        out.flush()


def _frame(address: str, state: str, seconds: float, lines: Sequence[str]) -> str:
    """Return a screenful: what does not fit the terminal is cut, and said to be."""
    columns, height = get_terminal_size()
    title = printable(f"scheduler {address}  {time.strftime('%H:%M:%S')}  {state}")
    rows = [f"{_BOLD}{cut(title, columns)}{_PLAIN}", ""]
    if lines:
        rows.append(f"{_DIM}{cut(lines[0], columns)}{_PLAIN}")
        room = max(height - 5, 1)
        rows += [cut(line, columns) for line in lines[1 : room + 1]]
        if len(lines) - 1 > room:
            more = f"{counted(len(lines) - 1 - room, 'more run')}; a taller terminal shows all"
            rows.append(cut(more, columns))
        if len(lines) == 1:
            rows.append("no runs")
    rows.append(f"{_DIM}{cut(f'every {seconds:g} s; Ctrl-C ends', columns)}{_PLAIN}")
    return "\n".join(rows)

"""What the demo shows while it runs and when it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from knapsack_trainer_client.closing import Closing
from knapsack_trainer_client.demo import results
from knapsack_trainer_client.demo.train import Evaluation, History


class Screen(Closing):
    """Progress bars on a terminal, plain lines elsewhere; warnings of the client among them."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._handler = _Lines(self.say)

    def say(self, line: str) -> None:
        """Show a line above the bars."""
        self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)

    @contextlib.contextmanager
    def bar(self, name: str, steps: int) -> Iterator[Callable[..., None]]:
        """Show a bar while the block runs; call what it gives after each step.

        It takes the newest evaluation, or nothing where there is none.
        """
        task = self._progress.add_task(name, total=steps, note="")
        shown: Evaluation | None = None

        def advance(newest: Evaluation | None = None) -> None:
            nonlocal shown
            note = f"held-out accuracy {newest.exact:.3f}" if newest is not None else ""
            self._progress.update(task, advance=1, note=note)
            if newest is not None and newest != shown and not self._console.is_terminal:
                self.say(f"{name}: {newest.rollouts:,} rollouts, {note}")
            shown = newest

        if not self._console.is_terminal:
            self.say(f"{name}: {steps} steps")
        yield advance

    def conclude(self, runs: Mapping[str, Sequence[History]], out: Path, seconds: float) -> None:
        """Show the table, what it says in words, and where the files are."""
        base = runs[results.BASELINE]
        arms = {
            name: [results.measure(h, b) for h, b in zip(seeds, base, strict=True)]
            for name, seeds in runs.items()
        }
        table = Table(box=None, pad_edge=False, header_style="bold")
        head, *rows = results.table(arms)
        for at, name in enumerate(head):
            table.add_column(name, justify="right" if at else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._console.print()
        self._console.print(table)
        self._console.print()
        for finding in results.findings(arms):
            self.say(finding)
        for name, seeds in arms.items():
            if waves := sum(m.fallback_waves for m in seeds):
                self.say(f"{name}: {waves} waves were uniform, the scheduler did not answer.")
        self.say(f"{out / 'demo.png'} and {out / 'results.json'} written; {seconds:.0f} s in all.")

    def __enter__(self) -> Self:
        self._progress.start()
        logging.getLogger("knapsack_rl").addHandler(self._handler)
        return self

    def close(self) -> None:
        """Leave the terminal and the log as they were."""
        logging.getLogger("knapsack_rl").removeHandler(self._handler)
        self._progress.stop()


class _Lines(logging.Handler):
    def __init__(self, say: Callable[[str], Any]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())

"""A log of outcomes in memory: groups by step and prompt, each with its rewards.

A rollout costs 8 bytes here, or 12 with its tokens, and about 80 while the log is read and
sorted, whatever else the files hold; prompt ids are kept once each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knapsack_scheduler.core.problem import BoolArray, FloatArray, IntArray
from knapsack_scheduler.lab.export_log import is_export, read_export
from knapsack_scheduler.lab.log_cells import (
    parse_ids,
    parse_rewards,
    parse_steps,
    parse_tokens,
)
from knapsack_scheduler.lab.log_columns import Columns, LogError, WantedColumns
from knapsack_scheduler.lab.log_files import Cells, find_files, read_cells

_NO_TOKENS = -1

Progress = Callable[[int], None]
"""Told how many rows are read."""


@dataclass(frozen=True, slots=True)
class OutcomeLog:
    """Finished rollouts, sorted by step, then prompt, then as they stood in the log.

    Attributes:
        steps: int64[S], rising, every step with a finished rollout.
        step_groups: int64[S + 1], where each step's groups begin.
        group_prompt: int32[G], row in ``prompt_ids``; each once in a step.
        group_rows: int64[G + 1], where each group's rewards begin; none is empty.
        rewards: float32[n], finite.
        tokens: int32[n], -1 where unknown; None if the log has no lengths.
        prompt_ids: every prompt, in order of first appearance.
        missing: rollouts without a reward, which are in no other number.
        columns: what was read; None of a scheduler's export.
    """

    steps: IntArray
    step_groups: IntArray
    group_prompt: npt.NDArray[np.int32]
    group_rows: IntArray
    rewards: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32] | None
    prompt_ids: list[str]
    missing: int
    columns: Columns | None

    @property
    def group_sizes(self) -> IntArray:
        """Finished rollouts of each group, int64[G]."""
        return np.diff(self.group_rows)

    @property
    def group_step(self) -> IntArray:
        """Position in ``steps`` of each group, int64[G]."""
        return np.repeat(np.arange(self.steps.size), np.diff(self.step_groups))

    @property
    def effective(self) -> BoolArray:
        """Groups whose rewards are not all equal, bool[G]."""
        starts = self.group_rows[:-1]
        low = np.minimum.reduceat(self.rewards, starts)
        high = np.maximum.reduceat(self.rewards, starts)
        effective: BoolArray = low < high
        return effective

    def successes(self, threshold: float) -> IntArray:
        """Return the rollouts of each group with a reward above the threshold, int64[G]."""
        above = (self.rewards.astype(np.float64) > threshold).astype(np.int64)
        successes: IntArray = np.add.reduceat(above, self.group_rows[:-1])
        return successes

    def group_tokens(self) -> IntArray | None:
        """Return the known tokens of each group, int64[G]; None if the log has none."""
        if self.tokens is None:
            return None
        known = np.maximum(self.tokens, 0).astype(np.int64)
        tokens: IntArray = np.add.reduceat(known, self.group_rows[:-1])
        return tokens


@dataclass(slots=True)
class _Columns:
    """Rows gathered so far, in chunks."""

    ids: dict[str, int] = field(default_factory=dict)
    steps: list[IntArray] = field(default_factory=list)
    prompts: list[npt.NDArray[np.int32]] = field(default_factory=list)
    rewards: list[npt.NDArray[np.float32]] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    any_tokens: bool = False
    rows: int = 0
    missing: int = 0

    def add(self, cells: Cells, columns: Columns) -> None:
        """Take in a batch of cells."""
        steps = parse_steps(cells.steps, columns.step, cells.place)
        names = parse_ids(cells.prompts, columns.prompt, cells.place)
        rewards = parse_rewards(cells.rewards, columns.reward, cells.place)
        tokens = None
        if cells.tokens is not None:
            tokens = parse_tokens(cells.tokens, columns.tokens or "", cells.place)
        if isinstance(rewards, list):
            sizes = [one.size for one in rewards]
            tokens = _flat_tokens(tokens, sizes, cells)
            steps = np.repeat(steps, sizes)
            prompts = np.repeat(self.code(names), sizes)
            rewards = np.concatenate(rewards) if rewards else np.zeros(0)
        else:
            prompts = self.code(names)
        if isinstance(tokens, list):
            raise LogError(
                f"{cells.place(0)}: {columns.tokens!r} has lists and {columns.reward!r} has not: "
                "must be one number for each reward"
            )
        self.extend(steps, prompts, rewards, tokens)

    def code(self, names: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the number of each prompt id, int32[n]; new ids get the next ones."""
        ids = self.ids
        return np.fromiter((ids.setdefault(name, len(ids)) for name in names), np.int32, len(names))

    def extend(
        self,
        steps: IntArray,
        prompts: npt.NDArray[np.int32],
        rewards: FloatArray,
        tokens: FloatArray | None,
    ) -> None:
        """Take in rows; a reward of NaN is a rollout that never finished."""
        self.rows += rewards.size
        finished = ~np.isnan(rewards)
        if not finished.all():
            self.missing += int(np.count_nonzero(~finished))
            steps, prompts, rewards = steps[finished], prompts[finished], rewards[finished]
            tokens = None if tokens is None else tokens[finished]
        # A reward beyond what the scheduler keeps is as large as can be.
        most = float(np.finfo(np.float32).max)
        self.rewards.append(np.clip(rewards, -most, most).astype(np.float32))
        self.steps.append(steps)
        self.prompts.append(prompts)
        if tokens is None:
            self.tokens.append(np.full(rewards.size, _NO_TOKENS, np.int32))
        else:
            self.any_tokens = True
            self.tokens.append(np.nan_to_num(tokens, nan=_NO_TOKENS).astype(np.int32))

    def sorted(self, columns: Columns | None) -> OutcomeLog:
        """Return the rows as groups; the chunks are used up."""
        steps, code = np.unique(_joined(self.steps, np.int64), return_inverse=True)
        prompts = _joined(self.prompts, np.int32)
        key = code.reshape(-1).astype(np.int64) * max(len(self.ids), 1) + prompts
        del code
        order = np.argsort(key, kind="stable")
        key = key[order]
        first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        group_step, group_prompt = np.divmod(key[first], max(len(self.ids), 1))
        del key
        rewards = _joined(self.rewards, np.float32)[order]
        tokens = _joined(self.tokens, np.int32)[order] if self.any_tokens else None
        return OutcomeLog(
            steps,
            np.searchsorted(group_step, np.arange(steps.size + 1)),
            group_prompt.astype(np.int32),
            np.append(first, rewards.size),
            rewards,
            tokens,
            list(self.ids),
            self.missing,
            columns,
        )


def read_log(
    paths: Sequence[Path], wanted: WantedColumns, progress: Progress = lambda rows: None
) -> OutcomeLog:
    """Return the log in some files and folders; rows may stand in any order.

    Args:
        paths: files of JSON lines, CSV or Parquet, or folders of them; or one file that
            ``knapsack-scheduler export`` wrote.
        wanted: names of columns; those not given are guessed in each file.
        progress: told how many rows are read, now and then.

    Raises:
        LogError: nothing to read, or something that cannot be; see the message.
    """
    files = find_files(paths)
    rows = _Columns()
    columns: Columns | None = None
    for path in files:
        if is_export(path):
            for part in read_export(path):
                rows.extend(part.steps, rows.code(part.prompt_ids), part.rewards, part.tokens)
                progress(rows.rows)
            continue
        columns, batches = read_cells(path, wanted)
        for cells in batches:
            rows.add(cells, columns)
            progress(rows.rows)
    if rows.rows == 0:
        raise LogError(f"{_names(paths)}: holds no rollouts")
    if rows.missing == rows.rows:
        raise LogError(f"{_names(paths)}: no rollout has a reward: {columns}")
    return rows.sorted(columns)


def _flat_tokens(
    tokens: FloatArray | list[FloatArray] | None, sizes: list[int], cells: Cells
) -> FloatArray | None:
    """Return a length per reward where every row is a group."""
    if tokens is None:
        return None
    rows = tokens if isinstance(tokens, list) else [np.atleast_1d(one) for one in tokens]
    parts = []
    for at, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        unknown = row.size == 1 and bool(np.isnan(row[0]))
        if row.size != size and not unknown:
            raise LogError(
                f"{cells.place(at)}: {row.size} lengths for {size} rewards: "
                "must be one number for each reward"
            )
        parts.append(np.full(size, np.nan) if unknown else row)
    return np.concatenate(parts) if parts else np.zeros(0)


def _joined(chunks: list[Any], kind: type[np.generic]) -> Any:
    """Return the chunks as one array and let go of them."""
    whole = np.concatenate(chunks) if chunks else np.zeros(0, kind)
    chunks.clear()
    return whole


def _names(paths: Sequence[Path]) -> str:
    shown = ", ".join(str(path) for path in paths[:3])
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown

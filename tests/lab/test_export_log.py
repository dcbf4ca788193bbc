"""The log of a run that the scheduler kept itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from knapsack_scheduler.inspection import export_run
from knapsack_scheduler.lab.log_columns import LogError, WantedColumns
from knapsack_scheduler.lab.outcome_log import read_log
from knapsack_trainer_client import BudgetClient


def test_an_export_is_a_log(tmp_path: Path) -> None:
    """Rewards of all waves come back by prompt and step; what a rewind forgot does not."""
    store = f"sqlite:///{tmp_path / 'stats.db'}"
    with BudgetClient.embedded(tmp_path / "stats.db", run_id="mine", timeout=60) as client:
        first = client.allocate(["a", "b"], 8, step=0, wave_fraction=0.5)
        client.report(first, [[1.0, 0.0], [0.0, 0.0]], completion_tokens=[[3, 4], [5, 6]])
        rest = client.extend(first)
        client.report(rest, [[1.0] * n for n in rest.num_rollouts])
        lost = client.allocate(["c"], 4, step=1)
        client.report(lost, [[1.0] * 4])
        client.rewind(0)
        again = client.allocate(["b", "b"], 6, step=1)
        client.report(again, [[0.25] * n for n in again.num_rollouts])
    path = tmp_path / "run.jsonl"
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in export_run(store, "mine", "journal"))
    )

    log = read_log([path], WantedColumns())
    assert [log.prompt_ids[row] for row in log.group_prompt] == ["a", "b", "b"]
    assert log.steps.tolist() == [0, 1]
    assert log.group_sizes.tolist() == [2 + rest.num_rollouts[0], 2 + rest.num_rollouts[1], 6]
    assert log.successes(0.5).tolist() == [1 + rest.num_rollouts[0], rest.num_rollouts[1], 0]
    assert np.sort(log.rewards[-6:]).tolist() == [0.25] * 6
    assert log.tokens is not None
    assert log.tokens[log.tokens > 0].tolist() == [3, 4, 5, 6]
    assert log.columns is None


def test_a_broken_export_is_named(tmp_path: Path) -> None:
    """A line that is no recorded call is refused with its number."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"seq": 1, "kind": "allocate", "request": {}, "answer": {}}\n')

    with pytest.raises(LogError, match="line 1: not a call as export writes them"):
        read_log([path], WantedColumns())

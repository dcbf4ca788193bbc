"""Runs have series of their own as long as there is a place."""

from __future__ import annotations

from knapsack_scheduler.runlabels import MOST_RUNS, OTHER, REST_SECONDS, RunLabels


def test_names_beyond_the_bound_share_one_label_until_a_run_rests() -> None:
    """However many names callers make up: the longest silent run gives way, its series end."""
    now = [0.0]
    forgotten: list[str] = []
    begun: list[str] = []
    labels = RunLabels(lambda: now[0], begun.append, forgotten.append)
    first = [labels.of(f"run-{k}") for k in range(MOST_RUNS)]
    assert first == [f"run-{k}" for k in range(MOST_RUNS)]
    assert {labels.of(f"more-{k}") for k in range(1000)} == {OTHER}
    now[0] = REST_SECONDS - 1
    assert labels.of("run-0") == "run-0"
    assert labels.of("late") == OTHER
    now[0] = REST_SECONDS + 1
    assert labels.of("late") == "late"
    assert forgotten == ["run-1"]
    assert begun == [*first, "late"]
    assert labels.of("run-0") == "run-0"


def test_a_run_that_is_removed_gives_its_place() -> None:
    """And one that has none is no error."""
    forgotten: list[str] = []
    labels = RunLabels(lambda: 0.0, lambda _run: None, forgotten.append)
    for k in range(MOST_RUNS):
        labels.of(f"run-{k}")
    labels.remove("run-7")
    labels.remove("never seen")
    assert forgotten == ["run-7"]
    assert labels.of("new") == "new"

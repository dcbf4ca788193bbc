"""What is said of odd logs before any figure."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from knapsack_scheduler.lab.log_checks import check_log
from knapsack_scheduler.lab.outcome_log import OutcomeLog

RNG = np.random.default_rng(0)


def log_of(
    prompts: list[list[str]], sizes: int | list[list[int]] = 4, rewards: object = None
) -> OutcomeLog:
    """Return the log of steps with those prompts, their group sizes and rewards."""
    names = sorted({name for step in prompts for name in step})
    each = [
        size
        for at, step in enumerate(prompts)
        for size in ([sizes] * len(step) if isinstance(sizes, int) else sizes[at])
    ]
    total = sum(each)
    drawn = RNG.integers(0, 2, total) if rewards is None else np.resize(np.array(rewards), total)
    return OutcomeLog(
        np.arange(len(prompts)),
        np.cumsum([0, *(len(step) for step in prompts)]),
        np.array([names.index(name) for step in prompts for name in step], np.int32),
        np.cumsum([0, *each]),
        drawn.astype(np.float32),
        None,
        names,
        0,
        None,
    )


def said(log: OutcomeLog, threshold: float = 0.5) -> tuple[str, bool]:
    """Return all that is said, and whether any of it is serious."""
    remarks = check_log(log, threshold)
    return " ".join(one.text for one in remarks), any(one.serious for one in remarks)


FOUR = [f"q{k}" for k in range(4)]
LOGS = [
    ("usual", log_of([FOUR, FOUR[::-1], FOUR]), "", False),
    ("constant id", log_of([["x"]] * 5), "Every rollout has the same prompt id, 'x'", True),
    (
        "uids",
        log_of([[str(uuid.UUID(int=4 * s + k)) for k in range(4)] for s in range(5)]),
        "Every step has new prompt ids, and they look like random ones",
        True,
    ),
    ("one epoch", log_of([[f"{s}-{k}" for k in range(4)] for s in range(5)]), "No prompt", False),
    (
        "places",
        log_of([["0", "1", "2", "3"]] * 9),
        "looks like a place in the batch, which is another prompt in each step",
        True,
    ),
    ("single", log_of([FOUR] * 3, 1), "100% of the groups have one rollout", True),
    (
        "resumed",
        log_of([FOUR] * 5, [[4] * 4] * 3 + [[8] * 4] + [[4] * 4]),
        "1 of 5 steps, the first of them 3, have twice the usual rollouts",
        False,
    ),
    (
        "merged",
        log_of([FOUR] * 5, [[4, 4, 8, 4], *[[4] * 4] * 4]),
        "1 groups have 8 rollouts or more where 4 are usual",
        False,
    ),
    ("uneven", log_of([FOUR] * 5, [[2, 3, 4, 5]] * 5), "Groups have from 2 to 5 rollouts", False),
    ("no signal", log_of([FOUR] * 5, 4, [1.0]), "Every reward is 1", True),
    ("low", log_of([FOUR] * 5, 4, [0, 0.25]), "no rollout is a success", True),
    ("high", log_of([FOUR] * 5, 4, [0.75, 1]), "every rollout is a success", True),
    ("levels", log_of([FOUR] * 5, 4, [0, 0.25, 1]), "There are 3 distinct rewards", False),
    ("fine", log_of([FOUR] * 50, 4, [0, 1, 0.1, 1.1]), "a bonus for format or length", False),
    ("filtered", log_of([FOUR] * 50, 4, [0, 1]), "Not one group has equal rewards", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("log", "text", "serious"), [one[1:] for one in LOGS], ids=[o[0] for o in LOGS]
)
def test_oddities_are_said(log: OutcomeLog, text: str, serious: bool) -> None:
    """Each oddity is said, as serious or not; of a usual log nothing is."""
    spoken, is_serious = said(log)

    assert text in spoken
    assert (spoken == "") == (text == "")
    assert is_serious == serious


def test_a_threshold_in_between_is_accepted() -> None:
    """With a threshold between the rewards nothing is odd about them."""
    assert said(log_of([FOUR] * 5, 4, [0, 0, 0.25, 0, 0.25, 0.25, 0.25, 0.25]), 0.1) == ("", False)

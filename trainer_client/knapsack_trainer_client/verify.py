"""A trainer's advantages against the groups they should have been computed in.

Code that cuts a batch into equal groups raises no error when the groups are not equal:
with a constant total it divides evenly, and every advantage is wrong. This compares the
numbers themselves, so it holds whatever the trainer did, and says what it did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from knapsack_trainer_client.errors import WrongGroups, refused
from knapsack_trainer_client.groups import (
    Counts,
    HasNumRollouts,
    Method,
    Scale,
    counts_of,
    group_advantages,
)
from knapsack_trainer_client.rewards import is_sequence, to_list, to_reward

Partition: TypeAlias = list[list[int]]
"""Rows of each group."""

_FORMULAS: tuple[tuple[Method, Scale], ...] = (
    ("grpo", "std"),
    ("grpo", "population_std"),
    ("dr_grpo", "none"),
    ("rloo", "none"),
    ("rloo", "std"),
)


def verify_groups(
    advantages: Any,
    rewards: Any,
    counts: Counts | None = None,
    *,
    group_ids: Iterable[Hashable] | None = None,
    method: Method = "grpo",
    scale: Scale | None = None,
    clip: float | None = None,
    epsilon: float = 1e-6,
    min_std: float = 0.0,
    tolerance: float = 1e-2,
) -> None:
    """Return if the advantages are those of the groups, or stop the run.

    For every step, after the trainer computed its advantages and before it uses them. On
    several processes: on the gathered values, or on those of whole groups. It costs about
    as much as ``group_advantages``.

    Args:
        advantages: the trainer's, one number per rollout, flat or one sequence per group.
            Of advantages per token, those of each response's first token.
        rewards: in the same order; None or NaN for a missing rollout.
        counts: an allocation, or the rollouts of each prompt, where rows are in the order
            of the prompts. May be left out if ``rewards`` is one sequence per group.
        group_ids: instead of counts, the group of each row, in any order of rows.
        method, scale, clip, epsilon, min_std: what the trainer should compute, as for
            ``group_advantages``.
        tolerance: largest difference, relative to 1 + the absolute expected advantage.
            The default passes bfloat16 and any usual epsilon.

    Raises:
        WrongGroups: an advantage is not that of its group. The message says which rule
            gives the trainer's numbers, if a known one does.
        InvalidRequest: shapes that do not fit, or a bad option.
    """
    known, right, names = _read(rewards, counts, group_ids)
    found = [_number(i, a) for i, a in enumerate(_flat("advantages", advantages))]
    if len(found) != len(known):
        raise refused(
            "advantages", f"{len(found)} numbers", f"must be one per rollout ({len(known)})"
        )
    if not tolerance > 0:
        raise refused("tolerance", tolerance, "must be above 0")

    def ours(partition: Partition, method: Method, scale: Scale | None) -> list[float]:
        return _ours(known, partition, method, scale, clip, epsilon, min_std)

    def same(expected: Sequence[float]) -> bool:
        return not _differing(found, expected, tolerance)

    expected = ours(right, method, scale)
    wrong = _differing(found, expected, tolerance)
    if not wrong:
        return
    formulas = [(method, scale), *_FORMULAS]
    reason = _diagnose(found, known, right, names, expected, wrong, formulas, ours, same)
    raise WrongGroups(
        f"{reason} {_evidence(found, expected, known, right, names, wrong)} Use "
        "group_advantages in place of the trainer's own group normalisation, or see the "
        "table of trainers in trainer_client/RECIPES.md."
    )


def _read(
    rewards: Any, counts: Counts | None, group_ids: Iterable[Hashable] | None
) -> tuple[list[float | None], Partition, list[Hashable]]:
    """Return the rewards by row, the rows of each group, and a name for each group."""
    rows = to_list("rewards", rewards)
    nested = any(is_sequence(row) for row in rows)
    flat = _flat("rewards", rows)
    known = [to_reward(f"rewards[{i}]", raw) for i, raw in enumerate(flat)]
    if group_ids is not None:
        if counts is not None:
            raise refused("group_ids", group_ids, "must not be given together with counts")
        by_id: dict[Hashable, list[int]] = {}
        ids = to_list("group_ids", group_ids)
        if len(ids) != len(known):
            raise refused("group_ids", f"{len(ids)} ids", f"must be one per rollout ({len(known)})")
        for row, group in enumerate(ids):
            by_id.setdefault(group, []).append(row)
        return known, list(by_id.values()), list(by_id)
    if counts is None:
        if not nested:
            raise refused("counts", None, "must be given with flat rewards, or group_ids")
        sizes = [len(row) for row in rows]
    else:
        sizes = counts_of(counts)
        if nested and [len(row) for row in rows] != sizes:
            raise refused("rewards", "groups of other sizes", f"must have the sizes {sizes}")
    if sum(sizes) != len(known):
        raise refused(
            "rewards", f"{len(known)} numbers", f"must be as many as rollouts ({sum(sizes)})"
        )
    names: list[Hashable] = list(range(len(sizes)))
    if isinstance(counts, HasNumRollouts):
        names = list(getattr(counts, "prompt_ids", names))
    return known, _cut(sizes), names


def _flat(name: str, values: Any) -> list[Any]:
    rows = to_list(name, values)
    if not any(is_sequence(row) for row in rows):
        return rows
    return [value for i, row in enumerate(rows) for value in to_list(f"{name}[{i}]", row)]


def _number(row: int, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise refused(f"advantages[{row}]", value, "must be a number") from None


def _cut(sizes: Sequence[int]) -> Partition:
    groups, start = [], 0
    for size in sizes:
        groups.append(list(range(start, start + size)))
        start += size
    return groups


def _ours(
    rewards: Sequence[float | None],
    partition: Partition,
    method: Method,
    scale: Scale | None,
    clip: float | None,
    epsilon: float,
    min_std: float,
) -> list[float]:
    answer = [0.0] * len(rewards)
    nested = group_advantages(
        [[rewards[row] for row in rows] for rows in partition],
        method=method,
        scale=scale,
        clip=clip,
        epsilon=epsilon,
        min_std=min_std,
    )
    for rows, values in zip(partition, nested, strict=True):
        for row, value in zip(rows, values, strict=True):
            answer[row] = value
    return answer


def _differing(found: Sequence[float], expected: Sequence[float], tolerance: float) -> list[int]:
    # Not "greater": a NaN differs from everything.
    return [
        row
        for row, (a, b) in enumerate(zip(found, expected, strict=True))
        if not abs(a - b) <= tolerance * (1.0 + abs(b))
    ]


def _diagnose(
    found: Sequence[float],
    rewards: Sequence[float | None],
    right: Partition,
    names: Sequence[Hashable],
    expected: Sequence[float],
    wrong: Sequence[int],
    formulas: Sequence[tuple[Method, Scale | None]],
    ours: Callable[[Partition, Method, Scale | None], list[float]],
    same: Callable[[Sequence[float]], bool],
) -> str:
    if any(math.isnan(a) for a in found):
        return "advantages have NaN among them."
    group_of = {row: group for group, rows in enumerate(right) for row in rows}
    # Divided by a spread of 1 and an epsilon, so not exactly.
    raw = [math.nan if reward is None else reward for reward in rewards]
    lone = all(len(right[group_of[row]]) == 1 for row in wrong)
    if lone and all(math.isclose(found[row], raw[row], rel_tol=1e-3) for row in wrong):
        return (
            "advantages of groups of one rollout are their raw rewards; such a group must "
            "have advantage 0. Allocate with min_rollouts of 2 or 0."
        )
    for method, scale in formulas[1:]:
        if same(ours(right, method, scale)):
            return (
                f"the groups are right, but the advantages are those of method={method!r}, "
                f"scale={scale!r}; say so to verify_groups if that is meant."
            )
    for cut, said in _other_cuts(right, names):
        for method, scale in formulas:
            if same(ours(cut, method, scale)):
                return f"advantages were computed in other groups than the allocation's: {said}."
    if same(_in_order_of(found, expected)):
        return "advantages are the right ones in another order: the rows were shuffled."
    if all(_is_constant(rewards, right[group_of[row]]) for row in wrong):
        return (
            "advantages are not 0 in groups whose rewards are all equal: the rounding residue "
            "of the mean was divided by a spread of about 0."
        )
    return "advantages are not those of the allocation's groups, nor of any cut known here."


def _other_cuts(right: Partition, names: Sequence[Hashable]) -> Iterator[tuple[Partition, str]]:
    """Yield the ways in which trainers are known to cut a batch, with a description."""
    total = sum(map(len, right))
    whole = [row for rows in right for row in rows]
    divisors = [n for n in range(total, 0, -1) if total % n == 0]
    # The trainer's own constant is most likely the mean group.
    for size in sorted(divisors, key=lambda n: abs(n * len(right) - total)):
        if 1 < size < total:
            yield (
                _cut([size] * (total // size)),
                f"equal groups of {size}, one after the other, as by reshape(-1, {size})",
            )
    yield [sorted(whole)], "the whole batch as one group"
    by_name: dict[Hashable, list[int]] = {}
    for name, rows in zip(names, right, strict=True):
        by_name.setdefault(name, []).extend(rows)
    if len(by_name) < len(right):
        yield list(by_name.values()), "groups of the same prompt id were joined into one"
    if all(rows == list(range(rows[0], rows[0] + len(rows))) for rows in right if rows):
        for size in divisors[1:-1]:
            bounds = {*range(0, total + 1, size), *(rows[0] for rows in right if rows)}
            sizes = [b - a for a, b in pairwise(sorted(bounds))]
            yield (
                _cut(sizes),
                f"groups were split where blocks of {size} rows end, as by ranks or mini-batches",
            )


def _in_order_of(values: Sequence[float], model: Sequence[float]) -> list[float]:
    """Return the sorted ``model``'s numbers, each where ``values`` has its rank."""
    answer = [0.0] * len(values)
    by_rank = sorted(range(len(values)), key=values.__getitem__)
    for row, number in zip(by_rank, sorted(model), strict=True):
        answer[row] = number
    return answer


def _is_constant(rewards: Sequence[float | None], rows: Sequence[int]) -> bool:
    return len({rewards[row] for row in rows} - {None}) < 2


def _evidence(
    found: Sequence[float],
    expected: Sequence[float],
    rewards: Sequence[float | None],
    right: Partition,
    names: Sequence[Hashable],
    wrong: Sequence[int],
) -> str:
    worst = max(wrong, key=lambda row: abs(found[row] - expected[row]))
    group = next(g for g, rows in enumerate(right) if worst in rows)
    sizes = ", ".join(str(len(rows)) for rows in right[:8]) + (", ..." if len(right) > 8 else "")
    return (
        f"{len(wrong)} of {len(found)} rollouts differ; the groups are {sizes}. The worst is "
        f"rollout {right[group].index(worst)} of prompt {names[group]!r}: reward "
        f"{rewards[worst]}, advantage {found[worst]:.6g} where {expected[worst]:.6g} was expected."
    )

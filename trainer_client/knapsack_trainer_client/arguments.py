"""A caller's arguments -> checked values, or ``InvalidRequest``.

What is refused here is refused whether or not the scheduler answers, so that a mistake
does not hide behind a fallback until the scheduler is back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real

from knapsack_trainer_client.errors import refused
from knapsack_trainer_client.nouns import RunConfig

LARGEST = 2**63 - 1
LARGEST_GROUP = 2**31 - 1
LONGEST_PROMPT_ID = 1024
"""Characters of a prompt id that a scheduler takes."""

LARGEST_REWARD = 3.4028234663852886e38
"""Largest finite float32, the type of a reward on the wire."""

_TARGET_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "xds:")


@dataclass(frozen=True, slots=True)
class AllocationAsk:
    """A checked request for an allocation; the bounds as in the wire contract."""

    prompt_ids: tuple[str, ...]
    total_rollouts: int
    step: int
    min_rollouts: tuple[int, ...] = ()
    max_rollouts: tuple[int, ...] = ()
    wave_fraction: float = 0.0
    allow_partial: bool = False
    total_tokens: int = 0
    waves: int = 0


def check_ask(
    prompt_ids: Iterable[str],
    total_rollouts: int,
    step: int,
    min_rollouts: int | Iterable[int] | None,
    max_rollouts: int | Iterable[int] | None,
    wave_fraction: float,
    allow_partial: bool,
    total_tokens: int,
    waves: int,
) -> AllocationAsk:
    """Return the arguments of ``allocate``, checked.

    Raises:
        InvalidRequest: a value of the wrong type or out of range, bounds that are
            neither one number nor one per prompt, or bounds that cannot hold the budget.
    """
    ids = check_prompt_ids(prompt_ids)
    rollouts = check_int("total_rollouts", total_rollouts)
    tokens = check_int("total_tokens", total_tokens)
    if not rollouts and not tokens:
        raise refused("total_rollouts", total_rollouts, "must be above 0 without total_tokens")
    low = _check_bounds("min_rollouts", min_rollouts, len(ids))
    high = _check_bounds("max_rollouts", max_rollouts, len(ids))
    _check_order(low, high, len(ids))
    if not allow_partial:
        _check_budget(low, high, len(ids), rollouts, bool(tokens))
    share = check_fraction(wave_fraction)
    planned = check_int("waves", waves, most=2)
    if planned == 2 and share:
        raise refused("wave_fraction", wave_fraction, "must be 0 with waves=2")
    return AllocationAsk(
        ids,
        rollouts,
        check_int("step", step),
        low,
        high,
        share,
        bool(allow_partial),
        tokens,
        planned,
    )


def check_prompt_ids(prompt_ids: Iterable[str]) -> tuple[str, ...]:
    """Return the prompt ids as a tuple of strings of 1 to 1,024 characters, at least one."""
    if isinstance(prompt_ids, str | bytes):
        raise refused("prompt_ids", prompt_ids, "must be a sequence of strings, one per prompt")
    ids = tuple(prompt_ids)
    if not ids:
        raise refused("prompt_ids", ids, "must name at least one prompt")
    for position, prompt_id in enumerate(ids):
        if not isinstance(prompt_id, str) or not prompt_id:
            raise refused(
                f"prompt_ids[{position}]",
                prompt_id,
                "must be a non-empty string that names the prompt in every epoch",
            )
        if len(prompt_id) > LONGEST_PROMPT_ID:
            raise refused(
                f"prompt_ids[{position}]",
                prompt_id,
                f"must have at most {LONGEST_PROMPT_ID:,} characters; it has {len(prompt_id):,}",
            )
        if not prompt_id.isascii():
            _check_unicode(f"prompt_ids[{position}]", prompt_id)
    return ids


def check_run_id(run_id: str) -> str:
    """Return the run's name, a non-empty string."""
    if not isinstance(run_id, str) or not run_id:
        raise refused("run_id", run_id, "must be a non-empty string")
    return _check_unicode("run_id", run_id)


def check_int(name: str, value: int, least: int = 0, most: int = LARGEST) -> int:
    """Return ``value`` as an int from ``least`` to ``most``; NumPy integers are fine."""
    try:
        number = operator.index(value)
    except TypeError:
        raise refused(name, value, "must be an integer") from None
    if not least <= number <= most:
        raise refused(name, value, f"must be from {least} to {most}")
    return number


def check_fraction(value: float) -> float:
    """Return the share of a budget that a wave spends, from 0 to 1."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        raise refused("wave_fraction", value, "must be a number from 0 to 1") from None
    if not 0.0 <= share <= 1.0:
        raise refused("wave_fraction", value, "must be from 0 to 1")
    return share


def check_timeout(name: str, value: float) -> float:
    """Return a time in seconds, finite and above 0."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise refused(name, value, "must be seconds above 0") from None
    if not 0.0 < seconds < math.inf:
        raise refused(name, value, "must be seconds above 0")
    return seconds


def check_address(address: str) -> str:
    """Return a gRPC target: HOST:PORT, or one with a scheme that gRPC knows."""
    wanted = (
        'must be HOST:PORT, such as "localhost:50051"; of several schedulers on one database '
        '"dns:///NAME:PORT" or "ipv4:ADDRESS:PORT,ADDRESS:PORT"'
    )
    if not isinstance(address, str) or not address or not address.isprintable():
        raise refused("address", address, wanted)
    if address.startswith(_TARGET_SCHEMES):
        return address
    host, _, port = address.rpartition(":")
    if not host or any(sign in host for sign in "/ ,") or not port.isdecimal() or int(port) > 65535:
        raise refused("address", address, wanted)
    return address


def check_config(config: RunConfig | Mapping[str, object] | None) -> RunConfig | None:
    """Return the config as a ``RunConfig``; its values are the scheduler's to judge."""
    made = _to_config(config)
    for field in fields(RunConfig) if made is not None else ():
        value = getattr(made, field.name)
        kind = str if field.name in ("policy", "objective") else Real
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            wanted = "a name" if kind is str else "a number"
            raise refused(f"config.{field.name}", value, f"must be {wanted}")
    return made


def _to_config(config: RunConfig | Mapping[str, object] | None) -> RunConfig | None:
    if config is None or isinstance(config, RunConfig):
        return config
    known = [f.name for f in fields(RunConfig)]
    if not isinstance(config, Mapping):
        raise refused("config", config, "must be a RunConfig or a mapping of its fields")
    for name in config:
        if name not in known:
            raise refused("config", name, f"must be one of {', '.join(known)}")
    return RunConfig(**dict(config))  # type: ignore[arg-type]


def _check_unicode(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(name, text, "must be valid Unicode, without lone surrogates") from None
    return text


def _check_bounds(name: str, bounds: int | Iterable[int] | None, count: int) -> tuple[int, ...]:
    if bounds is None:
        return ()
    if isinstance(bounds, Iterable):
        # A 0-dimensional array is iterable by type and a number by nature.
        values = (bounds,) if getattr(bounds, "ndim", 1) == 0 else tuple(bounds)
        if len(values) != 1 and len(values) != count:
            raise refused(
                name, f"{len(values)} numbers", f"must be one number, or one per prompt ({count})"
            )
    else:
        values = (bounds,)
    return tuple(check_int(name, value, 0, LARGEST_GROUP) for value in values)  # type: ignore[arg-type]


def _check_order(low: Sequence[int], high: Sequence[int], count: int) -> None:
    if not low or not high:
        return
    for position in range(max(len(low), len(high))):
        least, most = low[position % len(low)], high[position % len(high)]
        if least > most:
            raise refused("min_rollouts", least, f"must not be above max_rollouts = {most}")


def _check_budget(
    low: Sequence[int], high: Sequence[int], count: int, rollouts: int, tokens: bool
) -> None:
    if not rollouts:
        return
    least = low[0] * count if len(low) == 1 else sum(low)
    most = high[0] * count if len(high) == 1 else sum(high)
    if rollouts < least:
        raise refused(
            "total_rollouts",
            rollouts,
            f"must be at least {least}, the sum of min_rollouts of {count} prompts, "
            "or allow_partial must be set",
        )
    if high and rollouts > most and not tokens:
        raise refused(
            "total_rollouts",
            rollouts,
            f"must be at most {most}, the sum of max_rollouts of {count} prompts, "
            "or allow_partial must be set",
        )

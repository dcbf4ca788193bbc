"""Scenarios: small TOML files that say what prompts a simulated run has.

What ships in ``scenarios/`` is invented to span what runs may look like; none is fitted
to a log.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from knapsack_scheduler.errors import ConfigError

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Spread = Annotated[float, Field(ge=0.0, le=20.0)]
_Logit = Annotated[float, Field(ge=-20.0, le=20.0)]


class _Part(BaseModel):
    """A part of a scenario: no key that is not known, no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Run(_Part):
    """The run, as a trainer would make it."""

    prompts: int = Field(3072, ge=1, le=1_000_000)
    """Prompts of the data set; each is drawn once per epoch."""
    prompts_per_step: int = Field(128, ge=1, le=10_000)
    """Prompts of a batch; what does not fill a batch is left out, other prompts each epoch."""
    rollouts_per_prompt: float = Field(8.0, gt=0.0, le=1024.0)
    """Mean; the budget of a step is this times ``prompts_per_step``."""
    epochs: int = Field(6, ge=1, le=1000)
    """Passes over the prompts."""
    min_rollouts: int = Field(2, ge=0, le=1024)
    """Fewest rollouts of a prompt; 0 lets policies skip it."""
    max_rollouts: int = Field(128, ge=2, le=4096)
    """Most rollouts of a prompt; a group of one is never effective."""

    @property
    def total_rollouts(self) -> int:
        """Budget of a step."""
        return round(self.rollouts_per_prompt * self.prompts_per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.prompts // self.prompts_per_step

    @model_validator(mode="after")
    def _hold_together(self) -> Run:
        if self.prompts_per_step > self.prompts:
            raise ValueError(
                f"prompts_per_step = {self.prompts_per_step}: must be at most prompts, "
                f"{self.prompts}"
            )
        if self.min_rollouts > self.max_rollouts:
            raise ValueError(
                f"min_rollouts = {self.min_rollouts}: must be at most max_rollouts, "
                f"{self.max_rollouts}"
            )
        if not self.min_rollouts <= self.rollouts_per_prompt <= self.max_rollouts:
            raise ValueError(
                f"rollouts_per_prompt = {self.rollouts_per_prompt:g}: must be from min_rollouts, "
                f"{self.min_rollouts}, to max_rollouts, {self.max_rollouts}"
            )
        return self


class Band(_Part):
    """Prompts of one kind: the logits of their success rates are normal."""

    share: _Share
    """Of the prompts, 0 to 1; the shares of all bands add up to 1."""
    logit_mean: _Logit
    """Mean logit at the start: log(p / (1 - p)); 0 is p = 0.5, -4 is 0.018."""
    logit_sd: _Spread = 1.0
    """Its standard deviation."""
    never: _Share = 0.0
    """Share of the band with success rate exactly 0, whatever is learned."""
    always: _Share = 0.0
    """Share of the band with success rate exactly 1."""
    completion_tokens: float = Field(0.0, ge=0.0, le=1e7)
    """Mean length of a completion; 0 if it is of no interest."""

    @model_validator(mode="after")
    def _hold_together(self) -> Band:
        if self.never + self.always > 1.0:
            raise ValueError(
                f"never = {self.never:g}: must be at most 1 - always, {1 - self.always:g}"
            )
        return self


class Drift(_Part):
    """How logits move whatever the policy does."""

    per_epoch: float = Field(0.0, ge=-10.0, le=10.0)
    """Mean growth of a prompt's logit per epoch."""
    spread: _Spread = 0.0
    """Standard deviation over prompts of that growth; a prompt keeps its own."""
    walk: _Spread = 0.0
    """Standard deviation per epoch of a random walk on top."""


class Learning(_Part):
    """How logits move because of what the groups teach.

    What a group teaches is ``p (1-p)^2`` if its rewards differ (Knapsack RL's information
    gain, at most 0.148), whatever objective the policy maximises.
    """

    own: float = Field(0.0, ge=0.0, le=1000.0)
    """Growth of a prompt's logit per unit that its own group teaches."""
    transfer: float = Field(0.0, ge=0.0, le=1000.0)
    """Growth of every prompt's logit per unit that a step's groups teach in the mean."""


class Scenario(_Part):
    """Everything that a simulation needs but the policies and the seed."""

    name: str = ""
    """What reports call it; of a file, its name."""
    about: str = ""
    """What it stands for, in a sentence."""
    run: Run = Field(default_factory=Run)
    """The run."""
    band: tuple[Band, ...] = Field(strict=False)
    """Kinds of prompts."""
    drift: Drift = Field(default_factory=Drift)
    """Growth that the policy has no part in."""
    learning: Learning = Field(default_factory=Learning)
    """Growth that it has."""

    @property
    def learns(self) -> bool:
        """Whether what a policy does changes the success rates."""
        return self.learning.own > 0.0 or self.learning.transfer > 0.0

    @model_validator(mode="after")
    def _hold_together(self) -> Scenario:
        if not self.band:
            raise ValueError("band = []: there must be one or more")
        total = math.fsum(band.share for band in self.band)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"band.share: the shares of all bands must add up to 1, not {total:g}")
        return self


def parse_scenario(data: dict[str, Any], source: str, name: str) -> Scenario:
    """Return the scenario that TOML data describes.

    Args:
        data: as read from TOML.
        source: what errors call it.
        name: of the scenario where the data has none.

    Raises:
        ConfigError: names every key at fault, its value and what is allowed.
    """
    if isinstance(data.get("band"), dict):
        raise ConfigError(
            f"scenario {source!r}: band: must be a list of bands; write [[band]], with two brackets"
        )
    try:
        return Scenario.model_validate({"name": name} | data)
    except ValidationError as error:
        lines = [_line(dict(e)) for e in error.errors()]
        raise ConfigError(f"scenario {source!r}: {'; '.join(lines)}") from None


def load_scenario(name_or_file: str) -> Scenario:
    """Return a shipped scenario by name, or the one in a TOML file.

    Raises:
        ConfigError: there is no such scenario, or it is at fault.
    """
    shipped = files("knapsack_scheduler.lab").joinpath("scenarios", f"{name_or_file}.toml")
    if name_or_file in shipped_names():
        return parse_scenario(tomllib.loads(shipped.read_text("utf-8")), name_or_file, name_or_file)
    path = Path(name_or_file)
    if path.suffix != ".toml" and not path.is_file():
        raise ConfigError(
            f"scenario = {name_or_file!r}: must be one of {', '.join(shipped_names())}, or a file "
            "that ends in .toml"
        )
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"scenario = {name_or_file!r}: cannot be read: {error.strerror or error}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"scenario = {name_or_file!r}: is no TOML: {error}") from None
    return parse_scenario(data, name_or_file, path.stem)


def shipped_names() -> tuple[str, ...]:
    """Return the names of the scenarios that ship, in the order of reports."""
    found = (f.name for f in files("knapsack_scheduler.lab").joinpath("scenarios").iterdir())
    names = sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))
    return ("base", *(name for name in names if name != "base"))


def _line(error: dict[str, Any]) -> str:
    """Return one pydantic error as: key = value: what is allowed."""
    where = _path(error["loc"])
    if error["type"] == "value_error":
        # Of a part as a whole, or of the scenario: the message begins with the key.
        message = str(error["ctx"]["error"])
        return f"{where}.{message}" if where else message
    if error["type"] == "missing":
        return f"{where}: is missing"
    value = _short(error["input"])
    if error["type"] == "extra_forbidden":
        known = ", ".join(_keys(error["loc"]))
        return f"{where} = {value}: no such key; there are {known}"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value ")
    return f"{where} = {value}: must be {message}"


def _path(parts: Iterable[str | int]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys there are where an unknown one stood."""
    parts: dict[str, type[_Part]] = {"run": Run, "band": Band, "drift": Drift, "learning": Learning}
    part = parts.get(str(location[0]), Scenario) if len(location) > 1 else Scenario
    return list(part.model_fields)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

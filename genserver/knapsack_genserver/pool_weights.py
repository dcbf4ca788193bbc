"""The weights that a pool of replicas serves: one version everywhere, whoever comes and goes.

- New weights go to every replica that serves. They serve if one of them took them; one that
  did not, took too long, or took others under the same version leaves until it has them. If
  none took them the old ones serve on.
- Whoever joins is given the weights that serve, and serves in the same moment: between the
  two no others can have come. Before the first update it must have been started with the
  weights that the others were started with.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from knapsack_genserver.engine import LoadedWeights
from knapsack_genserver.errors import FailedPrecondition, GeneratorError, Unavailable
from knapsack_genserver.member import Member, PoolOptions, reason_of
from knapsack_genserver.membership import Membership


@runtime_checkable
class Confirming(Protocol):
    """An engine that knows which weights it had when it was started for the first time."""

    async def confirm(self) -> None:
        """Return if it has them still, or again; raise if not."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the pool serves and where it lies."""

    path: Path
    loaded: LoadedWeights


class PoolWeights:
    """See the module.

    Args:
        options: of the pool.
        members: of the pool.
        lose: takes a replica out of service, by its name in the dispatch, with the reason.
    """

    def __init__(
        self, options: PoolOptions, members: Membership, lose: Callable[[int, str], None]
    ) -> None:
        self._options = options
        self._members = members
        self._lose = lose
        self._served: _Weights | None = None
        self._first_fingerprint = ""
        self._updating = asyncio.Lock()

    @property
    def version(self) -> int | None:
        """Of what was loaded last; None if nothing was."""
        return None if self._served is None else self._served.loaded.version

    async def load(self, path: Path, version: int) -> LoadedWeights:
        """Serve other weights on every replica.

        Raises:
            FailedPrecondition: no replica took them.
            Unavailable: none serves.
        """
        async with self._updating:
            members = self._members.serving()
            if not members:
                problems = self._members.problems().items()
                why = "; ".join(f"{number}: {text}" for number, text in problems)
                raise Unavailable(f"no replica serves: {why}")
            results = await asyncio.gather(
                *(member.load_weights(path, version) for member in members.values()),
                return_exceptions=True,
            )
            taken = [result for result in results if isinstance(result, LoadedWeights)]
            if not taken:
                raise self._refusal(members, results)
            fingerprint = Counter(result.fingerprint for result in taken).most_common(1)[0][0]
            paused = max((r.paused_seconds or 0.0 for r in taken), default=0.0)
            known = all(result.paused_seconds is not None for result in taken)
            loaded = LoadedWeights(version, fingerprint, paused if known else None)
            self._served = _Weights(path, loaded)
            for life, result in zip(members, results, strict=True):
                if isinstance(result, BaseException):
                    why = f"it did not take weight version {version}: {reason_of(result)}"
                    self._lose(life, why)
                elif result.fingerprint != fingerprint:
                    self._lose(life, _differs(version))
            return loaded

    def _refusal(
        self, lives: Iterable[int], results: Sequence[LoadedWeights | BaseException]
    ) -> GeneratorError:
        """Return why no replica took the weights; only those leave that did not refuse."""
        refusal: GeneratorError | None = None
        why = ""
        for life, result in zip(lives, results, strict=True):
            if isinstance(result, FailedPrecondition):
                refusal = refusal or result
            elif isinstance(result, BaseException):
                why = reason_of(result)
                self._lose(life, f"it failed while it took weights: {why}")
        return refusal or FailedPrecondition(
            f"every replica failed while it took the weights, the last: {why}"
        )

    async def give(self, member: Member, serve: Callable[[], None]) -> None:
        """Give a replica that has started what is served, and let it serve.

        Args:
            member: that has started.
            serve: called once it holds what is served, before others can come to be.

        Raises:
            FailedPrecondition: it has others under the same version, or refuses.
        """
        held: _Weights | None = None
        while True:
            wanted = self._served
            if wanted is None:
                await self._confirm(member)
            elif wanted is not held:
                async with asyncio.timeout(self._options.update_seconds):
                    loaded = await member.engine.load_weights(wanted.path, wanted.loaded.version)
                if loaded.fingerprint != wanted.loaded.fingerprint:
                    raise FailedPrecondition(_differs(wanted.loaded.version))
                held = wanted
            async with self._updating:
                if self._served is held:
                    serve()
                    return

    async def _confirm(self, member: Member) -> None:
        """Refuse what was started with other weights than those that have served so far.

        Other weights may lie in the model's folder by then.
        """
        if isinstance(member.engine, Confirming):
            await member.engine.confirm()
        status = member.engine.status()
        fingerprint = status.first_fingerprint
        if self._first_fingerprint and fingerprint not in ("", self._first_fingerprint):
            raise FailedPrecondition(_differs(status.weight_version))
        self._first_fingerprint = self._first_fingerprint or fingerprint


def _differs(version: int) -> str:
    return f"the weights it holds under version {version} are not those of the other replicas"

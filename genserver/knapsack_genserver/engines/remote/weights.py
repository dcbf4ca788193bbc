"""Other weights for a vLLM server, through its RL routes, one update at a time.

An update pauses the server, begins, updates, finishes and resumes. A server whose update
was begun and not finished must not generate: half of its weights may be gone, and the next
token may end it. So one that fails on the way is given its old weights again before it is
resumed, and if that fails too it stays paused and counts as lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from knapsack_genserver.engine import LoadedWeights
from knapsack_genserver.errors import FailedPrecondition, GeneratorError, ReplicaLost, Unavailable

_LOG = logging.getLogger(__name__)

Call = Callable[..., Awaitable[tuple[int, Any]]]


@dataclass(frozen=True, slots=True)
class WeightRoutes:
    """What is sent to vLLM's weight transfer backend.

    Attributes:
        init_info: sent once; None for nothing.
        update_info: sent at each update; "{path}" and "{version}" in its strings are
            replaced.
        seconds: how long one step of an update may take.
    """

    init_info: Mapping[str, Any] | None = None
    update_info: Mapping[str, Any] = field(default_factory=lambda: {"path": "{path}"})
    seconds: float = 600.0


class Updater:
    """Changes the weights of one server.

    Args:
        url: for messages.
        routes: what is sent.
        label: of the version that serves.
        path: where the weights of that version lie on the server's disk, if that is known.
    """

    def __init__(self, url: str, routes: WeightRoutes, label: str, path: Path | None) -> None:
        self._url = url
        self._routes = routes
        self._timeout = aiohttp.ClientTimeout(total=routes.seconds, sock_connect=10)
        self._first = (path, label)
        self._served = self._first
        self._torn = False

    @property
    def gone(self) -> str | None:
        """The label of the first weights, once others serve.

        A server that has it again was restarted and has lost what it was given.
        """
        first, served = self._first[1], self._served[1]
        return first if first != served else None

    async def begin(self, call: Call) -> None:
        """Prepare a server that has started, or mend one that an update has torn.

        Raises:
            Unavailable: it cannot be mended; or somebody else has paused it, who may have
                left it with half of its weights. It must be resumed or restarted.
        """
        if self._routes.init_info is not None:
            await self._step(call, "/init_weight_transfer_engine", init_info=self._routes.init_info)
        _, body = await call("GET", "/is_paused")
        paused = body.get("is_paused") if isinstance(body, dict) else None
        if self._torn and paused is False:
            # It was left paused, so this is another process, and whole.
            self._served = self._first
            self._torn = False
        elif self._torn:
            await self._restore(call)
        elif paused:
            raise Unavailable(
                f"{self._url}: is paused, perhaps in the middle of a weight update; "
                "resume it if its weights are whole, or restart it"
            )

    async def serve(self, call: Call, path: Path, version: int) -> LoadedWeights:
        """Serve a folder of the server's disk.

        Raises:
            FailedPrecondition: it could not be taken; the old weights serve.
            ReplicaLost: and they could not be put back either.
        """
        self._torn = True
        start = time.perf_counter()
        try:
            await self._send(call, path, str(version))
            fingerprint = await self.fingerprint(call)
            await self._step(call, "/resume")
        except GeneratorError as error:
            _LOG.warning("weights were not taken: %s", error)
            try:
                await self._restore(call)
            except GeneratorError as second:
                raise ReplicaLost(f"{error}; the old weights are not back: {second}") from error
            raise FailedPrecondition(f"{error}; the old weights serve") from error
        self._served = (path, str(version))
        self._torn = False
        return LoadedWeights(version, fingerprint, time.perf_counter() - start)

    async def _restore(self, call: Call) -> None:
        path, label = self._served
        if path is None:
            raise Unavailable(f"{self._url}: where its old weights lie is not known; restart it")
        await self._send(call, path, label)
        await self._step(call, "/resume")
        self._torn = False

    async def _send(self, call: Call, path: Path, label: str) -> None:
        values = {"{path}": str(path), "{version}": label}
        await self._step(call, "/pause?mode=keep")
        await self._step(call, "/start_weight_update")
        await self._step(
            call, "/update_weights", update_info=_filled(self._routes.update_info, values)
        )
        await self._step(call, "/finish_weight_update", weight_version=label)

    async def _step(self, call: Call, route: str, **body: Any) -> Any:
        status, answer = await call("POST", route, body, self._timeout)
        if status != 200:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            raise Unavailable(f"{self._url}: {route} answers {status}: {text[:300]}")
        return answer

    async def fingerprint(self, call: Call) -> str:
        """Return a hash of the server's own checksums of its weights; empty if it has none.

        Raises:
            Unavailable: the server does not answer.
        """
        status, answer = await call(
            "POST", "/weight_checker", {"action": "checksum"}, self._timeout
        )
        sums = answer.get("checksums") if status == 200 and isinstance(answer, dict) else None
        if not sums:
            return ""
        text = json.dumps(sums, sort_keys=True).encode()
        return hashlib.blake2b(text, digest_size=16).hexdigest()


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Return a value with the placeholders in its strings replaced."""
    if isinstance(value, str):
        for name, text in values.items():
            value = value.replace(name, text)
        return value
    if isinstance(value, Mapping):
        return {key: _filled(each, values) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, values) for each in value]
    return value

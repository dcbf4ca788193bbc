"""One vLLM server that runs already, as an engine.

Groups go to ``/inference/v1/generate``, which takes and returns token ids. Weights go
through vLLM's RL routes where the server has them. Several servers are a pool's replicas.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from knapsack_genserver.engine import Completion, EngineStatus, Group, LoadedWeights, Tokenizer
from knapsack_genserver.engines.remote.messages import (
    ANY_VOCABULARY,
    BUSY,
    Answer,
    Garbage,
    RequestFailed,
    Restarted,
    error_text,
    request_body,
)
from knapsack_genserver.engines.remote.weights import Updater, WeightRoutes
from knapsack_genserver.errors import (
    ConfigError,
    FailedPrecondition,
    GeneratorError,
    ReplicaLost,
    Unavailable,
)

_LOG = logging.getLogger(__name__)

_PATIENCE = aiohttp.ClientTimeout(total=30)
_NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=10)
_GENERATE = "/inference/v1/generate"
_FIRST_LABEL = "default"
"""vLLM's label of the weights that it starts with, also in answers where no route names it."""
_LARGEST_MESSAGE = 256 * 2**20


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How a server is used.

    Attributes:
        url: its address, such as http://host:8000.
        model: name it serves the model under; None takes the first there is.
        api_key: of the server; empty for none.
        connections: most that are open to it at a time.
        rollouts: most that it is given at a time.
        retries: how often a request is sent again before it is tried elsewhere.
        retry_seconds: pause before the first of them; doubles each time.
        weight_version: of the weights that it starts with, where their label has no number.
        vocabulary_size: token ids are below it; 0 if only the server knows.
        weights: how its weights are changed.
    """

    url: str
    model: str | None = None
    api_key: str = ""
    connections: int = 128
    rollouts: int = 512
    retries: int = 4
    retry_seconds: float = 0.25
    weight_version: int = 0
    vocabulary_size: int = 0
    weights: WeightRoutes = field(default_factory=WeightRoutes)


class RemoteEngine:
    """An engine for a pool: it raises where rollouts may be made elsewhere.

    Args:
        options: how the server is used.
        served: models of the pool's servers, by address; shared by them.
    """

    name = "remote"
    tokenizer: Tokenizer | None = None
    waits_for = ""

    def __init__(self, options: RemoteOptions, served: dict[str, str] | None = None) -> None:
        self._options = options
        self._served = {} if served is None else served
        self._url = options.url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._updater: Updater | None = None
        self._model = options.model or ""
        self._root: Path | None = None
        # Root and fingerprint of what it had when it was first seen.
        self._first: tuple[str, str] | None = None
        self._max_tokens = 0
        self._logprobs_mode = ""
        self._labels: dict[str, int] = {}
        self._version = options.weight_version
        self._vocabulary_size = options.vocabulary_size or ANY_VOCABULARY
        self._held = 0
        self._prefix = secrets.token_hex(6)
        self._requests = itertools.count(1)
        self._unwanted: list[str] = []
        self._aborting: set[asyncio.Task[None]] = set()

    @property
    def place(self) -> str:
        """The server's address."""
        return self._url

    async def start(self) -> None:
        """Find out what the server serves and how.

        Raises:
            ConfigError: it is no vLLM server, or not one that can be used; says what to do.
            Unavailable: it does not answer, or does not serve yet.
        """
        key = self._options.api_key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._options.connections),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        await self._check_health()
        await self._find_model()
        await self._find_generate()
        await self._find_weights()

    async def _find_model(self) -> None:
        status, body = await self._call("GET", "/v1/models")
        if status in (401, 403):
            raise ConfigError(f"{self._url}: refuses the API key; set VLLM_API_KEY to the server's")
        try:
            cards = {card["id"]: card for card in body["data"]}
            name = self._options.model or next(iter(cards))
            card = cards[name]
            root = str(card.get("root") or "")
            self._max_tokens = int(card.get("max_model_len") or 0)
        except (KeyError, TypeError, ValueError, StopIteration):
            wanted = f"model {self._options.model!r}" if self._options.model else "any model"
            raise ConfigError(f"{self._url}: does not serve {wanted} (GET /v1/models)") from None
        known = set(self._served.values())
        if known and name not in known:
            raise ConfigError(
                f"{self._url}: serves {name!r}, not {sorted(known)[0]!r} as the others do or it "
                "did before; if these are one model, serve them under one name (vLLM's "
                "--served-model-name)"
            )
        self._served[self._url] = self._model = name
        self._root = Path(root) if root.startswith("/") else None

    async def _find_generate(self) -> None:
        # An empty request is one that the route refuses, if there is a route.
        status, _ = await self._call("POST", _GENERATE, {})
        if status == 403:
            raise ConfigError(
                f"{self._url}: its {_GENERATE} is switched off; "
                "start that vLLM server with --enable-scale-out"
            )
        if status in (401, 404, 405):
            raise ConfigError(f"{self._url}: has no {_GENERATE}; it takes vLLM 0.32 or newer")
        if status >= 500:
            raise Unavailable(f"{self._url}: {_GENERATE} answers {status}")

    async def _find_weights(self) -> None:
        status, body = await self._call("GET", "/weight_info")
        label = body.get("weight_version") if status == 200 and isinstance(body, dict) else None
        if label is None:
            self._updater = None
            self._labels.setdefault(_FIRST_LABEL, self._options.weight_version)
            return
        self._labels.setdefault(str(label), self._options.weight_version)
        if self._updater is None:
            self._updater = Updater(self._url, self._options.weights, str(label), self._root)
        await self._updater.begin(self._call)
        status, body = await self._call("GET", "/server_info?config_format=json")
        try:
            self._logprobs_mode = str(body["vllm_config"]["model_config"]["logprobs_mode"])
        except (KeyError, TypeError):
            self._logprobs_mode = ""

    async def confirm(self) -> None:
        """Return if the server, just started, has the weights that it had the first time.

        Raises:
            Unavailable: it has others, which are not those of the version that it is said
                to have; or it does not answer.
        """
        fingerprint = ""
        if self._updater is not None:
            fingerprint = await self._updater.fingerprint(self._call)
        found = (str(self._root or ""), fingerprint)
        self._first = self._first or found
        if found != self._first:
            raise Unavailable(
                f"{self._url}: was restarted with other weights than version {self._version} had "
                f"({found[0] or 'by their checksums'}); update the weights, or restart the "
                "generation server if these are to be that version"
            )

    async def close(self) -> None:
        """End all work; the server itself goes on."""
        for task in self._aborting:
            task.cancel()
        await asyncio.gather(*self._aborting, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def check(self) -> None:
        """Return if the server serves what it was given.

        Raises:
            Unavailable: it says that it does not serve, or says nothing.
            ReplicaLost: it was restarted and has its first weights again.
        """
        await self._check_health()
        if self._updater is not None and self._updater.gone is not None:
            _, body = await self._call("GET", "/weight_info")
            if isinstance(body, dict) and body.get("weight_version") == self._updater.gone:
                raise ReplicaLost(f"{self._url}: it was restarted and has its first weights")

    async def _check_health(self) -> None:
        status, _ = await self._call("GET", "/health")
        if status != 200:
            raise Unavailable(f"{self._url}: /health answers {status}")

    def status(self) -> EngineStatus:
        """Return what is known of the server."""
        return EngineStatus(
            model=self._model,
            weight_version=self._version,
            replicas=1,
            running=self._held,
            waiting=0,
            max_model_tokens=self._max_tokens,
            vocabulary_size=self._vocabulary_size,
            capacity=self._options.rollouts,
        )

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve a folder of the server's disk, through its RL routes."""
        if self._updater is None:
            raise FailedPrecondition(
                f"{self._url}: has no routes that change weights; start that vLLM server with "
                "VLLM_SERVER_DEV_MODE=1 and a weight transfer backend, where nobody else reaches it"
            )
        loaded = await self._updater.serve(self._call, path, version)
        self._version = version
        return loaded

    async def generate(self, group: Group) -> AsyncIterator[Completion]:
        """Yield the rollouts of a group; see ``engine.Engine`` for the order of things.

        Raises:
            GeneratorError: the server refuses the request; says why.
            Unavailable: it may succeed elsewhere.
            ReplicaLost: the server cannot be reached.
        """
        self._check_logprobs(group)
        pause = self._options.retry_seconds
        for attempt in itertools.count():
            arrived = False
            gone = self._updater.gone if self._updater is not None else None
            size = self._vocabulary_size
            answer = Answer(group, self._version, self._labels, gone, size)
            try:
                async for completion in self._stream(group, answer):
                    arrived = True
                    yield completion
                return
            except Restarted as error:
                raise ReplicaLost(f"{self._url}: {error}; it was restarted") from error
            except (Garbage, RequestFailed) as error:
                refused = isinstance(error, RequestFailed) and error.refused
                kind = GeneratorError if refused else Unavailable
                raise kind(f"{self._url}: {error}") from error
            except (aiohttp.ClientError, OSError, TimeoutError, _Busy) as error:
                # What has arrived is not asked for again, so the rest goes back.
                if arrived:
                    raise Unavailable(f"{self._url}: {_text(error)}") from error
                if attempt == self._options.retries:
                    lost = Unavailable if isinstance(error, _Busy) else ReplicaLost
                    raise lost(f"{self._url}: {_text(error)}") from error
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause *= 2

    def _check_logprobs(self, group: Group) -> None:
        sampling = group.sampling
        plain = sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k == 0
        if self._logprobs_mode in ("", "processed_logprobs") or plain:
            return
        raise GeneratorError(
            f"{self._url}: its log-probabilities are {self._logprobs_mode}, which are not those "
            "that tokens are drawn from at this temperature, top_p or top_k; start that vLLM "
            "server with --logprobs-mode processed_logprobs"
        )

    async def _stream(self, group: Group, answer: Answer) -> AsyncIterator[Completion]:
        assert self._session is not None
        request_id = f"{self._prefix}-{next(self._requests)}"
        body = request_body(group, request_id, self._model)
        self._held += group.num_rollouts
        over = False
        try:
            async with self._session.post(
                self._url + _GENERATE, json=body, timeout=_NO_LIMIT
            ) as response:
                if response.status != 200:
                    over = True
                    self._refused(response.status, await response.read())
                async for line in _lines(response.content):
                    if not line.startswith(b"data:"):
                        continue
                    message = line[5:].strip()
                    if message == b"[DONE]":
                        break
                    for completion in answer.message(message):
                        yield completion
                over = True
            if answer.missing:
                raise Garbage(f"the stream ended with {answer.missing} rollouts missing")
        finally:
            self._held -= group.num_rollouts
            if not over:
                self._abort(request_id)

    def _refused(self, status: int, body: bytes) -> None:
        text = f"{status}: {error_text(body)}"
        if status in BUSY:
            raise _Busy(text)
        if status >= 500:
            raise RequestFailed(text)
        if status in (401, 403, 404, 405):
            raise ReplicaLost(f"{self._url}: {text}")
        raise GeneratorError(f"{self._url}: {text}")

    def _abort(self, request_id: str) -> None:
        """Have the server drop a request whose connection was closed.

        vLLM does so by itself when it sees the end of the connection, which a proxy
        between may hide. Requests given up together are one call.
        """
        # vLLM keeps requests of this route under names with this prefix.
        self._unwanted.append(f"generate-tokens-{request_id}")
        if len(self._unwanted) == 1:
            task = asyncio.get_running_loop().create_task(self._send_aborts())
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)

    async def _send_aborts(self) -> None:
        unwanted, self._unwanted = self._unwanted, []
        try:
            await self._call("POST", "/inference/v1/abort_requests", {"request_ids": unwanted})
        except GeneratorError as error:
            _LOG.debug("%s", error)

    async def _call(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout: aiohttp.ClientTimeout = _PATIENCE,
    ) -> tuple[int, Any]:
        """Return the status and the JSON of a call, or None if it is none.

        Raises:
            Unavailable: the server does not answer.
        """
        assert self._session is not None
        try:
            async with self._session.request(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{self._url}: cannot be reached: {_text(error)}") from None
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data.decode(errors="replace")[:300]


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the lines of a stream; one with a long rollout is larger than aiohttp's reach."""
    parts: list[bytes] = []
    length = 0
    async for data in content.iter_any():
        first, *rest = data.split(b"\n")
        parts.append(first)
        length += len(first)
        if length > _LARGEST_MESSAGE:
            raise Garbage(f"a message is larger than {_LARGEST_MESSAGE} bytes")
        if rest:
            yield b"".join(parts)
            for line in rest[:-1]:
                yield line
            parts, length = [rest[-1]], len(rest[-1])


class _Busy(Exception):
    """The server asks for patience."""


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__

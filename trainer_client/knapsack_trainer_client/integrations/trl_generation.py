"""TRL's rollouts from our generation server: a ``rollout_func``.

    trainer = BudgetedGRPOTrainer(..., rollout_func=ServedRollouts("localhost:50061", "/dev/shm/w"))

The server prefills a prompt once for all of its rollouts. Before the first generation of
a step it is given the step's weights, through a folder that it must be able to read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from knapsack_trainer_client.errors import (
    ExtraMissing,
    GeneratorUnavailable,
    WeightUpdateFailed,
    refused,
)
from knapsack_trainer_client.rollout_wire import Rollout
from knapsack_trainer_client.rollouts import RolloutClient

try:
    from accelerate.utils import broadcast_object_list
    from transformers.utils import logging as transformers_logging
except ImportError as error:
    raise ExtraMissing(
        f"the TRL integration needs more packages: pip install 'knapsack-rl[trl]' ({error})"
    ) from error


class ServedRollouts:
    """Generates TRL's completions on a ``knapsack-genserver``; give it as ``rollout_func``.

    Every process of the trainer asks for the rollouts of its own rows; the main process
    hands over the weights. For text prompts, without tools, and for models that lie whole
    in the main process: not with DeepSpeed's or FSDP's sharding.

    Args:
        address: of the server, such as ``"localhost:50061"``; of one training at a time.
        folder: where weights are handed over, on a disk of the server, best in memory.
            One set of a training lies there at a time.
        timeout: seconds for the rollouts of a batch; None waits as long as it takes.

    Raises:
        InvalidRequest: when called, an option of the trainer that the server has no
            counterpart of.
        GeneratorUnavailable: when called, the server is not there, or a rollout failed.
        WeightUpdateFailed: when called, a rollout was made with other weights than those
            handed over: the server was started anew, or another training uses it.
    """

    def __init__(
        self, address: str, folder: str | os.PathLike[str], *, timeout: float | None = None
    ) -> None:
        self._address = address
        self._client = RolloutClient(address)
        self._folder = Path(folder)
        self._timeout = timeout
        self._version: int | None = None
        # Made anew by each training, which may be at the step where another one ended.
        self._training: Any = None
        self._calls = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Return one completion of each prompt, in order, as TRL wants them."""
        _check_options(trainer)
        if self._training is not trainer.state or self._version != trainer.state.global_step:
            self._hand_over(trainer)
        rows = trainer._tokenize_prompts(prompts)[0]
        # Rows of a group stand together; two groups of one prompt may be asked for as one.
        distinct = [(ids, len(list(same))) for ids, same in groupby(rows)]
        self._calls += 1
        groups = self._client.generate(
            [ids for ids, _ in distinct],
            [count for _, count in distinct],
            max_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k or 0,
            seed=_seed(trainer, self._calls),
            stop_token_ids=_ends(trainer),
            timeout=self._timeout,
        )
        if groups.failed:
            raise GeneratorUnavailable(
                f"{len(groups.failed)} of {len(rows)} rollouts failed: {groups.failed[0].error}"
            )
        rollouts = [rollout for group in groups for rollout in group]
        self._check_weights(rollouts)
        return {
            "prompt_ids": rows,
            "completion_ids": [rollout.token_ids for rollout in rollouts],
            "logprobs": [rollout.logprobs for rollout in rollouts],
        }

    def _hand_over(self, trainer: Any) -> None:
        """Let the server serve the weights of this step, under its number."""
        step, failure = trainer.state.global_step, None
        if trainer.accelerator.is_main_process:
            weights = self._folder / f"{_name_of(trainer)}-step-{step}"
            partial = weights.with_name(f"{weights.name}.partial")
            try:
                for left in (weights, partial):
                    shutil.rmtree(left, ignore_errors=True)
                with _no_progress_bar():
                    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(partial)
                os.replace(partial, weights)
                self._client.update_weights(weights.resolve(), step)
            except Exception as raised:
                failure = raised
            finally:
                shutil.rmtree(weights, ignore_errors=True)
        # Nobody generates with weights that are being replaced, nor waits for a process that
        # could not replace them.
        told = [None if failure is None else repr(failure)]
        broadcast_object_list(told, from_process=0)
        if failure is not None:
            raise failure
        if told[0] is not None:
            raise GeneratorUnavailable(f"the main process could not hand over weights: {told[0]}")
        self._training, self._version = trainer.state, step

    def _check_weights(self, rollouts: Sequence[Rollout]) -> None:
        versions = {version for rollout in rollouts for version, _, _ in rollout.weight_versions}
        others = sorted(versions - {self._version})
        if others:
            raise WeightUpdateFailed(
                f"the server at {self._address} generated with weights of version {others[0]} "
                f"where those of step {self._version} were handed over: it was started anew, or "
                "another training uses it"
            )


def _name_of(trainer: Any) -> str:
    """Return the same name for a training that resumes, and another for another one."""
    folder = os.path.abspath(trainer.args.output_dir).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(folder, digest_size=4).hexdigest()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep the progress of writing a file out of every step's output."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_options(trainer: Any) -> None:
    kind = getattr(trainer.accelerator.distributed_type, "value", "")
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise refused("distributed_type", kind, "must be one whose processes have whole models")
    arguments = trainer.args
    if arguments.min_p:
        raise refused("min_p", arguments.min_p, "must be None; the server has no such option")
    if arguments.repetition_penalty != 1.0:
        raise refused("repetition_penalty", arguments.repetition_penalty, "must be 1.0")
    if arguments.generation_kwargs:
        raise refused("generation_kwargs", arguments.generation_kwargs, "must be None")


def _ends(trainer: Any) -> Sequence[int]:
    """Return the tokens that end a completion; older TRL knows one of them."""
    ends = getattr(trainer, "eos_token_ids", None)
    return [trainer.eos_token_id] if ends is None else list(ends)


def _seed(trainer: Any, call: int) -> int:
    """Return another seed for every call of every process of every step."""
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    steps = trainer.args.seed * 1_000_003 + trainer.state.global_step
    return int((steps * 64 + call % 64) * ranks + rank) % 2**63

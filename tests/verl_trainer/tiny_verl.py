"""verl's own trainer on a CPU: everything but the GPU engines, on a task for tests.

Real: the configuration, the data loader, the agent loop workers and their loop, the reward
workers, the TransferQueue, the replay buffers, advantages, the training loop and its
checkpoints. In place of vLLM: our generation server. In place of the training engine:
``Engine``, which takes no gradient; ``cpu_engine`` has verl's own.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
import transfer_queue
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync
from verl.workers.rollout.replica import TokenOutput

from knapsack_trainer_client import AsyncRolloutClient
from knapsack_trainer_client.integrations.verl_rewards import split_key

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MEAN = 4
"""``rollout.n``."""
HARDNESS = (1, 2, 8, 1000)
"""A rollout succeeds if its first token is a multiple of it."""
MOST_STEPS = 150
"""Of a training that goes on until something has been seen."""

torch.set_num_threads(1)


def write_model(folder: Path) -> None:
    """Write a model of a few thousand random weights, and a tokenizer of letters."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS) + 2,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    ).save_pretrained(folder)


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Return prompts of four kinds, which succeed nearly always to never."""
    return [
        {
            "prompt": [{"role": "user", "content": LETTERS[i // 26] + LETTERS[i % 26]}],
            "data_source": "letters",
            "reward_model": {"style": "rule", "ground_truth": str(HARDNESS[i % 4])},
            "extra_info": {"index": i},
            **changes,
        }
        for i in range(count)
    ]


def write_rows(path: Path, written: Sequence[dict[str, Any]]) -> None:
    """Write a data set as verl reads it."""
    pandas.DataFrame(list(written)).to_parquet(path)


REWARD = """
LETTERS = "abcdefghijklmnopqrstuvwxyz"

def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    first = solution_str[:1]
    token = LETTERS.index(first) + 2 if first in LETTERS and first else 1
    return {"score": float(token % int(ground_truth) == 0), "length": len(solution_str)}
"""


def flags(address: str | None) -> list[str]:
    """Return the four flags of the documentation."""
    module = "knapsack_trainer_client.integrations.verl"
    return [
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class="
        f"{module}.BudgetedAgentLoopManager",
        f"trainer.v1.sampler.custom_sampler.path=pkg://{module}",
        "trainer.v1.sampler.custom_sampler.name=ReportingReplayBuffer",
        *([f"+trainer.v1.sampler.sampler_kwargs.scheduler={address}"] if address else []),
    ]


def make_config(
    folder: Path,
    model_of: Path,
    address: str | None,
    *more: str,
    budgeted: bool = True,
    timeout: float = 60.0,
) -> Any:
    """Return verl's configuration with the flags of the documentation, as main_ppo gets it.

    The timeout is the client's; a scheduler that is there has time, however busy the machine.
    """
    for name, count in (("train", 8), ("val", 3)):
        if not (folder / f"{name}.parquet").exists():
            write_rows(folder / f"{name}.parquet", rows(count))
    (model_of / "reward.py").write_text(REWARD)
    overrides = [
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={model_of / 'model'}",
        f"actor_rollout_ref.rollout.n={MEAN}",
        "actor_rollout_ref.rollout.prompt_length=8",
        "actor_rollout_ref.rollout.response_length=4",
        "actor_rollout_ref.rollout.agent.num_workers=2",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.actor.strategy=fsdp",
        f"data.train_files={folder / 'train.parquet'}",
        f"data.val_files={folder / 'val.parquet'}",
        "data.train_batch_size=4",
        "data.shuffle=false",
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        "data.dataloader_num_workers=0",
        f"reward.custom_reward_function.path={model_of / 'reward.py'}",
        "reward.num_workers=1",
        "trainer.logger=[]",
        "trainer.n_gpus_per_node=1",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_epochs=100",
        "trainer.total_training_steps=3",
        "trainer.project_name=tests",
        f"trainer.experiment_name={folder.name}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        *(flags(address) if budgeted else ()),
        *([f"+trainer.v1.sampler.sampler_kwargs.timeout={timeout}"] if budgeted else ()),
        *more,
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    config.transfer_queue.enable = True
    OmegaConf.resolve(config)
    return config


class ServedClient:
    """verl's client of its LLM servers, which asks our generation server.

    One rollout a call, as verl does.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: AsyncRolloutClient | None = None
        self._failing = 0

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: Any, **_: Any
    ) -> TokenOutput:
        """Return one completion of the prompt.

        Fails, as an LLM server may, for prompts that begin with z, all but the first time.
        """
        if self._client is None:
            self._client = AsyncRolloutClient(self._address, timeout=60)
        if prompt_ids[0] == LETTERS.index("z") + 2:
            self._failing += 1
            if self._failing > 1:
                raise RuntimeError("this rollout fails")
        (group,) = await self._client.generate(
            [list(prompt_ids)], [1], max_tokens=4, temperature=1.0, stop_token_ids=[1]
        )
        rollout = group[0]
        version = rollout.weight_versions[0][0]
        return TokenOutput(
            token_ids=rollout.token_ids,
            log_probs=rollout.logprobs,
            stop_reason="completed",
            extra_fields={"min_global_steps": version, "max_global_steps": version},
        )

    def __reduce__(self) -> Any:
        return ServedClient, (self._address,)


class Engine:
    """In the place of the worker group: takes batches, and no gradient."""

    def __init__(self) -> None:
        self._dispatch_info = {"actor": [0]}
        self.updates: list[int] = []

    def compute_log_prob(self, batch: Any) -> Any:
        """Write log-probabilities and entropy of nothing."""
        data = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"]
        )
        nothing = torch.nested.as_nested_tensor(
            [torch.zeros(len(row)) for row in data["input_ids"]], layout=torch.jagged
        )
        return transfer_queue.kv_batch_put(
            keys=batch.keys,
            partition_id=batch.partition_id,
            fields=TensorDict(
                {"log_probs": nothing, "entropy": nothing.clone()}, batch_size=len(batch.keys)
            ),
        )

    def update_actor(self, batch: Any) -> Any:
        """Count the rows."""
        self.updates.append(len(batch.keys))
        return {"metrics": {"mfu": [0.0]}}

    def save_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint of nothing."""
        os.makedirs(path, exist_ok=True)

    def load_checkpoint(self, **kwargs: Any) -> None:
        """Load nothing."""


class Weights:
    """In the place of the checkpoint engine: there are no weights to hand over."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class OnCpu:
    """A trainer of verl without its GPU engines; put it before the trainer's class.

    Attributes:
        seen: of every step, its batch by row and the metrics that verl logs.
        after_step: called with the step when it has ended.
    """

    config: Any
    reward_loop: Any = None
    """Shared by the trainers of a test session: its workers take half a minute to start."""

    def _setup(self: Any) -> None:
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self.actor_rollout_wg = self._engine()
        if OnCpu.reward_loop is None:
            OnCpu.reward_loop = RewardLoopManager(config=self.config)
        self.reward_loop_manager = OnCpu.reward_loop
        self.checkpoint_manager = self._weights()
        self.distillation_config = None
        self.replay_buffer.poll_interval = 0.05
        self.seen: list[dict[str, Any]] = []
        self.validated: list[int] = []
        self.after_step: Callable[[int], object] = lambda step: None
        self._load_checkpoint()

    def _engine(self) -> Any:
        return Engine()

    def _weights(self) -> Any:
        return Weights()

    def _get_n_gpus_for_throughput(self) -> int:
        return 1

    def _compute_advantage(self: Any, batch: Any, metrics: Any) -> Any:
        batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        surplus = int(self.replay_buffer._metrics["knapsack/surplus_rollouts"])
        self.seen.append({"step": self.global_steps, "surplus": surplus, **read_batch(batch)})
        return batch

    def _compute_metrics(self: Any, batch: Any, metrics: Any, *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)  # type: ignore[misc]
        self.seen[-1]["metrics"] = dict(metrics)

    def on_step_end(self: Any) -> None:
        """Let the test meddle."""
        super().on_step_end()  # type: ignore[misc]
        self.after_step(self.global_steps)


class SyncOnCpu(OnCpu, PPOTrainerSync):
    """verl's synchronous trainer."""


class AsyncOnCpu(OnCpu, PPOTrainerColocateAsync):
    """verl's asynchronous trainer with generation beside training."""


def fit_until(trainer: Any, manager: Any, seen: Callable[[], object]) -> None:
    """Train until something holds, which in any one step is a matter of luck.

    What holds in a third of the steps is missed in ``MOST_STEPS`` once in 10^26 trainings.
    """
    trainer.total_training_steps = MOST_STEPS

    def look(step: int) -> None:
        if seen():
            trainer.total_training_steps = step

    trainer.after_step = look
    trainer.fit(manager)
    assert seen(), f"not in {MOST_STEPS} steps"


def await_rollouts() -> None:
    """Wait until no rollout is being generated, of which the queue tells nobody by itself."""
    end = time.monotonic() + 240
    while any(
        tag.get("status") in ("pending", "running")
        for tag in (transfer_queue.kv_list() or {}).get("train", {}).values()
    ):
        assert time.monotonic() < end, transfer_queue.kv_list()
        time.sleep(0.05)


def pads(key: str) -> bool:
    """Return whether a row of TransferQueue fills up a batch and belongs to no group."""
    return key.startswith("pad")


def read_batch(batch: Any) -> dict[str, Any]:
    """Return a batch by row: uid, index, reward, advantage and length; padding left out."""
    # Also by its key: on a busy machine rows of padding were seen that had lost their tag.
    rows_ = [
        i
        for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True))
        if not tag.get("is_padding", False) and not pads(key)
    ]
    keys = [batch.keys[i] for i in rows_]
    data = transfer_queue.kv_batch_get(
        keys=keys,
        partition_id=batch.partition_id,
        select_fields=["uid", "index", "rm_scores", "advantages", "response_mask"],
    )
    uids = [str(uid) for uid in data["uid"]]
    assert uids == [split_key(key)[0] for key in keys], (batch.keys, batch.tags, uids)
    masks = [mask.bool() for mask in data["response_mask"]]
    firsts = [float(row[mask][0]) for row, mask in zip(data["advantages"], masks, strict=True)]
    return {
        "uid": uids,
        "index": [int(i) for i in data["index"]],
        "rewards": [float(row.sum()) for row in data["rm_scores"]],
        "advantages": firsts,
        "lengths": [int(mask.sum()) for mask in masks],
        "padding": len(batch.keys) - len(keys),
    }


def by_group(seen: dict[str, Any], column: str) -> dict[str, list[Any]]:
    """Return a column of a batch by group, in the order of the rows."""
    groups: dict[str, list[Any]] = {}
    for uid, value in zip(seen["uid"], seen[column], strict=True):
        groups.setdefault(uid, []).append(value)
    return groups


def sizes(seen: dict[str, Any]) -> dict[int, int]:
    """Return the rows of each prompt, by index, sorted."""
    return dict(sorted(Counter(seen["index"]).items()))

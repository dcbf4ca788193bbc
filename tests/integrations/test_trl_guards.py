"""What TRL's trainer refuses, finds out by itself, and works with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from knapsack_trainer_client import BudgetClient, InvalidRequest, WrongGroups, verify_groups
from knapsack_trainer_client.integrations import trl as integration
from knapsack_trainer_client.integrations.trl import BudgetedGRPOTrainer, BudgetedMixin
from knapsack_trainer_client.integrations.trl_waves import joined

from tiny_trl import (
    GROUP,
    Recording,
    by_hand,
    config,
    groups_of,
    new_model,
    new_tokenizer,
    new_trainer,
    partly,
    reward,
    rows,
)

NOWHERE = "127.0.0.1:1"
"""An address at which nobody answers; a trainer that is refused never asks."""


@pytest.mark.parametrize(
    ("more", "options", "said"),
    [
        ({"prompt_id_column": "name"}, {}, "prompt_id_column = 'name'"),
        ({"max_rollouts": 3}, {}, "max_rollouts = 3"),
        ({"max_rollouts": "64"}, {}, "max_rollouts = '64'"),
        ({"scheduler": 50051}, {}, "scheduler = 50051"),
        ({"scheduler": "localhost"}, {}, "address = 'localhost'"),
        ({"run_id": ""}, {}, "run_id = ''"),
        ({"waves": 3}, {}, "waves = 3"),
        ({"waves": 2}, {"num_generations": 8}, "waves = 2: needs a generation_batch_size"),
        ({"run_config": {"threshold": 0.0}}, {}, "config = 'threshold'"),
        ({}, {"multi_objective_aggregation": "vote"}, "multi_objective_aggregation = 'vote'"),
        ({}, {"scale_rewards": "range"}, "scale_rewards = 'range'"),
        ({}, {"loss_type": "lost"}, "loss_type = 'lost'"),
    ],
)
def test_options_are_refused_by_name(
    more: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """What unequal groups are not known to be right with is refused before training."""
    with pytest.raises(InvalidRequest) as caught:
        new_trainer(tmp_path, NOWHERE, more=more, **options)

    assert str(caught.value).startswith(said)


def test_a_first_wave_must_be_half_a_batch(shared_scheduler: Any, tmp_path: Path) -> None:
    """A run whose groups begin above half of the mean has no room for a second one."""
    more = {"waves": 2, "run_id": "no-half", "run_config": {"min_rollouts": 3}}
    trainer = new_trainer(tmp_path, shared_scheduler.address, more=more)

    with pytest.raises(InvalidRequest, match="waves = 2: must be 1 where the run's min_rollouts"):
        trainer.train()


def test_halves_are_joined_token_by_token() -> None:
    """Prompts are filled up on the left and completions on the right; images are refused."""
    ones = {name: torch.ones(2, 3) for name in ("prompt_mask", "completion_ids", "tool_mask")}
    first = ones | {"advantages": torch.ones(2), "num_items_in_batch": torch.tensor(5)}
    second = {name: 2 * value[..., :1] for name, value in first.items() if value.dim() == 2}
    second |= {"advantages": torch.zeros(2), "num_items_in_batch": torch.tensor(2)}

    whole = joined(first, second, pad_token=9)

    assert whole["num_items_in_batch"] == 7
    assert whole["advantages"].tolist() == [1, 1, 0, 0]
    assert whole["prompt_mask"].tolist() == [[1, 1, 1]] * 2 + [[0, 0, 2]] * 2
    assert whole["completion_ids"].tolist() == [[1, 1, 1]] * 2 + [[2, 9, 9]] * 2
    assert whole["tool_mask"].tolist() == [[1, 1, 1]] * 2 + [[2, 1, 1]] * 2
    for odd in ("pixel_values", "old_per_token_logps"):
        with pytest.raises(InvalidRequest, match=f"waves = 2: .* '{odd}'"):
            joined(first | {odd: torch.ones(2, 3)}, second, pad_token=9)


def test_prompts_must_have_an_identity(tmp_path: Path) -> None:
    """Prompts told apart by an image need a column; a client has a run of its own."""
    data = Dataset.from_list([row | {"images": ["x"]} for row in rows()])
    with pytest.raises(InvalidRequest, match="prompt_id_column = None"):
        new_trainer(tmp_path, NOWHERE, data=data, more={"prompt_id_column": None})
    with (
        BudgetClient(NOWHERE, "run") as client,
        pytest.raises(InvalidRequest, match="has a run already"),
    ):
        new_trainer(tmp_path, client, more={"run_id": "other"})


def test_mixin_wants_a_grpo_trainer() -> None:
    """Other trainers cut their groups elsewhere."""

    class Other(BudgetedMixin):
        pass

    with pytest.raises(InvalidRequest, match=r"trainer = 'Other': must be a subclass of trl"):
        Other()


def test_ids_that_name_several_prompts_are_refused(shared_scheduler: Any, tmp_path: Path) -> None:
    """They would be one prompt's statistics: found at once, or in a stream's batch."""
    data = Dataset.from_list([row | {"id": i % 3} for i, row in enumerate(rows())])
    with pytest.raises(InvalidRequest, match=r"rows 0 and 3 of the training set .* both '0'"):
        new_trainer(tmp_path, NOWHERE, data=data)

    # A constant column, so that any batch has two of a name.
    stream = Dataset.from_list([row | {"id": 0} for row in rows()]).to_iterable_dataset()
    try:
        trainer = new_trainer(tmp_path, shared_scheduler.address, data=stream, run_name="constant")
    except NotImplementedError:
        pytest.skip("this TRL takes no iterable datasets")
    with pytest.raises(InvalidRequest, match="different ones of a batch are '0'"):
        trainer.train()


def test_rows_of_a_group_share_nothing(shared_scheduler: Any, tmp_path: Path) -> None:
    """What TRL adds to the prompt of a row, as in its loop of tools, is in no other row."""
    data = Dataset.from_list(
        [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows()]
    )

    def growing(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        for i, prompt in enumerate(prompts):
            prompt.append({"role": "tool", "content": str(i)})
        assert [[m["content"] for m in prompt[1:]] for prompt in prompts] == [
            [str(i)] for i in range(len(prompts))
        ]
        ids = trainer.processing_class(text=[prompt[0]["content"] for prompt in prompts])
        completions = [[2 + i % 5, 1] for i in range(len(prompts))]
        return {"prompt_ids": ids["input_ids"], "completion_ids": completions, "logprobs": None}

    more = {"rollout_func": growing, "run_id": "rows-apart"}
    trainer = new_trainer(
        tmp_path, shared_scheduler.address, GRPOMixed, data=data, more=more, max_steps=2
    )

    trainer.train()

    assert trainer.state.global_step == 2


def test_equal_groups_of_unequal_rows_are_found(shared_scheduler: Any, tmp_path: Path) -> None:
    """Rows relaid without new advantages: TRL reshapes without an error, verify_groups stops."""
    found: list[str] = []

    class Naive(BudgetedMixin, GRPOTrainer):
        def _settle(self, batch: Any, output: Any) -> None:
            rewards = batch.by_function[:, 0]
            try:
                verify_groups(output["advantages"], rewards, batch.sizes, epsilon=1e-4)
            except WrongGroups as error:
                found.append(str(error))
            super()._settle(batch, output)
            verify_groups(output["advantages"], rewards, batch.sizes, epsilon=1e-4)

    trainer = new_trainer(
        tmp_path, shared_scheduler.address, trainer=Naive, max_steps=10, run_name="naive-rows"
    )

    trainer.train()

    assert found
    assert all(f"equal groups of {GROUP}" in message for message in found)


def test_unknown_formula_stops_the_run(shared_scheduler: Any, tmp_path: Path) -> None:
    """A subclass below the mixin whose advantages are not TRL's is not silently overruled."""

    class Ranked(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            if self.model.training:
                output["advantages"] = output["advantages"].sign()
            return output

    class Below(BudgetedMixin, Ranked):
        pass

    with pytest.raises(WrongGroups, match="formula that is not known here"):
        new_trainer(tmp_path, shared_scheduler.address, trainer=Below, run_name="below").train()

    class Above(Ranked, Recording):
        pass

    trainer = new_trainer(tmp_path, shared_scheduler.address, trainer=Above, run_name="above")
    trainer.train()
    expected = [
        (a > 0) - (a < 0)
        for batch in trainer.batches
        for a in by_hand(groups_of(batch["ids"]), batch["rewards"])
    ]
    assert sorted(trainer.trained) == sorted(expected)


def test_rollouts_of_every_nth_prompt_are_found(shared_scheduler: Any, tmp_path: Path) -> None:
    """A rollout_func that makes num_generations of a prompt would fill other groups' rows."""

    def one_each(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(text=prompts)["input_ids"]
        completions = [[2 + i % 5, 1] for i in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def naive(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return one_each([p for p in prompts[::GROUP] for _ in range(GROUP)], trainer)

    arguments = {"rollout_func": one_each, "run_id": "right"}
    right = new_trainer(tmp_path, shared_scheduler.address, more=arguments, max_steps=6)
    right.train()
    assert any(len(set(map(len, groups_of(b["ids"])))) > 1 for b in right.batches)

    arguments = {"rollout_func": naive, "run_id": "naive"}
    with pytest.raises(WrongGroups, match=f"rollout_func made {GROUP} rollouts of every"):
        new_trainer(tmp_path, shared_scheduler.address, more=arguments, max_steps=6).train()


def test_embedded_scheduler_and_a_new_beginning(tmp_path: Path) -> None:
    """Without an address the statistics lie in output_dir; a new training begins them anew."""
    for _ in range(2):
        trainer = BudgetedGRPOTrainer(
            model=new_model(),
            reward_funcs=reward,
            args=config(tmp_path / "out", max_steps=3),
            train_dataset=Dataset.from_list(rows()),
            processing_class=new_tokenizer(),
        )
        trainer.train()
        run = trainer._budget.run()
        assert run.total_rollouts == 3 * 8
        assert run.run_id == "run"
        # Hashes of the prompts.
        assert all(len(s.prompt_id) == 16 for s in trainer._budget.prompt_stats())
        trainer._budget.close()
    assert (tmp_path / "out" / "knapsack.db").exists()


def test_success_threshold_reaches_the_run(shared_scheduler: Any, tmp_path: Path) -> None:
    """The run is created with the config given; integers can name prompts."""
    data = Dataset.from_list([row | {"id": i} for i, row in enumerate(rows())])
    more = {"run_config": {"success_threshold": -1.0}, "run_id": "all"}
    trainer = new_trainer(
        tmp_path, shared_scheduler.address, GRPOMixed, data=data, more=more, max_steps=2
    )

    trainer.train()

    run = trainer._budget.run()
    assert run.config.success_threshold == -1.0
    assert run.total_successes == run.total_rollouts == 16
    assert {s.prompt_id for s in trainer._budget.prompt_stats()} <= {"0", "1", "2", "3"}


class GRPOMixed(BudgetedMixin, GRPOTrainer):
    """A user's own class."""


def test_columns_survive_removal_and_streaming(shared_scheduler: Any, tmp_path: Path) -> None:
    """The id column is kept where unused columns are removed, and streams have one too."""
    trainer = new_trainer(
        tmp_path,
        shared_scheduler.address,
        GRPOMixed,
        reward_funcs=partly,
        remove_unused_columns=True,
        max_steps=2,
        run_name="removed",
    )
    trainer.train()
    names = {s.prompt_id for s in trainer._budget.prompt_stats()}
    assert names <= {row["id"] for row in rows()}
    assert names


def test_iterable_datasets(shared_scheduler: Any, tmp_path: Path) -> None:
    """A stream of prompts is divided like a list of them."""
    stream = Dataset.from_list(rows(8)).to_iterable_dataset()
    try:
        trainer = new_trainer(
            tmp_path, shared_scheduler.address, data=stream, max_steps=4, run_name="stream"
        )
    except NotImplementedError:
        pytest.skip("this TRL takes no iterable datasets")

    trainer.train()

    assert len(trainer.batches) == 4
    for batch in trainer.batches:
        expected = by_hand(groups_of(batch["ids"]), batch["rewards"])
        assert batch["advantages"] == pytest.approx(expected, abs=1e-6)


def test_vllm_server_is_asked_for_one_rollout_a_row() -> None:
    """TRL asks for num_generations of every num_generations-th row, which are other prompts."""
    asked: list[int] = []

    def generate(prompts: list[Any], num_generations: int) -> None:
        asked.append(num_generations)

    trainer = SimpleNamespace(vllm_generation=SimpleNamespace(generate=generate), _batch=None)
    integration._generate_row_by_row(trainer)
    trainer.vllm_generation.generate(prompts=[], num_generations=GROUP)
    trainer._batch = object()
    trainer.vllm_generation.generate(prompts=[], num_generations=GROUP)

    assert asked == [GROUP, 1]


def test_wrong_batches_are_found(shared_scheduler: Any, tmp_path: Path) -> None:
    """Rows that are not groups of equal prompts have another sampler's order."""

    class Shuffled(GRPOMixed):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return super()._generate_and_score_completions(inputs[1:] + inputs[:1])

    with pytest.raises(WrongGroups, match="not made of groups of num_generations = 4"):
        new_trainer(tmp_path, shared_scheduler.address, Shuffled, run_name="shuffled").train()


def test_infinite_reward_is_named(shared_scheduler: Any, tmp_path: Path) -> None:
    """An infinite reward stops the run by its row."""

    def infinite(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float("inf")] + [0.0] * (len(completion_ids) - 1)

    with pytest.raises(InvalidRequest, match=r"rewards\[0\]\[0\] = inf"):
        new_trainer(
            tmp_path, shared_scheduler.address, reward_funcs=infinite, run_name="infinite"
        ).train()
    assert torch.get_num_threads() == 1

"""Trainings by verl's own loop with unequal groups: advantages, reports, failures, resume."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transfer_queue
from verl.trainer.ppo import core_algos

from knapsack_trainer_client import InvalidRequest, WrongGroups, verify_groups
from knapsack_trainer_client.integrations.verl_rewards import split_key
from knapsack_trainer_client.integrations.verl_settings import ESTIMATORS

import tiny_verl
from tiny_verl import (
    MEAN,
    AsyncOnCpu,
    SyncOnCpu,
    await_rollouts,
    by_group,
    fit_until,
    make_config,
    pads,
    sizes,
)

ROWS = 4 * MEAN


def mean(values: list[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def std(values: list[float]) -> float:
    """Return the sample standard deviation."""
    return math.sqrt(math.fsum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def normalised(rewards: list[float], lengths: list[int]) -> list[float]:
    """Return GRPO's advantages of a group, with verl's epsilon."""
    return [(r - mean(rewards)) / (std(rewards) + 1e-6) for r in rewards]


def leave_one_out(rewards: list[float], lengths: list[int]) -> list[float]:
    """Return RLOO's: the reward less the mean of the others."""
    n = len(rewards)
    return [r - (sum(rewards) - r) / (n - 1) for r in rewards]


def by_length(rewards: list[float], lengths: list[int]) -> list[float]:
    """Return OPO's: less the mean weighted by lengths."""
    baseline = sum(n * r for n, r in zip(lengths, rewards, strict=True)) / sum(lengths)
    return [r - baseline for r in rewards]


def centred(rewards: list[float], lengths: list[int]) -> list[float]:
    """Return the reward less the mean."""
    return [r - mean(rewards) for r in rewards]


def best_of_two(rewards: list[float], lengths: list[int]) -> list[float]:
    """Return pass@k's: the best reward less the second best, for the best one."""
    first = max(range(len(rewards)), key=rewards.__getitem__)
    lead = rewards[first] - max(rewards[:first] + rewards[first + 1 :])
    return [lead / (std(rewards) + 1e-6) if i == first else 0.0 for i in range(len(rewards))]


FORMULAS: dict[str, Callable[[list[float], list[int]], list[float]]] = {
    "grpo": normalised,
    "grpo_vectorized": normalised,
    "grpo_passk": best_of_two,
    "rloo": leave_one_out,
    "rloo_vectorized": leave_one_out,
    "opo": by_length,
    "gpg": centred,
    "reinforce_plus_plus_baseline": centred,
}


def expected(seen: dict[str, Any], estimator: str) -> list[float]:
    """Return the advantages by hand, row by row, of the groups by uid."""
    groups = {
        uid: iter(FORMULAS[estimator](rewards, by_group(seen, "lengths")[uid]))
        for uid, rewards in by_group(seen, "rewards").items()
    }
    values = [next(groups[uid]) for uid in seen["uid"]]
    if estimator == "gpg":
        factor = len(values) / max(sum(1 for r in seen["rewards"] if r), 1)
        return [v * factor for v in values]
    if estimator == "reinforce_plus_plus_baseline":
        # Whitened over the tokens of the batch.
        lengths = seen["lengths"]
        count = sum(lengths)
        middle = sum(v * n for v, n in zip(values, lengths, strict=True)) / count
        squares = sum((v - middle) ** 2 * n for v, n in zip(values, lengths, strict=True))
        variance = squares / count * count / (count - 1)
        return [(v - middle) / math.sqrt(variance + 1e-8) for v in values]
    return values


def test_every_step_is_exact_and_reported(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """Groups are unequal, advantages those of a hand computation, every rollout is counted."""
    config = make_config(
        tmp_path,
        world.folder,
        scheduler.address,
        "trainer.total_training_steps=6",
        "trainer.val_before_train=true",
    )
    trainer, manager = world.trainer(config)
    trainer.fit(manager)

    rollouts: Counter[int] = Counter()
    successes: Counter[int] = Counter()
    for seen in trainer.seen:
        assert (len(seen["uid"]), seen["padding"]) == (ROWS, 0)
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
        verify_groups(seen["advantages"], seen["rewards"], group_ids=seen["uid"])
        rollouts.update(seen["index"])
        successes.update(i for i, r in zip(seen["index"], seen["rewards"], strict=True) if r)
        metrics = seen["metrics"]
        assert metrics["knapsack/largest_group"] == max(sizes(seen).values())
        groups = by_group(seen, "rewards").values()
        rate = sum(len(set(rewards)) > 1 for rewards in groups) / len(groups)
        assert metrics["knapsack/effective_group_rate"] == pytest.approx(rate)
        assert metrics["knapsack/fallback"] == 0.0
    # The second epoch knows what the first one saw.
    assert set(sizes(trainer.seen[0]).values()) == {MEAN}
    assert len({n for seen in trainer.seen[2:] for n in sizes(seen).values()}) > 1
    assert trainer.actor_rollout_wg.updates == [ROWS] * 6
    assert len(manager.budget.groups) == 0
    run = manager.budget.client.run()
    assert (run.total_rollouts, run.last_step) == (6 * ROWS, 6)
    stats = {s.prompt_id: s for s in manager.budget.client.prompt_stats()}
    assert set(stats) == {f"letters/{i}" for i in range(8)}
    for index in range(8):
        known = stats[f"letters/{index}"]
        assert (known.total_rollouts, known.total_successes) == (rollouts[index], successes[index])
        assert 0 < known.mean_completion_tokens <= 4


def test_each_estimator_takes_the_groups_as_they_are(
    world: Any, scheduler: Any, tmp_path: Path
) -> None:
    """Every estimator that is let through is exact in unequal groups, by verl's own code."""
    assert set(ESTIMATORS) == set(FORMULAS)
    compared: Counter[str] = Counter()

    class All(SyncOnCpu):
        def _compute_advantage(self, batch: Any, metrics: Any) -> Any:
            for name in [*ESTIMATORS, "grpo"]:
                self.config.algorithm.adv_estimator = core_algos.AdvantageEstimator(name).value
                super()._compute_advantage(batch, metrics)
                seen = self.seen[-1]
                assert seen["advantages"] == pytest.approx(expected(seen, name), abs=1e-6), name
                unequal = len(set(sizes(seen).values())) > 1
                compared[name] += unequal and any(seen["advantages"])
            return batch

    trainer, manager = world.trainer(make_config(tmp_path, world.folder, scheduler.address), All)
    # pass@k has an advantage only in a group with one success exactly.
    fit_until(trainer, manager, lambda: min(compared[name] for name in ESTIMATORS) >= 2)


def test_the_naive_way_is_found(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """Cut into rollout.n rows, as a reshape does, verl's batches are wrong groups."""
    trainer, manager = world.trainer(make_config(tmp_path, world.folder, scheduler.address))
    fit_until(trainer, manager, lambda: any(map(is_cut_wrongly, trainer.seen)))

    seen = next(filter(is_cut_wrongly, trainer.seen))
    ordered = in_order(seen)
    with pytest.raises(WrongGroups, match=r"reshape\(-1, 4\)"):
        verify_groups(cut(ordered), [r for _, r in ordered], group_ids=[uid for uid, _ in ordered])


def in_order(seen: dict[str, Any]) -> list[tuple[str, float]]:
    """Return uid and reward of each row of a batch, groups one after the other."""
    return sorted(zip(seen["uid"], seen["rewards"], strict=True))


def cut(ordered: list[tuple[str, float]]) -> list[float]:
    """Return GRPO's advantages of rows that are taken for groups of ``rollout.n``."""
    rewards = [r for _, r in ordered]
    return [
        a for start in range(0, ROWS, MEAN) for a in normalised(rewards[start : start + MEAN], [])
    ]


def is_cut_wrongly(seen: dict[str, Any]) -> bool:
    """Whether a batch has other advantages if it is cut so."""
    ordered = in_order(seen)
    return cut(ordered) != pytest.approx(normalise_groups(ordered))


def normalise_groups(ordered: list[tuple[str, float]]) -> list[float]:
    """Return GRPO's advantages of rows in the order of their groups."""
    groups: dict[str, list[float]] = {}
    for uid, reward in ordered:
        groups.setdefault(uid, []).append(reward)
    return [a for rewards in groups.values() for a in normalised(rewards, [])]


def test_training_goes_on_without_the_scheduler(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """Killed amid a run: equal groups meanwhile, unequal ones when it is back, nothing lost."""
    config = make_config(
        tmp_path,
        world.folder,
        scheduler.address,
        "trainer.total_training_steps=8",
        # The first call after the kill waits for so long.
        timeout=5.0,
    )
    trainer, manager = world.trainer(config)

    def meddle(step: int) -> None:
        if step == 3:
            scheduler.kill()
        if step == 5:
            scheduler.start()
            assert manager.budget.client.flush(60)

    trainer.after_step = meddle
    trainer.fit(manager)

    fallbacks = [seen["metrics"]["knapsack/fallback"] for seen in trainer.seen]
    assert fallbacks == [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    for seen, fallback in zip(trainer.seen, fallbacks, strict=True):
        assert len(seen["uid"]) == ROWS
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
        if fallback:
            assert set(sizes(seen).values()) == {MEAN}
    assert len({n for seen in trainer.seen[5:] for n in sizes(seen).values()}) > 1
    client = manager.budget.client
    assert client.flush(30)
    assert client.run().total_rollouts == 8 * ROWS


class Crash(Exception):
    """The trainer died."""


def crash(trainer: Any, manager: Any, after: int) -> None:
    """Train until a step has ended, and lose the trainer and what was in its queue."""

    def die(step: int) -> None:
        if step == after:
            raise Crash

    trainer.after_step = die
    with pytest.raises(Crash):
        trainer.fit(manager)
    manager.budget.client.close()
    await_rollouts()
    for partition, items in transfer_queue.kv_list().items():
        if items:
            transfer_queue.kv_clear(keys=list(items), partition_id=partition)


def test_a_resumed_run_allocates_as_it_would_have(
    world: Any, scheduler: Any, tmp_path: Path
) -> None:
    """After a crash the run goes back to verl's checkpoint, and what came later is forgotten."""
    options = ("trainer.total_training_steps=7", "trainer.save_freq=5")
    config = make_config(tmp_path, world.folder, scheduler.address, *options)
    trainer, manager = world.trainer(config)
    crash(trainer, manager, after=6)

    again, manager = world.trainer(config)
    assert again.global_steps == 5
    again.fit(manager)

    assert [seen["step"] for seen in trainer.seen] == list(range(1, 7))
    assert [seen["step"] for seen in again.seen] == [6, 7]
    assert sizes(again.seen[0]) == sizes(trainer.seen[5])
    assert len(set(sizes(again.seen[0]).values())) > 1
    run = manager.budget.client.run()
    assert (run.total_rollouts, run.last_step) == (7 * ROWS, 7)


def test_a_run_that_begins_anew_knows_nothing(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """Without a checkpoint the statistics of an earlier training of the name are gone."""
    config = make_config(
        tmp_path, world.folder, scheduler.address, "trainer.total_training_steps=3"
    )
    for _ in range(2):
        trainer, manager = world.trainer(config)
        trainer.fit(manager)
        assert set(sizes(trainer.seen[0]).values()) == {MEAN}
        assert manager.budget.client.run().total_rollouts == 3 * ROWS
        manager.budget.client.close()


def test_rollouts_that_fail_are_missing(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """A rollout whose siblings failed is reported, and left out: its advantage would be raw."""
    failing = {"prompt": [{"role": "user", "content": "zz"}]}
    tiny_verl.write_rows(
        tmp_path / "train.parquet",
        [*tiny_verl.rows(3), {**tiny_verl.rows(4)[3], **failing}],
    )
    config = make_config(
        tmp_path, world.folder, scheduler.address, "trainer.total_training_steps=2"
    )
    trainer, manager = world.trainer(config)
    trainer.fit(manager)

    first, second = trainer.seen
    assert first["metrics"]["knapsack/lone_rollouts"] == 1.0
    assert second["metrics"]["knapsack/lone_rollouts"] == 0.0
    for seen in trainer.seen:
        assert 3 not in seen["index"]
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
        # verl fills the mini-batch up with rows that count for nothing.
        assert len(seen["uid"]) + seen["padding"] == ROWS
    stats = {s.prompt_id: s for s in manager.budget.client.prompt_stats()}
    assert stats["letters/3"].total_rollouts == 1


def test_prompts_may_be_skipped(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """With a minimum of 0 the others get what a skipped prompt leaves, and keep it."""
    option = "+trainer.v1.sampler.sampler_kwargs.min_rollouts=0"
    config = make_config(tmp_path, world.folder, scheduler.address, option)
    trainer, manager = world.trainer(config)
    fit_until(trainer, manager, lambda: sum(len(sizes(seen)) < 4 for seen in trainer.seen) >= 2)

    for seen in trainer.seen:
        assert (len(seen["uid"]), seen["surplus"], seen["padding"]) == (ROWS, 0, 0)
        assert min(sizes(seen).values()) >= 2
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
    assert manager.budget.client.run().total_rollouts == len(trainer.seen) * ROWS


def test_one_prompt_twice_in_a_batch_is_two_groups(
    world: Any, scheduler: Any, tmp_path: Path
) -> None:
    """Rows of one prompt have groups of their own, which both count for the prompt."""
    row = tiny_verl.rows(2)
    tiny_verl.write_rows(tmp_path / "train.parquet", [row[1], row[1], row[0], row[1]])
    config = make_config(
        tmp_path, world.folder, scheduler.address, "trainer.total_training_steps=3"
    )
    trainer, manager = world.trainer(config)
    trainer.fit(manager)

    for seen in trainer.seen:
        assert len(set(seen["uid"])) == 4
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
    counted = Counter(i for seen in trainer.seen for i in seen["index"])
    stats = {s.prompt_id: s.total_rollouts for s in manager.budget.client.prompt_stats()}
    assert stats == {f"letters/{i}": n for i, n in counted.items()}


def test_groups_that_are_filtered_out_are_reported(
    world: Any, scheduler: Any, tmp_path: Path
) -> None:
    """DAPO's filter is verl's own, and the scheduler learns which prompts it drops."""
    config = make_config(
        tmp_path,
        world.folder,
        scheduler.address,
        "trainer.total_training_steps=2",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=reward",
        "data.train_batch_size=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    )
    trainer, manager = world.trainer(config)
    submitted: Counter[str] = Counter()
    generate = manager.generate_sequences

    def counting(prompts: Any) -> None:
        submitted["calls"] += 1
        submitted["prompts"] += len(prompts)
        generate(prompts)

    manager.generate_sequences = counting
    trainer.fit(manager)

    assert submitted["calls"] > 2
    for seen in trainer.seen:
        groups = by_group(seen, "rewards")
        assert len(groups) == 2
        # What leaves out surplus rollouts does not look at rewards: it alone may leave equal ones.
        effective = all(len(set(rewards)) > 1 for rewards in groups.values())
        assert effective or len(seen["uid"]) == 2 * MEAN
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
        assert len(seen["uid"]) <= 2 * MEAN
        assert len(seen["uid"]) + seen["padding"] == 2 * MEAN
    client = manager.budget.client
    assert client.run().total_rollouts == submitted["prompts"] * MEAN
    stats = {s.prompt_id: s for s in client.prompt_stats()}
    always = stats["letters/0"]
    assert always.total_rollouts == always.total_successes > 0
    assert len(manager.budget.groups) == 0


def test_an_asynchronous_trainer_is_budgeted_by_call(
    world: Any, scheduler: Any, tmp_path: Path
) -> None:
    """Warm-up and steps are allocations of their own, and no mini-batch is added."""
    options = ("trainer.v1.trainer_mode=colocate_async", "trainer.total_training_steps=5")
    config = make_config(tmp_path, world.folder, scheduler.address, *options)
    trainer, manager = world.trainer(config, AsyncOnCpu)
    assert type(trainer.replay_buffer).__name__ == "ReportingReplayBufferAsync"
    trainer.fit(manager)

    used = 0
    for seen in trainer.seen:
        assert len(by_group(seen, "rewards")) == 4
        assert len(seen["uid"]) + seen["padding"] == ROWS
        assert seen["advantages"] == pytest.approx(expected(seen, "grpo"), abs=1e-6)
        used += len(seen["uid"]) + seen["surplus"]
    assert manager.budget.client.run().total_rollouts == used
    # Generation is one batch ahead of training.
    assert len(manager.budget.groups) == 4
    await_rollouts()


def test_groups_in_a_checkpoint_are_not_lost(world: Any, scheduler: Any, tmp_path: Path) -> None:
    """What an asynchronous trainer had generated ahead counts when it resumes."""
    options = (
        "trainer.v1.trainer_mode=colocate_async",
        "trainer.total_training_steps=6",
        "trainer.save_freq=3",
    )

    class Ahead(AsyncOnCpu):
        def _save_checkpoint(self) -> None:
            await_rollouts()
            super()._save_checkpoint()

    config = make_config(tmp_path, world.folder, scheduler.address, *options)
    trainer, manager = world.trainer(config, Ahead)
    crash(trainer, manager, after=3)
    trained = {uid for seen in trainer.seen for uid in seen["uid"]}

    again, manager = world.trainer(config, AsyncOnCpu)
    assert again.global_steps == 3
    rows = [key for key in transfer_queue.kv_list()["train"] if "_" in key and not pads(key)]
    restored = {split_key(key)[0] for key in rows} - trained
    again.fit(manager)
    await_rollouts()

    assert [seen["step"] for seen in again.seen] == [4, 5, 6]
    assert all(len(by_group(seen, "rewards")) == 4 for seen in again.seen)
    assert len(restored) == 4
    assert restored <= {uid for seen in again.seen for uid in seen["uid"]}
    used = sum(len(seen["uid"]) + seen["surplus"] for seen in [*trainer.seen, *again.seen])
    client = manager.budget.client
    assert client.run().total_rollouts == used
    assert {s.prompt_id for s in client.prompt_stats()} == {f"letters/{i}" for i in range(8)}


@pytest.mark.parametrize("changes", [{"extra_info": {"level": 1}}, {"extra_info": {"index": 0}}])
def test_prompts_without_a_name_stop_the_training(
    world: Any, scheduler: Any, tmp_path: Path, changes: Any
) -> None:
    """verl would give every prompt index 0; the error says what to write into the files."""
    tiny_verl.write_rows(tmp_path / "train.parquet", tiny_verl.rows(4, **changes))
    trainer, manager = world.trainer(make_config(tmp_path, world.folder, scheduler.address))

    with pytest.raises(InvalidRequest, match=r"extra_info\.index.*when the files are written"):
        trainer.fit(manager)


def test_without_an_address_the_scheduler_is_within(world: Any, tmp_path: Path) -> None:
    """No server: the statistics are in a file beside the checkpoints."""
    config = make_config(tmp_path, world.folder, None, "trainer.total_training_steps=3")
    trainer, manager = world.trainer(config)
    trainer.fit(manager)

    assert manager.budget.client.run().total_rollouts == 3 * ROWS
    assert (tmp_path / "checkpoints" / "knapsack.db").exists()

"""Ready wrappers for loops: repeated batches, and prompts one at a time."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from knapsack_trainer_client import (
    BudgetClient,
    InvalidRequest,
    PromptStream,
    SchedulerUnavailable,
    WrongGroups,
    budgeted_batches,
    group_advantages,
)

from real_scheduler import PATIENCE

RATES = {"easy": 1.0, "even": 0.5, "hard": 0.1, "never": 0.0}


def draw(rng: random.Random, name: str) -> float:
    """Return a reward of 1 with the prompt's rate."""
    return float(rng.random() < RATES[name])


@pytest.fixture
def client(shared_scheduler: Any, request: Any) -> Iterator[BudgetClient]:
    """A client with a run of its own."""
    with BudgetClient(shared_scheduler.address, request.node.name, timeout=PATIENCE) as budget:
        yield budget


def test_batches_keep_their_rows_and_name_their_groups(client: BudgetClient) -> None:
    """As many rows as before; a group is its rows' id, also of a prompt that comes twice."""
    rng = random.Random(0)
    batches = [[*RATES, "even"]] * 6
    sizes = []
    for step, batch in enumerate(
        budgeted_batches(client, batches, prompt_id=str, rollouts_per_prompt=6, max_rollouts=20)
    ):
        assert batch.allocation.step == step
        assert len(batch.prompts) == len(batch.group_ids) == 5 * 6
        by_group = Counter(batch.group_ids)
        assert list(by_group.values()) == batch.allocation.num_rollouts
        for group, rows in itertools.groupby(zip(batch.group_ids, batch.prompts, strict=True)):
            assert len({prompt for _, prompt in [group, *rows]}) == 1
        rewards = [draw(rng, prompt) for prompt in batch.prompts]
        assert batch.report(rewards).delivered
        advantages = group_advantages(rewards, batch.allocation)
        batch.verify(advantages, rewards)
        sizes.append(batch.allocation.num_rollouts)
        if len(set(sizes[-1])) > 1:
            with pytest.raises(WrongGroups):
                batch.verify(group_advantages(rewards, [6] * 5), rewards)
    assert any(len(set(groups)) > 1 for groups in sizes)
    assert client.run().total_rollouts == 6 * 30
    assert client.run().last_policy_version == 5


def test_a_batch_is_asked_for_after_the_reports_before_it(client: BudgetClient) -> None:
    """The second batch of the same prompts knows what the first one brought."""
    batches = budgeted_batches(client, [["easy", "even"]] * 2, prompt_id=str, rollouts_per_prompt=8)
    first = next(batches)
    assert first.allocation.summary.unseen_prompts == 2
    first.report([1.0] * 8 + [1.0, 0.0] * 4)

    assert next(batches).allocation.summary.unseen_prompts == 0


def test_a_stream_spends_each_window_exactly(client: BudgetClient) -> None:
    """Prompts come in order, one at a time, and a window's rollouts are its budget."""
    rng = random.Random(1)
    source = [name for _ in range(5) for name in RATES]
    stream = PromptStream(
        client, source, prompt_id=str, window=8, rollouts_per_prompt=5, max_rollouts=30
    )
    planned = []
    for prompt in stream:
        planned.append(prompt)
        rewards = [draw(rng, prompt.prompt) for _ in range(prompt.num_rollouts)]
        # In two parts, as rollouts finish.
        stream.report(prompt, rewards[:1])
        tokens = [3] * len(rewards[1:])
        stream.report(prompt, rewards[1:], policy_version=1, completion_tokens=tokens)

    assert [p.prompt for p in planned] == source
    windows = [planned[:8], planned[8:16], planned[16:]]
    assert [sum(p.num_rollouts for p in window) for window in windows] == [40, 40, 20]
    assert [window[0].allocation.step for window in windows] == [0, 1, 2]
    assert any(len({p.num_rollouts for p in window}) > 1 for window in windows)
    assert stream.take() is None
    assert client.run().total_rollouts == 100


def test_prompts_without_rollouts_are_passed_over(client: BudgetClient) -> None:
    """With a minimum of 0 a prompt may get nothing, and is then not handed out."""
    stream = PromptStream(
        client,
        RATES,
        prompt_id=str,
        window=4,
        rollouts_per_prompt=1,
        min_rollouts=0,
        max_rollouts=8,
    )

    planned = list(stream)

    # Four rollouts for four prompts nobody knows: two prompts get two each.
    assert [p.num_rollouts for p in planned] == [2, 2]
    assert [p.prompt for p in planned] == [list(RATES)[p.position] for p in planned]


def test_a_stream_resumes_where_it_was(client: BudgetClient) -> None:
    """From a state taken amid a window, it plans that window again as it was planned."""

    def play(stream: PromptStream[str], count: int, rng: random.Random) -> list[tuple[str, int]]:
        seen = []
        for planned in itertools.islice(stream, count):
            stream.report(planned, [draw(rng, planned.prompt) for _ in range(planned.num_rollouts)])
            seen.append((planned.prompt, planned.num_rollouts))
        return seen

    def new(state: Any = None) -> PromptStream[str]:
        source = itertools.cycle(RATES)
        drawn = state.get("prompts_drawn", 0) if state else 0
        return PromptStream(
            client,
            itertools.islice(source, drawn, None),
            prompt_id=str,
            window=4,
            rollouts_per_prompt=6,
            state=state,
        )

    stream = new()
    play(stream, 8, random.Random(0))
    assert stream.state() == {"window": 2, "prompts_drawn": 8}
    straight = play(stream, 2, random.Random(1))
    state = stream.state()
    assert state == {"window": 2, "prompts_drawn": 8}
    play(stream, 6, random.Random(2))

    resumed = new(state)

    assert resumed.state() == state
    assert play(resumed, 2, random.Random(1)) == straight
    assert client.run().rewinds == 1
    with pytest.raises(InvalidRequest, match=r"state = \{'window': 1\}"):
        new({"window": 1})
    with pytest.raises(InvalidRequest, match=r"state\['window'\] = -1"):
        new({"window": -1, "prompts_drawn": 0})


def test_a_window_that_could_not_be_planned_is_planned_again(scripted: Any, until: Any) -> None:
    """No prompt is lost where the scheduler does not answer and calls raise."""
    with BudgetClient(scripted.address, "again", timeout=5.0, on_unavailable="raise") as client:
        stream = PromptStream(client, "abcd", prompt_id=str, window=2, rollouts_per_prompt=2)
        taken = [stream.take(), stream.take()]
        scripted.stop()
        for _ in range(2):
            with pytest.raises(SchedulerUnavailable):
                stream.take()
        assert stream.state() == {"window": 1, "prompts_drawn": 2}
        scripted.start()
        until(lambda: not client.stats().breaker_open)
        while (planned := stream.take()) is not None:
            taken.append(planned)
        assert [p and p.prompt for p in taken] == list("abcd")
        assert [p and p.allocation.step for p in taken] == [0, 0, 1, 1]

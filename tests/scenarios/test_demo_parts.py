"""The demo's task, model, gradient and results, each against a plain way to the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from knapsack_trainer_client.demo import plot, results
from knapsack_trainer_client.demo.model import (
    exact_accuracy,
    greedy_accuracy,
    new_model,
    response_logprobs,
    save,
    warm_up,
)
from knapsack_trainer_client.demo.task import END, EQUALS, HOURS, LONGEST, OPERATORS, World
from knapsack_trainer_client.demo.train import Evaluation, History, StepOutcome, _learn
from knapsack_trainer_client.groups import group_advantages
from knapsack_trainer_client.rollouts import Rollout, RolloutGroups


def rollout(tokens: list[int]) -> Rollout:
    """Return a rollout of these tokens."""
    return Rollout(0, 0, tokens, [0.0] * len(tokens), "", "stop", ((0, 0, len(tokens)),), "")


def test_the_right_chain_is_worked_hour_by_hour() -> None:
    """Each operator's table is a permutation, applied in the order of the prompt."""
    world = World(3)
    for table in world.tables:
        assert sorted(table) == list(range(HOURS))
    problem = world.problem(7, (2, 0, 2))
    first = world.tables[2][7]
    second = world.tables[0][first]
    third = world.tables[2][second]
    assert problem.prompt == (7, HOURS + 2, HOURS, HOURS + 2, EQUALS)
    assert problem.answer == (first, second, third, END)


def test_the_reward_looks_at_length_and_last_hour() -> None:
    """Hours between are not looked at; everything else must be right."""
    problem = World(0).problem(4, (1, 5))
    between, last, end = problem.answer
    assert problem.reward([between, last, end]) == 1.0
    assert problem.reward([(between + 1) % HOURS, last, end]) == 1.0
    for wrong in (
        [between, (last + 1) % HOURS, end],
        [between, last],
        [between, last, end, end],
        [last, end],
        [between, between, last, end],
        [],
    ):
        assert problem.reward(wrong) == 0.0


def test_problems_are_different_and_held_out_ones_are_apart() -> None:
    """Chains of two and more are in one set only; the same seed draws the same."""
    world = World(1)
    held_out = world.problems(400, 1)
    ids = {p.prompt_id for p in held_out}
    train = world.problems(600, 2, ids)
    assert len(ids) == 400
    assert len({p.prompt_id for p in train}) == 600
    shared = [p for p in train if p.prompt_id in ids]
    assert all(len(p.answer) == 2 for p in shared)
    assert world.problems(400, 1) == held_out
    lengths = {len(p.answer) - 1 for p in train}
    assert lengths == set(range(1, LONGEST + 1))


def test_the_demonstrator_is_right_as_often_as_it_knows() -> None:
    """First steps of many examples against the knowledge they were drawn from."""
    world = World(5)
    tokens, labels = world.demonstrations(40_000, np.random.default_rng(0))
    hours, operators = tokens[:, 0], tokens[:, 1] - HOURS
    shown = labels[labels >= 0]
    starts = (labels >= 0).argmax(axis=1)
    answers = labels[np.arange(len(labels)), starts]
    assert shown.size == (labels >= 0).sum()
    right = answers == world.tables[operators, hours]
    knows = world._knows[operators, hours]
    for low, high in itertools.pairwise([0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0]):
        band = (knows >= low) & (knows < high)
        error = right[band].mean() - knows[band].mean()
        assert abs(error) < 5 * math.sqrt(0.25 / band.sum())
    assert set(operators.tolist()) == set(range(OPERATORS))


@pytest.fixture(scope="module")
def trained() -> tuple[World, Any]:
    """A model that has learned a little."""
    world, model = World(0), new_model(0)
    warm_up(model, world, 60, 0)
    return world, model


def test_logprobs_do_not_depend_on_what_else_is_in_the_batch(trained: tuple[World, Any]) -> None:
    """Responses of many lengths together, against each alone by the chain rule."""
    world, model = trained
    problems = world.problems(20, 9)
    responses = [[*p.answer[:-1], *p.answer[: k % 2]] or [END] for k, p in enumerate(problems)]
    logprobs, mask = response_logprobs(model, [p.prompt for p in problems], responses)
    for row, (problem, response) in enumerate(zip(problems, responses, strict=True)):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*problem.prompt, *response]])).logits[0]
        for t, token in enumerate(response):
            scores = logits[len(problem.prompt) - 1 + t].log_softmax(-1)
            assert logprobs[row, t].item() == pytest.approx(scores[token].item(), abs=1e-4)
        assert mask[row].tolist() == [1.0] * len(response) + [0.0] * (mask.shape[1] - len(response))


def test_accuracies_are_what_enumeration_says(trained: tuple[World, Any]) -> None:
    """The probability and the mode of the whole chain, token by token."""
    world, model = trained
    problems = [world.problem(h, ops) for h in (0, 5) for ops in ((3,), (1, 2), (4, 4, 7))]
    greedy, exact = [], []
    for problem in problems:
        row, probability, best = list(problem.prompt), 1.0, True
        for token in problem.answer:
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1)
            probability *= scores[token].item()
            best &= int(scores.argmax()) == token
            row.append(token)
        exact.append(probability)
        greedy.append(best)
    assert exact_accuracy(model, problems) == pytest.approx(exact, rel=1e-3)
    assert greedy_accuracy(model, problems) == pytest.approx(np.mean(greedy))


def test_the_gradient_is_that_of_ragged_grpo(trained: tuple[World, Any]) -> None:
    """Against the sum over every rollout and token, one autograd graph each."""
    import copy

    world, model = trained
    problems = world.problems(4, 11)
    rng = np.random.default_rng(0)
    sizes = [2, 7, 0, 3]
    groups = RolloutGroups(4)
    rewards = []
    for at, size in enumerate(sizes):
        groups[at].extend(
            rollout([*rng.integers(0, HOURS, rng.integers(1, 6)).tolist(), END])
            for _ in range(size)
        )
        rewards.append([float(k % 3 == 0) for k in range(size)])
    # The last group teaches nothing.
    rewards[3] = [1.0, 1.0, 1.0]
    advantages = group_advantages(rewards)
    tokens = sum(len(r.token_ids) for group in groups for r in group)

    plain = copy.deepcopy(model)
    plain.zero_grad()
    for problem, group, values in zip(problems, groups, advantages, strict=True):
        mean = sum(rewards[problems.index(problem)]) / max(len(values), 1)
        for k, (r, advantage) in enumerate(zip(group, values, strict=True)):
            assert advantage == 0.0 or (advantage > 0) == (
                rewards[problems.index(problem)][k] > mean
            )
            logits = plain(input_ids=torch.tensor([[*problem.prompt, *r.token_ids]])).logits[0]
            scores = logits[len(problem.prompt) - 1 : -1].log_softmax(-1)
            taken = scores.gather(-1, torch.tensor(r.token_ids)[:, None]).sum()
            (-advantage * taken / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])

    seen: dict[str, torch.Tensor] = {}
    taught = copy.deepcopy(model)

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen["grad"] = torch.cat([p.grad.flatten() for p in taught.parameters()])

    _learn(taught, Spy(taught.parameters(), lr=0.1), problems, groups, advantages)
    norm = expected.norm()
    clipped = expected * min(1.0, 1.0 / (norm.item() + 1e-6))
    assert norm > 0
    assert torch.allclose(seen["grad"], clipped, atol=2e-5)


def test_a_saved_model_appears_whole(tmp_path: Any) -> None:
    """And a second one under the same name is not mixed into it."""
    save(new_model(0), tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.partial"))


def history(accuracies: list[float], sizes: list[int], successes: list[int]) -> History:
    """Return a run of one step per two evaluations, 100 rollouts apart."""
    step = StepOutcome(["p"] * len(sizes), sizes, successes, [0.5] * len(sizes), 0)
    return History(
        [step] * (len(accuracies) - 1),
        [Evaluation(100 * k, a, a + 0.01) for k, a in enumerate(accuracies)],
    )


def test_measures_of_a_history_by_hand() -> None:
    """Rates over groups and over rollouts, the crossing on a straight line."""
    base = history([0.2, 0.4, 0.6], [4, 4, 4], [0, 2, 4])
    ahead = history([0.2, 0.5, 0.7], [2, 8, 2], [0, 2, 2])
    m = results.measure(ahead, base)
    assert m.exact == 0.7
    assert m.greedy == pytest.approx(0.71)
    assert m.effective_group_rate == pytest.approx(1 / 3)
    assert m.effective_rollout_rate == pytest.approx(8 / 12)
    assert (m.largest_group, m.rollouts, m.fallback_waves) == (8, 24, 0)
    assert m.rollouts_to_baseline == pytest.approx(150)
    assert results.measure(base, base).rollouts_to_baseline == 200
    behind = history([0.2, 0.3, 0.5], [4, 4, 4], [0, 2, 4])
    assert results.measure(behind, base).rollouts_to_baseline is None


def test_the_table_and_the_sentences_say_what_was_found() -> None:
    """For and against knapsack, with one seed and with several."""
    base = history([0.2, 0.4, 0.6], [4, 4, 4], [0, 2, 4])
    ahead = history([0.2, 0.5, 0.7], [2, 8, 2], [0, 2, 2])
    behind = history([0.2, 0.3, 0.5], [4, 4, 4], [0, 2, 4])
    one = {
        name: [results.measure(h, base)]
        for name, h in (("uniform", base), ("knapsack", ahead), ("two", behind))
    }
    for_it, against_it = results.findings(one)
    assert "10.0 points above uniform" in for_it
    assert "reached uniform's final accuracy after 150" in for_it
    assert "10.0 points below uniform" in against_it
    assert "did not reach uniform's final accuracy" in against_it
    rows = {row[0].strip(): row[1:] for row in results.table(one)}
    assert rows[""] == ("uniform", "knapsack", "two")
    assert rows["held-out accuracy"] == ("0.600", "0.700", "0.500")
    assert rows["against uniform, same seed"] == ("", "+0.100", "-0.100")
    assert rows["rollouts to uniform's accuracy"] == ("200", "150", "not reached")

    two = {
        "uniform": [results.measure(base, base)] * 2,
        "knapsack": [results.measure(ahead, base), results.measure(behind, base)],
    }
    (mixed,) = results.findings(two)
    assert "on the mean of 2 seeds (above in 1 of 2)" in mixed
    assert "in 1 of 2" in mixed
    rows = {row[0].strip(): row[1:] for row in results.table(two)}
    assert rows["held-out accuracy"][1] == "0.600 ± 0.141"
    assert rows["rollouts to uniform's accuracy"][1] == "150 (1 of 2)"


def test_results_come_back_and_are_drawn(tmp_path: Any) -> None:
    """What was written is read the same, and the picture is a picture."""
    runs = {
        "uniform": [history([0.1, 0.2], [4], [1])] * 2,
        "other": [history([0.1, 0.3], [4], [1])] * 2,
    }
    results.write(tmp_path / "r.json", {"seeds": 2}, runs)
    assert results.read(tmp_path / "r.json") == ({"seeds": 2}, runs)
    plot.draw(tmp_path / "r.png", runs)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

"""What the verl integration decides without verl: reports, trimming, names, refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_trainer_client import BudgetClient, InvalidRequest
from knapsack_trainer_client.integrations.verl_groups import (
    FinishedGroup,
    OpenGroups,
    group_metrics,
    lone_rollouts,
    surplus_rollouts,
)
from knapsack_trainer_client.integrations.verl_prompts import PromptNames
from knapsack_trainer_client.integrations.verl_settings import OPTIONS, read_settings


def finished(uid: str, rewards: list[float], version: int = 3, **more: Any) -> FinishedGroup:
    """Return a group whose completions have two tokens."""
    count = len(rewards)
    return FinishedGroup(uid, list(range(count)), rewards, [2] * count, version, **more)


def client(tmp_path: Any) -> BudgetClient:
    """Return a client with a scheduler of its own."""
    return BudgetClient.embedded(tmp_path / "stats.db", "verl", timeout=60, outbox=False)


def test_groups_of_one_allocation_are_one_report(tmp_path: Any) -> None:
    """A step's groups, in any order of finishing, are one report in the allocation's shape."""
    with client(tmp_path) as budget:
        allocation = budget.allocate(["a", "b", "c"], 12, step=4)
        groups = OpenGroups("verl")
        groups.open(["u1", "u2", "u3"], allocation)

        (report,) = groups.close(
            ["u3", "u1", "u2"], [finished("u3", [1.0]), finished("u1", [0.0, 1.0])]
        )

        assert report.allocation is allocation
        assert report.rewards == [[0.0, 1.0], [], [1.0]]
        assert report.completion_tokens == [[2, 2], [], [2]]
        assert len(groups) == 0
        assert budget.report(allocation, report.rewards, 3).accepted_rollouts == 3


def test_groups_of_two_policies_are_two_reports(tmp_path: Any) -> None:
    """Rollouts of an asynchronous trainer are reported under the policy that made them."""
    with client(tmp_path) as budget:
        groups = OpenGroups("verl")
        groups.open(["u1", "u2"], budget.allocate(["a", "b"], 8, step=4))

        reports = groups.close(["u1", "u2"], [finished("u1", [1.0], 3), finished("u2", [0.0], 2)])

        assert [r.policy_version for r in reports] == [3, 2]


def test_a_group_of_before_a_restart_is_reported_by_name(tmp_path: Any) -> None:
    """What a checkpoint brought back counts for its prompt, though its allocation is lost."""
    with client(tmp_path) as budget:
        stranger = finished("old", [1.0, 0.0, 0.0], prompt_id="letters/7", step=5)
        (report,) = OpenGroups("verl").close(["old"], [stranger])

        budget.report(report.allocation, report.rewards, report.policy_version)

        (stats,) = budget.prompt_stats()
        assert (stats.prompt_id, stats.total_rollouts) == ("letters/7", 3)


SESSIONS = st.dictionaries(
    st.text("abcd", min_size=1), st.lists(st.integers(0, 50), min_size=2, max_size=9, unique=True)
)


@given(sessions=SESSIONS, limit=st.integers(0, 60))
def test_trimming_keeps_the_limit_and_pairs(sessions: dict[str, list[int]], limit: int) -> None:
    """What is left is the limit, or two of each group; larger groups give first."""
    dropped = surplus_rollouts(sessions, limit)

    left = {u: [s for s in numbers if (u, s) not in dropped] for u, numbers in sessions.items()}
    total = sum(map(len, sessions.values()))
    assert sum(map(len, left.values())) == min(total, max(limit, 2 * len(sessions)))
    assert all(len(numbers) >= 2 for numbers in left.values())
    touched = [len(left[uid]) for uid, _ in dropped]
    untouched = [len(numbers) for uid, numbers in left.items() if numbers == sessions[uid]]
    if touched and untouched:
        assert min(touched) >= max(untouched) - 1
    for uid, numbers in sessions.items():
        assert sorted(numbers)[: len(left[uid])] == sorted(left[uid])


def test_a_rollout_whose_siblings_failed_is_alone() -> None:
    """A group of one is found; a group of none has nothing to drop."""
    assert lone_rollouts({"a": [3], "b": [0, 1], "c": []}) == {("a", 3)}


def test_metrics_are_those_of_the_groups() -> None:
    """Shares count what was generated; groups of none are left out."""
    groups = [finished("a", [1.0, 0.0]), finished("b", [1.0] * 4), finished("c", [])]

    assert group_metrics(groups) == {
        "knapsack/effective_group_rate": 0.5,
        "knapsack/effective_rollout_rate": pytest.approx(1 / 3),
        "knapsack/largest_group": 4.0,
    }
    assert group_metrics([]) == {}


def messages(text: str) -> list[dict[str, str]]:
    """Return a prompt as verl has it."""
    return [{"role": "user", "content": text}]


def test_names_are_source_and_index() -> None:
    """The same prompt has the same name in every epoch and order, duplicates too."""
    names = PromptNames()
    prompts = [messages("x"), messages("y"), messages("x")]
    infos = [{"index": 3}, {"index": "b"}, {"index": 3}]

    assert names.name(prompts, infos, [0, 0, 0], ["gsm", "math", "gsm"]) == [
        "gsm/3",
        "math/b",
        "gsm/3",
    ]
    assert names.name(prompts[:2], None, [7, 8], None) == ["7", "8"]


@pytest.mark.parametrize(
    ("infos", "index", "said"),
    [
        ([{}, {}], [0, 0], "extra_info.index = None"),
        ([{"index": None}, {"index": 1}], [0, 1], "extra_info.index = None"),
        ([{"index": 0}, {"index": 0}], [0, 0], "two prompts of a batch have this name"),
        (None, [0, 0], "two prompts of a batch have this name"),
        (None, None, "extra_info.index = None"),
        ([{"index": 1.5}, {"index": 2}], None, "extra_info.index = 1.5"),
    ],
)
def test_an_index_that_is_missing_or_constant_is_refused(infos: Any, index: Any, said: str) -> None:
    """verl's default of 0 for every row would make one prompt of the whole data set."""
    with pytest.raises(InvalidRequest, match="must") as caught:
        PromptNames().name([messages("x"), messages("y")], infos, index, ["s", "s"])

    assert said in str(caught.value)
    assert "extra_info.index" in str(caught.value)


def test_an_index_that_begins_anew_in_every_file_is_refused() -> None:
    """Two files of one data source that both count from 0 are found when they meet."""
    names = PromptNames()
    names.name([messages("x")], [{"index": 0}], None, ["s"])

    with pytest.raises(InvalidRequest, match="another prompt had this name"):
        names.name([messages("y")], [{"index": 0}], None, ["s"])

    changing = PromptNames(may_change=True)
    for text in "xy":
        assert changing.name([messages(text)], [{"index": 0}], None, ["s"]) == ["s/0"]


def config(**changes: Any) -> dict[str, Any]:
    """Return the part of verl's configuration that is looked at."""
    made: dict[str, Any] = {
        "data": {"train_batch_size": 8},
        "algorithm": {"adv_estimator": "grpo", "filter_groups": {"enable": False}},
        "actor_rollout_ref": {"rollout": {"n": 4}},
        "reward": {"reward_model": {"enable": False}},
        "trainer": {
            "use_v1": True,
            "project_name": "p",
            "experiment_name": "e",
            "default_local_dir": "out",
            "v1": {"sampler": {"sampler_kwargs": {}}},
        },
    }
    for path, value in changes.items():
        at, *rest = path.split("__")
        inner = made[at]
        for name in rest[:-1]:
            inner = inner.setdefault(name, {})
        inner[rest[-1]] = value
    return made


OURS = "trainer__v1__sampler__sampler_kwargs__"


def test_defaults_are_verls() -> None:
    """The mean is rollout.n, and the run is called after project and experiment."""
    settings = read_settings(config())

    assert (settings.rollouts_per_prompt, settings.min_rollouts) == (4, 2)
    assert (settings.run_id, settings.store) == ("p/e", "out/knapsack.db")
    assert settings.scheduler is None
    assert settings.filter.metric is None


def test_a_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret is no key of a configuration that verl prints."""
    monkeypatch.setenv("KNAPSACK_RL_TOKEN", "secret")
    settings = read_settings(config(**{f"{OURS}scheduler": "localhost:1"}))

    assert "secret" not in repr(settings)
    with settings.client() as made:
        assert made._client._transport._token == "secret"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (f"{OURS}schedular", "x", f"{OPTIONS}.schedular = 'x'"),
        (f"{OURS}scheduler", 3, f"{OPTIONS}.scheduler = 3"),
        (f"{OURS}wave_fraction", 0.5, f"{OPTIONS}.wave_fraction = 0.5"),
        (f"{OURS}min_rollouts", 1, f"{OPTIONS}.min_rollouts = 1"),
        (f"{OURS}min_rollouts", 5, f"{OPTIONS}.min_rollouts = 5"),
        (f"{OURS}max_rollouts", 3, f"{OPTIONS}.max_rollouts = 3"),
        (f"{OURS}timeout", 0, f"{OPTIONS}.timeout = 0"),
        (f"{OURS}tls", "yes", f"{OPTIONS}.tls = 'yes'"),
        (f"{OURS}run_config", {"x": 1}, f"{OPTIONS}.run_config: config = 'x'"),
        ("actor_rollout_ref__rollout__n", 1, "actor_rollout_ref.rollout.n = 1"),
        ("algorithm__adv_estimator", "gae", "algorithm.adv_estimator = 'gae'"),
        ("trainer__use_v1", False, "trainer.use_v1 = False"),
        ("trainer__experiment_name", None, f"{OPTIONS}.run_id = None"),
        ("reward__reward_model__enable", True, "reward.reward_model.enable_resource_pool"),
        ("data__train_batch_size", 0, "data.train_batch_size = 0"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(path: str, value: Any, said: str) -> None:
    """A wrong option is named as a user writes it on verl's command line."""
    with pytest.raises(InvalidRequest) as caught:
        read_settings(config(**{path: value}))

    assert str(caught.value).startswith(said)


def test_a_filter_of_groups_needs_groups() -> None:
    """verl's filter stops at a group without rollouts, so prompts must not be skipped."""
    filtered = {"algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "acc"}
    assert read_settings(config(**filtered)).filter.metric == "acc"

    with pytest.raises(InvalidRequest, match=r"filter_groups\.enable"):
        read_settings(config(**filtered, **{f"{OURS}min_rollouts": 0}))
    with pytest.raises(InvalidRequest, match=r"filter_groups\.metric"):
        read_settings(config(**{"algorithm__filter_groups__enable": True}))


def test_an_estimator_of_your_own_may_be_said_to_group_by_uid() -> None:
    """An unknown estimator is refused unless its user says how it groups."""
    mine = config(**{"algorithm__adv_estimator": "mine", f"{OURS}groups_by_uid": True})

    assert read_settings(mine).rollouts_per_prompt == 4


def test_a_million_names_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of prompts is bounded; later ones are checked within their batch."""
    monkeypatch.setattr("knapsack_trainer_client.integrations.verl_prompts.REMEMBERED", 3)
    names = PromptNames()
    for i in random.Random(0).sample(range(50), 50):
        names.name([messages(str(i))], [{"index": i}], None, ["s"])

    assert len(names._texts) == 3

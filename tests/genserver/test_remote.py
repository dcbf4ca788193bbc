"""vLLM servers over HTTP: what is asked, what is believed, and what their failures cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from knapsack_genserver.engine import Completion
from knapsack_genserver.engines.remote.engine import RemoteOptions
from knapsack_genserver.engines.remote.messages import ANY_VOCABULARY, Answer, Garbage
from knapsack_genserver.engines.remote.pool import remote_pool
from knapsack_genserver.engines.remote.weights import WeightRoutes
from knapsack_genserver.errors import ConfigError, FailedPrecondition
from knapsack_genserver.member import PoolOptions
from knapsack_genserver.replicas import ReplicaPool

from small_engines import all_of, group
from vllm_like import VllmLike

POOL = PoolOptions(
    piece_rollouts=4, check_seconds=0.5, check_failures=2, retry_seconds=(0.001, 0.01)
)
OPTIONS = RemoteOptions("", retries=2, retry_seconds=0.001, rollouts=16, connections=8)
GROUPS = [group([k + 1], n, seed=k) for k, n in enumerate([2, 60, 7, 20, 3])]


async def until(holds: Callable[[], bool]) -> None:
    """Return when something holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture
async def servers() -> AsyncIterator[list[VllmLike]]:
    """Two servers."""
    made = [VllmLike(), VllmLike()]
    for server in made:
        await server.start()
    yield made
    for server in made:
        await server.stop()


@pytest.fixture
async def pool(servers: list[VllmLike]) -> AsyncIterator[ReplicaPool]:
    """An engine of both."""
    made = remote_pool([server.url for server in servers], OPTIONS, POOL)
    await made.start()
    await until(lambda: made.status().replicas == 2)
    yield made
    await made.close()


def tokens(found: list[list[Completion]]) -> list[list[list[int]]]:
    """Return the tokens of groups of rollouts."""
    return [[c.token_ids for c in rollouts] for rollouts in found]


async def expected() -> list[list[list[int]]]:
    """Return the tokens that whole groups have, asked of one server at once."""
    server = VllmLike()
    await server.start()
    whole = remote_pool([server.url], OPTIONS, PoolOptions(piece_rollouts=1000))
    await whole.start()
    found = await all_of(whole, *GROUPS)
    await whole.close()
    await server.stop()
    return tokens(found)


async def test_groups_in_pieces_on_two_servers(pool: ReplicaPool, servers: list[VllmLike]) -> None:
    """The rollouts are those of whole groups on one; few connections, none too many held."""
    for server in servers:
        server.gate.clear()
    asked = asyncio.ensure_future(all_of(pool, *GROUPS))
    await until(lambda: all(server.open >= 4 for server in servers))
    assert sum(b["sampling_params"]["n"] for b in servers[0].requests) <= 16
    for server in servers:
        server.gate.set()
    found = await asked
    assert tokens(found) == await expected()
    assert all(servers[k].most_open <= 8 for k in range(2))
    for sizes, rollouts in zip([2, 60, 7, 20, 3], found, strict=True):
        assert [c.index for c in rollouts] == list(range(sizes))
        assert {(s.version, s.start) for c in rollouts for s in c.weights} == {(0, 0)}
    asked_for = [b for server in servers for b in server.requests]
    assert sum(b["sampling_params"]["n"] for b in asked_for) == 92
    assert len({b["request_id"] for b in asked_for}) == len(asked_for)


async def test_a_greedy_rollout_stands_for_its_group(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """VLLM makes one only; every index arrives."""
    (found,) = await all_of(pool, group(num_rollouts=4, temperature=0.0))
    assert [c.index for c in found] == [0, 1, 2, 3]
    (body,) = [b for server in servers for b in server.requests]
    assert body["sampling_params"]["n"] == 1


async def test_a_server_that_breaks_off_costs_what_is_missing(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """Connections that break before, between and after rollouts."""
    servers[0].cuts = [0, 1, 3, 0, 2]
    servers[1].cuts = [2, 0, 1]
    assert tokens(await all_of(pool, *GROUPS)) == await expected()


async def test_a_server_that_goes_away_and_comes_back(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """The other does its work; back, it takes its share again."""
    servers[0].gate.clear()
    asked = asyncio.ensure_future(all_of(pool, *GROUPS))
    await until(lambda: servers[0].open > 0)
    await servers[0].stop()
    assert tokens(await asked) == await expected()
    await until(lambda: pool.status().replicas == 1)
    servers[0].gate.set()
    await servers[0].start()
    await until(lambda: pool.status().replicas == 2)
    before = len(servers[0].requests)
    await all_of(pool, *GROUPS)
    assert len(servers[0].requests) > before


async def test_a_server_that_hangs_is_taken_out(pool: ReplicaPool, servers: list[VllmLike]) -> None:
    """Its health says so, although its connections stay."""
    servers[1].gate.clear()
    servers[1].healthy = False
    assert tokens(await all_of(pool, *GROUPS)) == await expected()
    await until(lambda: pool.status().replicas == 1)


async def test_busy_and_broken_answers_are_tried_again(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """503 on the same server after a pause, 500 and garbage elsewhere."""
    servers[0].statuses = [503, 503, 500, 429]
    servers[1].bodies = [
        b"data: nonsense\n\n",
        b"data: []\n\n",
        b'data: {"choices": 3}\n\n',
        b'data: {"choices": [{"index": 0, "token_ids": [1, 2], "finish_reason": "stop"}]}\n\n',
        b'data: {"choices": [{"index": 99, "token_ids": []}]}\n\n',
        b"data: [DONE]\n\n",
        b'data: {"error": {"message": "engine error"}}\n\n',
    ]
    assert tokens(await all_of(pool, *GROUPS)) == await expected()
    assert not servers[0].statuses
    assert not servers[1].bodies


async def test_rollouts_that_a_server_breaks_off_are_made_elsewhere(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """A server that shuts down ends them with "abort", with or without tokens."""

    def aborted(tokens: list[int]) -> bytes:
        logprobs = {"content": [{"logprob": -1.0} for _ in tokens]}
        choices = [
            {"index": k, "token_ids": tokens, "logprobs": logprobs, "finish_reason": "abort"}
            for k in range(4)
        ]
        return f"data: {json.dumps({'choices': choices})}\n\ndata: [DONE]\n\n".encode()

    servers[0].bodies = [aborted([])]
    servers[1].bodies = [aborted([5])]
    assert tokens(await all_of(pool, *GROUPS)) == await expected()
    assert not servers[0].bodies
    assert not servers[1].bodies


@pytest.mark.parametrize(("token", "size"), [(-1, 64), (64, 64), (2**31, ANY_VOCABULARY)])
def test_a_token_outside_the_vocabulary_is_no_rollout(token: int, size: int) -> None:
    """Whatever the server is, its tokens are the model's."""
    answer = Answer(group(num_rollouts=1), 0, {}, None, size)

    def message(token: int) -> bytes:
        logprobs = {"content": [{"logprob": -1.0}]}
        choice = {"index": 0, "token_ids": [token], "logprobs": logprobs, "finish_reason": "stop"}
        return json.dumps({"choices": [choice]}).encode()

    with pytest.raises(Garbage, match=f"a rollout has token {token};"):
        list(answer.message(message(token)))
    answer = Answer(group(num_rollouts=1), 0, {}, None, size)
    assert [c.token_ids for c in answer.message(message(size - 1))] == [[size - 1]]


async def test_what_a_server_refuses_is_said_per_rollout(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """With its words, at once, and the other groups arrive."""
    bad, good = await all_of(pool, group([64], 3), group([1], 3))
    assert {c.error for c in good} == {""}
    for completion in bad:
        assert completion.error.endswith("400: Token id 64 is out of vocabulary")
        assert completion.token_ids == []
    assert sum(b["token_ids"] == [64] for s in servers for b in s.requests) == 1


async def test_a_refusal_before_the_stream_is_said_too(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """With its status."""
    for server in servers:
        server.statuses = [422] * 9
    (bad,) = await all_of(pool, group(num_rollouts=3))
    assert all(c.error.endswith("422: told to fail") for c in bad)


async def test_a_server_that_always_fails_is_given_up_in_the_end() -> None:
    """The rollouts say why; nobody waits for ever."""
    server = VllmLike()
    await server.start()
    pool = remote_pool([server.url], OPTIONS, POOL)
    await pool.start()
    server.statuses = [500] * 100
    (found,) = await all_of(pool, group(num_rollouts=4))
    assert {c.error for c in found} == {
        f"given up after 21 attempts, last: {server.url}: 500: told to fail"
    }
    await pool.close()
    await server.stop()


async def test_closing_an_iterator_stops_the_servers(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """Connections are closed, and the ids are aborted under vLLM's names for them."""
    for server in servers:
        server.gate.clear()
    stream = pool.generate(group(num_rollouts=1000))
    await until(lambda: all(server.open for server in servers))
    await stream.aclose()
    await until(lambda: not any(server.open for server in servers))
    asked = {f"generate-tokens-{b['request_id']}" for s in servers for b in s.requests}
    await until(lambda: {name for s in servers for name in s.aborted} == asked)
    assert pool.status().running == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale_out": False}, "--enable-scale-out"),
        ({"model": "other"}, "does not serve model 'model'"),
    ],
)
async def test_a_server_that_cannot_be_used_is_said_at_the_start(
    servers: list[VllmLike], change: dict[str, Any], said: str
) -> None:
    """With what to do about it."""
    for server in servers:
        for name, value in change.items():
            setattr(server, name, value)
    options = RemoteOptions("", model="model")
    pool = remote_pool([server.url for server in servers], options, POOL)
    with pytest.raises(ConfigError, match=said):
        await pool.start()
    await pool.close()


async def test_servers_of_two_models_are_not_one_engine(servers: list[VllmLike]) -> None:
    """The second is refused, with both names."""
    servers[1].model = "other"
    pool = remote_pool([server.url for server in servers], OPTIONS, POOL)
    # Whichever answers first is right.
    with suppress(ConfigError):
        await pool.start()
    await until(lambda: "as the others do" in "".join(pool.problems().values()))
    await pool.close()


@pytest.mark.parametrize("url", ["a:8000", "ftp://a", "http://", "http://a|http://a/"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    """Before anything is opened."""
    with pytest.raises(ConfigError, match=r"remote = "):
        remote_pool(url.split("|"), OPTIONS, POOL)


async def test_raw_logprobs_are_no_logprobs_of_what_was_drawn(servers: list[VllmLike]) -> None:
    """They are refused where they differ, and only there."""
    servers[0].logprobs_mode = "raw_logprobs"
    pool = remote_pool([servers[0].url], OPTIONS, POOL)
    await pool.start()
    plain, warm = await all_of(pool, group(), group(temperature=0.7))
    assert {c.error for c in plain} == {""}
    assert all("--logprobs-mode processed_logprobs" in c.error for c in warm)
    await pool.close()


UPDATE = ["pause", "start", "update", "finish", "resume"]


async def test_new_weights_on_every_server(
    pool: ReplicaPool, servers: list[VllmLike], tmp_path: Path
) -> None:
    """In vLLM's order, with rollouts under way, each saying what made it."""
    streams = [pool.generate(each) for each in GROUPS]
    loaded = await pool.load_weights(tmp_path, 7)
    during = [c for stream in streams for c in [c async for c in stream]]
    assert {s.version for c in during for s in c.weights} <= {0, 7}
    assert len(during) == 92
    after = await all_of(pool, *GROUPS)
    assert {s.version for rollouts in after for c in rollouts for s in c.weights} == {7}
    assert pool.status().weight_version == loaded.version == 7
    for server in servers:
        assert server.calls == UPDATE
        assert (server.path, server.dead) == (str(tmp_path), False)


@pytest.mark.parametrize("step", UPDATE[:4])
async def test_an_update_that_fails_leaves_the_old_weights(
    pool: ReplicaPool, servers: list[VllmLike], tmp_path: Path, step: str
) -> None:
    """They are put back before anything is generated; if that fails, nothing is."""
    for server in servers:
        server.failing = {step}
    update = asyncio.ensure_future(pool.load_weights(tmp_path, 7))
    await until(lambda: all(server.calls.count(step) >= 2 for server in servers))
    with pytest.raises(FailedPrecondition):
        await update
    for server in servers:
        server.failing = set()
    found = await all_of(pool, *GROUPS)
    assert {s.version for rollouts in found for c in rollouts for s in c.weights} == {0}
    assert {c.error for rollouts in found for c in rollouts} == {""}
    assert pool.status().weight_version == 0
    for server in servers:
        assert (server.path, server.dead) == ("/models/first", False)


async def test_a_folder_that_is_refused_leaves_the_old_weights(
    pool: ReplicaPool, servers: list[VllmLike], tmp_path: Path
) -> None:
    """Both servers stay; what they said is passed on."""
    await pool.load_weights(tmp_path, 1)
    with pytest.raises(FailedPrecondition, match=r"is not a folder.*the old weights serve"):
        await pool.load_weights(tmp_path / "none", 2)
    assert pool.status().replicas == 2
    (found,) = await all_of(pool, group())
    assert {s.version for c in found for s in c.weights} == {1}
    assert [server.path for server in servers] == [str(tmp_path)] * 2
    await pool.load_weights(tmp_path, 3)
    assert not any(server.dead for server in servers)


async def test_a_server_that_restarts_gets_the_weights_first(
    pool: ReplicaPool, servers: list[VllmLike], tmp_path: Path
) -> None:
    """No rollout of another version is made in between."""
    await pool.load_weights(tmp_path, 5)
    for wait in (False, True):
        await servers[0].restart()
        if wait:
            await until(lambda: servers[0].label == "5")
        found = await all_of(pool, *GROUPS)
        assert {s.version for rollouts in found for c in rollouts for s in c.weights} == {5}
    await until(lambda: pool.status().replicas == 2)


@pytest.mark.parametrize(
    ("rl", "change"),
    [
        (True, {"started_with": "others"}),
        (True, {"root": "/models/other"}),
        (False, {"root": "/models/other"}),
        (False, {"model": "other"}),
    ],
)
async def test_a_server_that_restarts_with_other_weights_does_not_serve(
    servers: list[VllmLike], tmp_path: Path, rl: bool, change: dict[str, str]
) -> None:
    """They are not of the version that rollouts would claim; new weights are."""
    for server in servers:
        server.rl = rl
    pool = remote_pool([server.url for server in servers], OPTIONS, POOL)
    await pool.start()
    await until(lambda: pool.status().replicas == 2)
    await servers[0].stop()
    await until(lambda: pool.status().replicas == 1)
    for name, value in change.items():
        setattr(servers[0], name, value)
    await servers[0].restart()
    wanted = "serve them under one name" if "model" in change else "other weights than version 0"
    await until(lambda: wanted in "".join(pool.problems().values()))
    servers[0].requests.clear()
    assert tokens(await all_of(pool, *GROUPS)) == await expected()
    assert not servers[0].requests
    if rl and "started_with" in change:
        # Given to it by the pool, they are what all serve.
        await pool.load_weights(tmp_path, 3)
        await until(lambda: pool.status().replicas == 2)
        assert servers[0].label == "3"
    await pool.close()


async def test_a_server_that_was_left_paused_does_not_serve(
    pool: ReplicaPool, servers: list[VllmLike]
) -> None:
    """Whoever updated it has gone, and its weights may be torn; resumed, it serves."""
    async with aiohttp.ClientSession() as session:
        for route in ("/pause?mode=keep", "/start_weight_update"):
            await session.post(servers[0].url + route, json={})
        late = remote_pool([server.url for server in servers], OPTIONS, POOL)
        await late.start()
        await until(lambda: "resume it if its weights" in "".join(late.problems().values()))
        assert late.status().replicas == 1
        assert {c.error for c in (await all_of(late, group(num_rollouts=40)))[0]} == {""}
        assert not servers[0].dead
        await session.post(servers[0].url + "/finish_weight_update", json={"weight_version": "0"})
        await session.post(servers[0].url + "/resume", json={})
    await until(lambda: late.status().replicas == 2)
    await late.close()


async def test_without_routes_for_weights_it_says_what_is_missing(
    servers: list[VllmLike], tmp_path: Path
) -> None:
    """And generates all the same."""
    for server in servers:
        server.rl = False
    pool = remote_pool([server.url for server in servers], OPTIONS, POOL)
    await pool.start()
    with pytest.raises(FailedPrecondition, match="VLLM_SERVER_DEV_MODE=1"):
        await pool.load_weights(tmp_path, 1)
    (found,) = await all_of(pool, group(num_rollouts=9))
    assert [c.error for c in found] == [""] * 9
    assert {s.version for c in found for s in c.weights} == {0}
    await pool.close()


async def test_what_is_sent_to_the_transfer_backend_can_be_said(
    servers: list[VllmLike], tmp_path: Path
) -> None:
    """Placeholders are filled in; what prepares the backend is sent before the first."""
    routes = WeightRoutes({"root": "/"}, {"path": "{path}", "options": [{"step": "{version}"}]})
    options = RemoteOptions("", weights=routes)
    pool = remote_pool([servers[0].url], options, POOL)
    await pool.start()
    await pool.load_weights(tmp_path, 1)
    assert servers[0].calls == ["init", *UPDATE]
    assert servers[0].path == str(tmp_path)
    await pool.close()

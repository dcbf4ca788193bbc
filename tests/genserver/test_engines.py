"""The promises of the engine interface, kept by every engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from knapsack_genserver.engine import Engine, FinishReason
from knapsack_genserver.errors import FailedPrecondition, GeneratorError

from small_engines import all_of, group, small_model

END_TOKENS = {"fake": 0, "transformers": 22, "vllm": 22}


async def test_every_rollout_arrives_once(engine: Engine) -> None:
    """With its index, tokens within the limit, a logprob each, a reason and its version."""
    end = END_TOKENS[engine.name]
    sizes = [1, 7, 40, 2]
    groups = [group([k + 1] * (k + 1), n, seed=k, max_tokens=6) for k, n in enumerate(sizes)]
    for size, found in zip(sizes, await all_of(engine, *groups), strict=True):
        assert [c.index for c in found] == list(range(size))
        for c in found:
            assert 1 <= len(c.token_ids) == len(c.logprobs) <= 6
            assert all(p <= 0 for p in c.logprobs)
            assert c.error == ""
            assert end not in c.token_ids[:-1]
            stopped = c.token_ids[-1] == end
            assert c.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert stopped or len(c.token_ids) == 6
            assert [(s.version, s.start, s.end) for s in c.weights] == [(0, 0, len(c.token_ids))]
    assert engine.status().running == engine.status().waiting == 0


async def test_rollouts_depend_on_seed_and_index_alone(engine: Engine) -> None:
    """Alone or in a crowd, whole or in parts: the same tokens; another seed: others."""
    whole = group([5, 6], 12, seed=9)
    (alone,) = await all_of(engine, whole)
    crowd = [group([k % 20 + 1] * (k % 5 + 1), 9, seed=k) for k in range(12)]
    *_, crowded = await all_of(engine, *crowd, whole)
    parts = await all_of(engine, group([5, 6], 5, seed=9), group([5, 6], 7, seed=9, first_index=5))
    tokens = [c.token_ids for c in alone]
    assert [c.token_ids for c in crowded] == tokens
    assert [c.token_ids for part in parts for c in part] == tokens
    assert [c.index for c in parts[1]] == list(range(5, 12))
    (other,) = await all_of(engine, group([5, 6], 12, seed=10))
    assert [c.token_ids for c in other] != tokens
    assert len(set(map(tuple, tokens))) > 1


async def test_stop_tokens_end_a_rollout(engine: Engine) -> None:
    """The stop token is the last one, and only there."""
    stops = frozenset(range(8))
    (found,) = await all_of(engine, group(num_rollouts=30, max_tokens=30, stop_token_ids=stops))
    ends = stops | {END_TOKENS[engine.name]}
    assert any(c.reason is FinishReason.STOP for c in found)
    for c in found:
        assert not ends & set(c.token_ids[:-1])
        assert (c.token_ids[-1] in ends) == (c.reason is FinishReason.STOP)


async def test_groups_may_have_limits_of_their_own(engine: Engine) -> None:
    """Groups batched together keep their own largest length."""
    found = await all_of(engine, *[group(num_rollouts=60, max_tokens=n) for n in (1, 3, 9)])
    for most, rollouts in zip((1, 3, 9), found, strict=True):
        assert max(len(c.token_ids) for c in rollouts) == most
        # The same seed, so the shorter ones are beginnings of the longer ones.
        assert [c.token_ids for c in rollouts] == [c.token_ids[:most] for c in found[-1]]


async def test_closing_an_iterator_ends_its_work(engine: Engine) -> None:
    """The engine soon has nothing left to do, and serves others."""
    stream = engine.generate(group(num_rollouts=5000, max_tokens=50))
    await anext(aiter(stream))
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(aiter(stream))
    (after,) = await all_of(engine, group(num_rollouts=2))
    assert len(after) == 2

    # The next batch begins after the closed one has ended.
    await all_of(engine, group(num_rollouts=1))
    assert engine.status().waiting == 0


async def test_new_weights_serve_or_the_old_ones_do(engine: Engine, tmp_path: Path) -> None:
    """A version is taken whole; a folder that is none leaves everything as it was."""
    (before,) = await all_of(engine, group(num_rollouts=8))
    small_model(seed=1).save_pretrained(tmp_path / "new")
    loaded = await engine.load_weights(tmp_path / "new", 7)
    assert loaded.version == engine.status().weight_version == 7
    (after,) = await all_of(engine, group(num_rollouts=8))
    assert [c.weights[0].version for c in after] == [7] * 8
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    with pytest.raises(FailedPrecondition, match="missing"):
        await engine.load_weights(tmp_path / "missing", 8)
    (same,) = await all_of(engine, group(num_rollouts=8))
    assert [c.token_ids for c in same] == [c.token_ids for c in after]
    assert engine.status().weight_version == 7


async def test_weights_may_change_while_rollouts_run(engine: Engine, tmp_path: Path) -> None:
    """Everything asked for arrives, and says which weights made it."""
    small_model(seed=1).save_pretrained(tmp_path / "new")
    streams = [engine.generate(group([k + 1], 20, seed=k)) for k in range(6)]
    update = asyncio.ensure_future(engine.load_weights(tmp_path / "new", 1))
    found = [c for stream in streams for c in [c async for c in stream]]
    await update
    assert len(found) == 120
    assert {s.version for c in found for s in c.weights} <= {0, 1}
    assert all(not c.error for c in found)


async def test_a_closed_engine_leaves_nobody_waiting(engine: Engine) -> None:
    """Whoever waits is told, and whoever comes later is refused."""
    stream = engine.generate(group(num_rollouts=3000, max_tokens=60))

    async def read() -> int:
        return len([c async for c in stream])

    reader = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    await engine.close()
    if engine.name == "transformers":
        assert await asyncio.wait_for(reader, 30) == 3000
    reader.cancel()
    with pytest.raises(GeneratorError):
        engine.generate(group())

"""What becomes of rollouts under way when weights change, as --update-mode says."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from knapsack_genserver.cli import engine_of
from knapsack_genserver.engine import Completion, FinishReason
from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
from knapsack_genserver.errors import ConfigError, FailedPrecondition

from small_engines import all_of, group, small_model


async def updated_amid_a_batch(
    engine: TransformersEngine, folder: Path
) -> tuple[list[Completion], BaseException | None]:
    """Return 100 rollouts, a folder having been given while the first 64 were being made."""
    loop = asyncio.get_running_loop()
    reached, go_on = asyncio.Event(), threading.Event()
    passes = 0

    def hold(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            loop.call_soon_threadsafe(reached.set)
            assert go_on.wait(60)

    hook = engine._model.register_forward_pre_hook(hold)
    stream = engine.generate(group([1, 2], 100, seed=3, max_tokens=40))
    await reached.wait()
    update = asyncio.ensure_future(engine.load_weights(folder, 1))
    # Until it waits for the batch to end, or has been refused.
    while not (engine._updates or update.done()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    go_on.set()
    found = [c async for c in stream]
    await asyncio.wait([update])
    hook.remove()
    return sorted(found, key=lambda c: c.index), update.exception()


@pytest.mark.parametrize("mode", ["wait", "abort"])
async def test_rollouts_under_way(mode: str, model_folder: Path, tmp_path: Path) -> None:
    """All arrive, of one version each; abort gives up the batch that runs, with its tokens."""
    engine = TransformersEngine(
        TransformersOptions(model_folder, max_batch_rollouts=64, update_mode=mode)
    )
    await engine.start()
    try:
        (before,) = await all_of(engine, group([1, 2], 100, seed=3, max_tokens=40))

        # A folder that cannot be served costs nobody anything.
        found, error = await updated_amid_a_batch(engine, tmp_path)
        assert isinstance(error, FailedPrecondition)
        assert [c.token_ids for c in found] == [c.token_ids for c in before]
        assert {c.reason for c in found} <= {FinishReason.STOP, FinishReason.LENGTH}

        small_model(seed=1).save_pretrained(tmp_path / "new")
        found, error = await updated_amid_a_batch(engine, tmp_path / "new")
        assert error is None
        (after,) = await all_of(engine, group([1, 2], 100, seed=3, max_tokens=40))
    finally:
        await engine.close()
    assert [c.index for c in found] == list(range(100))
    assert [c.weights[0].version for c in found] == [0] * 64 + [1] * 36
    given_up = [c for c in found if c.reason is FinishReason.ABORT]
    assert bool(given_up) == (mode == "abort")
    for c, old, new in zip(found, before, after, strict=True):
        assert [(s.start, s.end) for s in c.weights] == [(0, len(c.token_ids))]
        assert len(c.logprobs) == len(c.token_ids) > 0
        whole = (old if c.weights[0].version == 0 else new).token_ids
        if c in given_up:
            # The prompt is cached: a token, and one per pass that had begun.
            assert len(c.token_ids) == 6 < len(whole)
        assert c.token_ids == whole[: len(c.token_ids)]
        assert (len(c.token_ids) == len(whole)) == (c not in given_up)


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--engine=transformers", "--update-mode=keep"], "transformers it is wait or abort"),
        (["--engine=remote", "--remote=http://a", "--update-mode=abort"], "remote it is keep"),
        (
            ["--engine=ray", "--replica-engine=transformers", "--update-mode=keep"],
            "transformers it is wait or abort",
        ),
    ],
)
def test_a_mode_that_the_engine_does_not_have(flags: list[str], allowed: str) -> None:
    """Refused when the server starts, with those it has."""
    with pytest.raises(ConfigError, match=allowed):
        engine_of(["serve", "--model=/m", *flags])

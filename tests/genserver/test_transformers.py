"""The transformers engine draws what the model says, checked against the model itself."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch

from knapsack_genserver.engines import transformers as transformers_engine
from knapsack_genserver.engines.prefixes import Prefix, PrefixCache
from knapsack_genserver.engines.transformers import TransformersEngine, TransformersOptions
from knapsack_genserver.errors import ConfigError, FailedPrecondition, InvalidArgument
from knapsack_genserver.tokenizers import FolderTokenizer
from knapsack_genserver.weights import read_folder

from small_engines import END, VOCABULARY, all_of, group, small_model

# Quantile 0.999999 of the chi-square distribution: one false alarm in a million.
CHI_SQUARE_LIMIT = {VOCABULARY - 1: 70.2}


@pytest.fixture
async def engine(model_folder: Path):
    """A started engine."""
    made = TransformersEngine(TransformersOptions(model_folder, max_batch_rollouts=64))
    await made.start()
    yield made
    await made.close()


def reference(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the scores of each token's place, by one plain forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].double()


async def test_logprobs_are_the_models_own(engine: TransformersEngine, model: Any) -> None:
    """With prompts of many lengths in one batch, so padding and cache change nothing."""
    prompts = [[(7 * k + j) % 20 for j in range(1 + 3 * k)] for k in range(8)]
    groups = [group(p, 6, seed=k, max_tokens=12) for k, p in enumerate(prompts)]
    for prompt, found in zip(prompts, await all_of(engine, *groups), strict=True):
        for c in found:
            scores = reference(model, prompt, c.token_ids).log_softmax(dim=-1)
            expected = scores.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
            assert np.allclose(c.logprobs, expected, atol=2e-4)


async def test_temperature_0_takes_the_most_probable_token(
    engine: TransformersEngine, model: Any
) -> None:
    """As a plain greedy loop over the model does."""
    for prompt in ([3], [1, 2, 3, 4, 5, 6, 7]):
        (found,) = await all_of(engine, group(prompt, 2, temperature=0.0, max_tokens=10))
        tokens: list[int] = []
        while len(tokens) < 10 and tokens[-1:] != [END]:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert [c.token_ids for c in found] == [tokens, tokens]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}],
    ids=str,
)
async def test_tokens_come_as_often_as_they_should(
    engine: TransformersEngine, model: Any, options: dict[str, float]
) -> None:
    """First tokens of 4000 rollouts against the model's distribution, by chi-square."""
    prompt, size = [4, 8], 4000
    (found,) = await all_of(engine, group(prompt, size, max_tokens=1, **options))
    scores = reference(model, prompt, [0])[0] / options.get("temperature", 1.0)
    order = scores.argsort(descending=True)
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    allowed[order[: options.get("top_k") or VOCABULARY]] = True
    kept = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)[order]
    kept[kept.cumsum(0) - kept >= options.get("top_p", 1.0)] = 0.0
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected[order] = kept / kept.sum()

    tokens = np.array([c.token_ids[0] for c in found])
    counts = np.bincount(tokens, minlength=VOCABULARY)
    likely = expected.numpy() > 0
    assert counts[~likely].sum() == 0
    wanted = expected.numpy()[likely] * size
    statistic = ((counts[likely] - wanted) ** 2 / wanted).sum()
    assert statistic < CHI_SQUARE_LIMIT[VOCABULARY - 1]
    # What is reported is under what was drawn from.
    logprobs = np.array([c.logprobs[0] for c in found])
    assert np.allclose(logprobs, np.log(expected.numpy()[tokens]), atol=2e-4)


async def test_a_group_larger_than_a_batch_is_continued(engine: TransformersEngine) -> None:
    """And small groups of other requests do not wait for all of it."""
    large = engine.generate(group([1], 1000, seed=1, request=1, max_tokens=20))
    small = engine.generate(group([2], 3, seed=2, request=2, max_tokens=20))
    found = [c async for c in small]
    left = engine.status().waiting
    assert len(found) == 3
    assert left > 500
    assert len([c async for c in large]) == 1000


async def test_a_failing_forward_pass_fails_its_rollouts_only(
    engine: TransformersEngine, model: Any
) -> None:
    """Those not handed out yet arrive with the error, none twice; the next batch is fine."""
    steps = itertools.count()
    forward = engine._model.forward

    def failing(*args: Any, **options: Any) -> Any:
        if next(steps) == 4:
            raise RuntimeError("out of memory, say")
        return forward(*args, **options)

    engine._model.forward = failing
    (found,) = await all_of(engine, group([1, 2], 40, max_tokens=12, seed=5))
    assert [c.index for c in found] == list(range(40))
    failed = [c for c in found if c.error]
    assert 0 < len(failed) < 40
    assert all("out of memory, say" in c.error for c in failed)
    assert all(len(c.token_ids) <= 4 for c in found if not c.error)
    (after,) = await all_of(engine, group([1, 2], 5))
    assert not any(c.error for c in after)


async def test_updated_weights_are_those_of_the_folder(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    """Logprobs are the new model's, sharded or not, and equal weights have one fingerprint."""
    new = small_model(seed=3)
    new.save_pretrained(tmp_path / "whole")
    new.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    marks = [
        (await engine.load_weights(tmp_path / folder, version)).fingerprint
        for version, folder in enumerate(("whole", "shards"), 1)
    ]
    assert marks[0] == marks[1]
    (found,) = await all_of(engine, group([9, 1], 5))
    for c in found:
        scores = reference(new, [9, 1], c.token_ids).log_softmax(dim=-1)
        expected = scores.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        assert np.allclose(c.logprobs, expected, atol=2e-4)
    small_model(seed=4).save_pretrained(tmp_path / "other")
    assert (await engine.load_weights(tmp_path / "other", 3)).fingerprint != marks[0]


def break_shape(tensors: dict[str, torch.Tensor]) -> str:
    """Cut a row off."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    return "lm_head.weight: has shape"


def break_number(tensors: dict[str, torch.Tensor]) -> str:
    """Put a NaN in."""
    tensors["model.norm.weight"][3] = torch.nan
    return "model.norm.weight: holds numbers that are not finite"


def lose_one(tensors: dict[str, torch.Tensor]) -> str:
    """Leave one out."""
    del tensors["model.norm.weight"]
    return "model.norm.weight: is missing"


def add_one(tensors: dict[str, torch.Tensor]) -> str:
    """Add one that the model does not have."""
    tensors["adapter.weight"] = torch.zeros(2)
    return "adapter.weight: the model has no tensor"


def make_integers(tensors: dict[str, torch.Tensor]) -> str:
    """Make one of integers."""
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    return "model.norm.weight: is of torch.int32"


@pytest.mark.parametrize("harm", [break_shape, break_number, lose_one, add_one, make_integers])
async def test_wrong_weights_change_nothing(
    engine: TransformersEngine, tmp_path: Path, model_folder: Path, harm: Any
) -> None:
    """The tensor is named, and the old weights serve to the bit."""
    from safetensors.torch import save_file

    (before,) = await all_of(engine, group(num_rollouts=6))
    small_model(seed=3).save_pretrained(tmp_path)
    tensors = read_folder(tmp_path)
    message = harm(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FailedPrecondition) as refused:
        await engine.load_weights(tmp_path, 5)
    assert str(refused.value).startswith(message)
    (after,) = await all_of(engine, group(num_rollouts=6))
    assert after == before


async def test_files_that_are_not_whole_are_refused(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    """A half-written file, an empty folder, a file that is no folder."""
    small_model(seed=3).save_pretrained(tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "half", tmp_path / "empty", file):
        with pytest.raises(FailedPrecondition, match="path = "):
            await engine.load_weights(path, 1)


async def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """A model whose output layer is its embedding is updated as a whole."""
    small_model(tied=True).save_pretrained(tmp_path / "old")
    new = small_model(seed=1, tied=True)
    new.save_pretrained(tmp_path / "new")
    engine = TransformersEngine(TransformersOptions(tmp_path / "old"))
    await engine.start()
    await engine.load_weights(tmp_path / "new", 1)
    (found,) = await all_of(engine, group([5], 3))
    for c in found:
        scores = reference(new, [5], c.token_ids).log_softmax(dim=-1)
        expected = scores.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        assert np.allclose(c.logprobs, expected, atol=2e-4)
    await engine.close()


async def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """No folder, no config, a broken config."""
    with pytest.raises(ConfigError, match=r"no config\.json"):
        await TransformersEngine(TransformersOptions(tmp_path)).start()
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        await TransformersEngine(TransformersOptions(tmp_path)).start()


async def test_many_readers_at_once(engine: TransformersEngine) -> None:
    """Concurrent groups of unequal sizes all end, whichever is read first."""
    streams = [engine.generate(group([k + 1], 1 + 7 * k % 40, seed=k)) for k in range(20)]

    async def read(stream: Any) -> int:
        return len([c async for c in stream])

    counts = await asyncio.gather(*[read(s) for s in reversed(streams)])
    assert counts[::-1] == [1 + 7 * k % 40 for k in range(20)]


async def test_a_prompt_is_prefilled_once_for_chunks_and_waves(
    engine: TransformersEngine, model: Any, tmp_path: Path
) -> None:
    """In the same batch, in a later one and beside new prompts, and the tokens are the same."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    whole = await all_of(engine, *[group(p, 12, seed=k) for k, p in enumerate(prompts)])
    assert (engine.status().prefix_queried_tokens, engine.status().prefix_hit_tokens) == (9, 0)
    prefilled = []
    forward = engine._model.forward

    def counting(*args: Any, **options: Any) -> Any:
        if options.get("logits_to_keep"):
            prefilled.append(options["input_ids"].tolist())
        return forward(*args, **options)

    engine._model.forward = counting
    again = await all_of(
        engine,
        group(prompts[0], 12, seed=0),
        group([9, 8], 3, seed=7),
        group([9, 8], 4, seed=7, first_index=3),
        group(prompts[2], 5, seed=2),
    )
    assert [c.token_ids for c in again[0]] == [c.token_ids for c in whole[0]]
    assert [c.token_ids for c in again[3]] == [c.token_ids for c in whole[2][:5]]
    assert prefilled == [[[9, 8]]]
    assert (engine.status().prefix_queried_tokens, engine.status().prefix_hit_tokens) == (21, 10)
    for c in again[1] + again[2]:
        scores = reference(model, [9, 8], c.token_ids).log_softmax(dim=-1)
        expected = scores.gather(-1, torch.tensor(c.token_ids)[:, None]).squeeze(-1)
        assert np.allclose(c.logprobs, expected, atol=2e-4)

    # Other weights make something else of a prompt.
    small_model(seed=3).save_pretrained(tmp_path / "new")
    await engine.load_weights(tmp_path / "new", 1)
    await all_of(engine, group([9, 8], 3, seed=7))
    assert prefilled[1:] == [[[9, 8]]]


def test_prefixes_are_bounded_by_their_tokens() -> None:
    """The least recently used go first; one that never fits is not kept."""
    cache = PrefixCache(10)
    prefix = Prefix([], torch.zeros(1))
    first, second, third, large = (1,) * 4, (2,) * 4, (3,) * 4, (4,) * 11
    cache.keep({first: prefix, second: prefix, large: prefix})
    assert set(cache.look_up([first, second, large])) == {first, second}
    cache.look_up([first])
    cache.keep({third: prefix})
    assert set(cache.look_up([first, second, third])) == {first, third}
    cache.clear()
    assert not cache.look_up([first, third])


async def test_a_batch_that_cannot_be_made_fails_its_rollouts_only(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is not there is no reason for the engine to stop."""

    def refuse(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(transformers_engine, "_Batch", refuse)
        (failed,) = await all_of(engine, group([1, 2], 3))
    assert [c.error for c in failed] == ["MemoryError: no room"] * 3
    (found,) = await all_of(engine, group([1, 2], 3))
    assert not any(c.error for c in found)


def test_a_conversation_that_the_template_refuses_is_the_callers() -> None:
    """Many templates raise for a role that they do not have."""

    class Refusing:
        chat_template = "{{ raise_exception('System role not supported') }}"

        def apply_chat_template(self, *_: object, **__: object) -> str:
            raise jinja2.TemplateError("System role not supported")

    with pytest.raises(InvalidArgument, match="System role not supported"):
        FolderTokenizer(Refusing()).encode_chat([("system", "be kind"), ("user", "hello")])

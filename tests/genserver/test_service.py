"""The calls of the generation server: what they answer and what they refuse."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from knapsack_genserver.admission import AdmissionLimits
from knapsack_genserver.engines.fake import FakeEngine
from knapsack_genserver.errors import (
    FailedPrecondition,
    GeneratorError,
    InvalidArgument,
    ResourceExhausted,
)
from knapsack_genserver.events import Events, GroupCompleted, RolloutDelivered
from knapsack_genserver.service import GeneratorService
from knapsack_genserver.tokenizers import load_tokenizer
from knapsack_proto.v1 import generation_pb2 as pb

NAN = math.nan


def tokens(*ids: int) -> pb.Prompt:
    """Return a prompt of tokens."""
    return pb.Prompt(tokens=pb.TokenIds(ids=ids))


def request(sizes: list[int], **sampling: Any) -> pb.GenerateRequest:
    """Return a request with a prompt per size."""
    return pb.GenerateRequest(
        prompts=[tokens(k % 60 + 1) for k in range(len(sizes))],
        num_rollouts=sizes,
        sampling=pb.SamplingParams(**{"max_tokens": 5, "seed": 3, **sampling}),
    )


async def rollouts(service: GeneratorService, message: pb.GenerateRequest) -> list[pb.Rollout]:
    """Return every rollout of a request."""
    return [rollout async for rollout in service.generate(message)]


@pytest.mark.parametrize(
    "sizes", [[3], [1, 0, 128, 2, 0, 7], [0, 0], [64] * 20, [1] * 300], ids=str
)
async def test_each_prompt_gets_as_many_as_asked(sizes: list[int]) -> None:
    """Wildly unequal, none twice, none for another prompt; events count the same."""
    events, seen = Events(), []
    events.listen(seen.append)
    service = GeneratorService(FakeEngine(), events)
    found = await rollouts(service, request(sizes))
    assert Counter((r.prompt_index, r.rollout_index) for r in found) == Counter(
        (at, k) for at, n in enumerate(sizes) for k in range(n)
    )
    assert sorted(e.rollouts for e in seen if isinstance(e, GroupCompleted)) == sorted(
        n for n in sizes if n
    )
    assert sum(isinstance(e, RolloutDelivered) for e in seen) == sum(sizes)
    assert service.admitted_rollouts == 0


async def test_a_seed_makes_a_request_repeatable() -> None:
    """With the same seed the same tokens; without one others each time."""
    service = GeneratorService(FakeEngine(), Events())

    def drawn(found: list[pb.Rollout]) -> list[tuple[int, ...]]:
        found.sort(key=lambda r: (r.prompt_index, r.rollout_index))
        return [tuple(r.token_ids) for r in found]

    first, again, other = [
        drawn(await rollouts(service, request([4, 9], seed=seed))) for seed in (3, 3, 4)
    ]
    assert first == again != other
    unseeded = request([4, 9])
    unseeded.sampling.ClearField("seed")
    one, two = [drawn(await rollouts(service, unseeded)) for _ in range(2)]
    assert one != two


async def test_failed_rollouts_are_delivered_as_such() -> None:
    """With the reason, and the others of their group beside them."""
    engine = FakeEngine(fails=lambda group, index: index % 3 == 1)
    found = await rollouts(GeneratorService(engine, Events()), request([7]))
    failed = {r.rollout_index for r in found if r.error}
    assert failed == {1, 4}
    for r in found:
        assert (r.finish_reason == pb.FINISH_REASON_ERROR) == bool(r.error)
        assert bool(r.token_ids) != bool(r.error)


async def test_a_reader_that_leaves_frees_its_place() -> None:
    """Closed in the middle or before the first rollout, nothing stays admitted."""
    hold = asyncio.Event()
    engine = FakeEngine(hold=hold)
    service = GeneratorService(engine, Events(), admission=AdmissionLimits(waiting_rollouts=100))
    stream = service.generate(request([60, 40]))
    first = asyncio.ensure_future(anext(stream))
    # Until the groups have started and the reader waits for them.
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.status().running == 100
    assert service.admitted_rollouts == 100
    with pytest.raises(ResourceExhausted, match="at most 100"):
        await rollouts(service, request([1]))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await stream.aclose()
    assert service.admitted_rollouts == 0
    assert engine.status().running == 0
    hold.set()
    stream = service.generate(request([60, 40]))
    await anext(stream)
    await stream.aclose()
    assert service.admitted_rollouts == 0
    assert len(await rollouts(service, request([100]))) == 100


GENERATE = [
    ({"prompts": []}, "prompts", "at least one"),
    ({"num_rollouts": [1]}, "num_rollouts", "one per prompt (2)"),
    ({"num_rollouts": [1, -1]}, "num_rollouts[1]", "from 0"),
    ({"num_rollouts": [1, 10**6]}, "num_rollouts[1]", "to 100000"),
    ({"prompts": [tokens(1), pb.Prompt()]}, "prompts[1]", "tokens, text or chat"),
    ({"prompts": [tokens(1), tokens()]}, "prompts[1].tokens.ids", "at least one token"),
    ({"prompts": [tokens(1), tokens(3, 64)]}, "prompts[1].tokens.ids[1]", "from 0 to 63"),
    ({"prompts": [tokens(1), tokens(-1)]}, "prompts[1].tokens.ids[0]", "from 0"),
    ({"prompts": [tokens(1), pb.Prompt(text="hi")]}, "prompts[1].text", "tokenizer"),
    ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens", "1 or more"),
    ({"sampling": {}}, "sampling.max_tokens", "is needed"),
    (
        {"sampling": {"max_tokens": 1, "temperature": -1}},
        "sampling.temperature",
        "0, or 0.01 or more",
    ),
    (
        {"sampling": {"max_tokens": 1, "temperature": NAN}},
        "sampling.temperature",
        "0, or 0.01 or more",
    ),
    ({"sampling": {"max_tokens": 1, "top_p": 0}}, "sampling.top_p", "above 0"),
    ({"sampling": {"max_tokens": 1, "top_p": 1.5}}, "sampling.top_p", "at most 1"),
    ({"sampling": {"max_tokens": 1, "top_k": -1}}, "sampling.top_k", "0 or more"),
    ({"sampling": {"max_tokens": 1, "stop_token_ids": [64]}}, "sampling.stop_token_ids[0]", "63"),
]


@pytest.mark.parametrize(
    ("change", "field", "allowed"), GENERATE, ids=lambda value: str(value)[:40]
)
async def test_a_wrong_field_is_named(change: dict[str, Any], field: str, allowed: str) -> None:
    """Before anything is generated."""
    engine = FakeEngine()
    service = GeneratorService(engine, Events())
    message = request([1, 1])
    for name, value in change.items():
        message.ClearField(name)
        message.MergeFrom(pb.GenerateRequest(**{name: value}))
    with pytest.raises(InvalidArgument) as refused:
        await rollouts(service, message)
    assert str(refused.value).startswith(f"{field} = ")
    assert allowed in str(refused.value)
    assert service.admitted_rollouts == 0


async def test_weights_must_lie_in_their_root(tmp_path: Path) -> None:
    """Also through links and dots; a folder that is not there is said to be missing."""
    root = tmp_path / "weights"
    (root / "one").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    service = GeneratorService(FakeEngine(), Events(), weights_root=root)

    async def update(path: str, version: int = 1) -> pb.WeightStatus:
        return await service.update_weights(
            pb.UpdateWeightsRequest(path=path, weight_version=version)
        )

    status = await update(str(root / "one"), 4)
    assert (status.weight_version, status.fingerprint) == (4, "fake-4")
    for path in (tmp_path / "outside", root / "link", root / ".." / "outside"):
        with pytest.raises(InvalidArgument, match="must lie in"):
            await update(str(path))
    for path in ("", "a\0b"):
        with pytest.raises(InvalidArgument, match="path = "):
            await update(path)
    with pytest.raises(InvalidArgument, match="weight_version = -1"):
        await update(str(root / "one"), -1)
    with pytest.raises(FailedPrecondition, match="is not a folder"):
        await update(str(root / "two"))
    assert (await service.get_status(pb.GetStatusRequest())).weight_version == 4


async def test_texts_and_chats_go_through_the_models_tokenizer(tmp_path: Path) -> None:
    """As its own template says, and completions come back as text."""
    tokenizer = text_tokenizer(tmp_path)
    engine = FakeEngine()
    engine.tokenizer = tokenizer
    service = GeneratorService(engine, Events())
    message = pb.GenerateRequest(
        prompts=[
            pb.Prompt(text="one two"),
            pb.Prompt(
                chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="three")])
            ),
        ],
        num_rollouts=[2, 2],
        sampling=pb.SamplingParams(max_tokens=4, seed=1),
    )
    found = await rollouts(service, message)
    assert len(found) == 4
    for r in found:
        assert r.text == tokenizer.decode(list(r.token_ids))
    assert tokenizer.encode("one two") == [1, 2]
    assert tokenizer.encode_chat([("user", "three")]) == [4, 3, 5]
    message.prompts[1].chat.ClearField("messages")
    with pytest.raises(InvalidArgument, match="messages"):
        await rollouts(service, message)


def text_tokenizer(folder: Path) -> Any:
    """Return a tokenizer of a few words with a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "one", "two", "three", "<user>", "<assistant>"]
    plain = Tokenizer(
        WordLevel({w: i for i, w in enumerate(words + [f"w{i}" for i in range(58)])}, "[UNK]")
    )
    plain.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fast.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return loaded


def test_every_error_has_a_status() -> None:
    """The tree's codes are gRPC's."""
    import grpc

    kinds = [GeneratorError]
    for kind in kinds:
        assert kind.code in grpc.StatusCode.__members__
        kinds += kind.__subclasses__()

"""A real generation server under mutated requests: the right refusal, and no crash."""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError

from knapsack_proto.v1 import generation_pb2 as pb

from mutations import changed_bytes, changed_values

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "4000")) // 2
PIPELINE = 16
SERVICE = pb.DESCRIPTOR.services_by_name["RolloutGenerator"]
GENERATE = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Ours: a right request may be longer than a fuzzer waits.
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
CODES = {
    "Generate": GENERATE,
    "GenerateSession": GENERATE,
    "UpdateWeights": frozenset(
        {
            grpc.StatusCode.OK,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        }
    ),
    "GetStatus": frozenset({grpc.StatusCode.OK}),
    # These servers are one process each.
    "SetReplicas": frozenset(
        {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
    ),
}
OFTEN = {"Generate": 4, "GenerateSession": 6}
INVALID = frozenset({grpc.StatusCode.INVALID_ARGUMENT})

_TEXT = ["", "x", "/", "/tmp", "../..", "\x00", "a" * 5000, "\u202e\U0001f600", "%s%n{}"]
_INTS = [0, 1, -1, 2, 7, 63, 64, 100_001, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63)]
_FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]


class Fuzzer:
    """Draws calls; the same seed draws the same calls."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def next(self) -> tuple[str, list[bytes], bool]:
        """Return a method, its messages, and whether they can be read."""
        names = [method.name for method in SERVICE.methods]
        method = self.draw.choices(names, [OFTEN.get(name, 1) for name in names])[0]
        messages = self._right(method)
        kind = self.draw.randrange(8)
        if 1 <= kind <= 6:
            for _ in range(self.draw.randrange(1, 4)):
                self._odd(self.draw.choice(messages))
        data = [message.SerializeToString() for message in messages]
        readable = True
        if kind == 7:
            at = self.draw.randrange(len(data))
            data[at] = changed_bytes(self.draw, data[at])
            try:
                type(messages[at]).FromString(data[at])
            except DecodeError:
                readable = False
        return method, data, readable

    def _right(self, method: str) -> list[Any]:
        draw = self.draw
        params = pb.SamplingParams(max_tokens=draw.randrange(1, 9), seed=draw.randrange(9))
        sizes = [draw.randrange(6) for _ in range(draw.randrange(1, 5))]
        if method == "Generate":
            return [
                pb.GenerateRequest(
                    request_id="f",
                    prompts=[self._prompt() for _ in sizes],
                    num_rollouts=sizes,
                    sampling=params,
                    expected_tokens=sizes if draw.random() < 0.5 else [],
                )
            ]
        if method == "GenerateSession":
            opening = pb.OpenSession(request_id="f", sampling=params)
            requests = [pb.GenerateSessionRequest(open=opening)]
            known = 0
            for _ in range(draw.randrange(5)):
                if known and draw.random() < 0.3:
                    stop = pb.StopGroups(prompt_indices=[draw.randrange(known)])
                    requests.append(pb.GenerateSessionRequest(stop=stop))
                    continue
                new = [self._prompt() for _ in range(draw.randrange(3))]
                known += len(new)
                add = pb.AddRollouts(
                    prompts=new, num_rollouts=[draw.randrange(6) for _ in range(known)]
                )
                requests.append(pb.GenerateSessionRequest(add=add))
            return requests
        if method == "UpdateWeights":
            return [pb.UpdateWeightsRequest(path="/tmp", weight_version=draw.randrange(9))]
        if method == "SetReplicas":
            return [pb.SetReplicasRequest(replicas=draw.randrange(9))]
        return [pb.GetStatusRequest()]

    def _prompt(self) -> pb.Prompt:
        ids = [self.draw.randrange(23) for _ in range(self.draw.randrange(1, 6))]
        return pb.Prompt(prompt_id="p", tokens=pb.TokenIds(ids=ids))

    def _odd(self, message: Any) -> None:
        """Set a field somewhere in a message to something odd."""
        draw = self.draw
        if not message.DESCRIPTOR.fields:
            return
        field = draw.choice(message.DESCRIPTOR.fields)
        if field.message_type is not None:
            if not field.is_repeated:
                self._odd(getattr(message, field.name))
                return
            inner = getattr(message, field.name)
            action = draw.randrange(4)
            if action == 0:
                inner.add()
            elif action == 1 and inner:
                del inner[draw.randrange(len(inner)) :]
            elif inner:
                self._odd(inner[draw.randrange(len(inner))])
            return
        fitting = self._values(field)
        if not field.is_repeated:
            setattr(message, field.name, draw.choice(fitting))
            return
        values = changed_values(draw, getattr(message, field.name), fitting)
        message.ClearField(field.name)
        getattr(message, field.name).extend(values)

    def _values(self, field: Any) -> list[Any]:
        if field.cpp_type == field.CPPTYPE_STRING:
            return _TEXT
        if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            return _FLOATS
        bounds = {
            field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
            field.CPPTYPE_ENUM: (0, 3),
            field.CPPTYPE_UINT64: (0, 2**64 - 1),
        }
        least, most = bounds.get(field.cpp_type, (-(2**63), 2**63 - 1))
        return [value for value in _INTS if least <= value <= most]


async def call(
    channel: grpc.aio.Channel, method: str, data: list[bytes]
) -> tuple[grpc.StatusCode, str, list[bytes]]:
    """Make a call; returns its status, what it says, and the answers."""
    path = f"/{SERVICE.full_name}/{method}"
    answers: list[bytes] = []
    try:
        if method == "GenerateSession":

            async def requests() -> AsyncIterator[bytes]:
                for message in data:
                    yield message

            async for answer in channel.stream_stream(path)(requests(), timeout=3):
                answers.append(answer)
        elif method == "Generate":
            async for answer in channel.unary_stream(path)(data[0], timeout=3):
                answers.append(answer)
        else:
            answers.append(await channel.unary_unary(path)(data[0], timeout=60))
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", answers
    return grpc.StatusCode.OK, "", answers


def is_whole(method: str, data: list[bytes], answers: list[bytes]) -> bool:
    """Say whether what came is what was asked for: every rollout once, or stopped."""
    found: list[tuple[int, int]] = []
    if method == "Generate":
        request = pb.GenerateRequest.FromString(data[0])
        wanted = Counter(dict(enumerate(request.num_rollouts)))
        for answer in answers:
            rollout = pb.Rollout.FromString(answer)
            found.append((rollout.prompt_index, rollout.rollout_index))
    elif method == "GenerateSession":
        wanted = Counter()
        prompts = 0
        responses = [pb.GenerateSessionResponse.FromString(answer) for answer in answers]
        replies = [answer for response in responses for answer in response.answers]
        requests = [pb.GenerateSessionRequest.FromString(each) for each in data[1:]]
        if len(replies) != len(requests):
            return False
        for request, reply in zip(requests, replies, strict=True):
            assert reply.code in (0, *[c.value[0] for c in GENERATE]), reply
            add = request.add
            if reply.code == 0 and request.HasField("add"):
                prompts += len(add.prompts)
                at = add.prompt_indices or range(prompts)
                wanted.update(dict(zip(at, add.num_rollouts, strict=True)))
            for group in reply.stopped_groups:
                found += [(group.prompt_index, index) for index in group.rollout_indices]
        for response in responses:
            found += [(r.prompt_index, r.rollout_index) for r in response.rollouts]
    else:
        return True
    return sorted(found) == [(at, k) for at, n in sorted(wanted.items()) for k in range(n)]


async def fuzz(address: str, seed: int, requests: int) -> Counter[tuple[str, str]]:
    """Make calls, several at a time; returns how often each method had which status."""
    fuzzer = Fuzzer(seed)
    seen: Counter[tuple[str, str]] = Counter()
    wrong: list[Any] = []
    async with grpc.aio.insecure_channel(address) as channel:

        async def worker() -> None:
            for _ in range(requests // PIPELINE):
                method, data, readable = fuzzer.next()
                code, details, answers = await call(channel, method, data)
                seen[method, code.name] += 1
                codes = CODES[method] if readable else INVALID
                # A session was refused while we wrote to it; the server's own count of
                # INTERNAL is looked at in the end.
                interrupted = method == "GenerateSession" and details == "Internal error from Core"
                if code not in codes and not interrupted:
                    wrong.append((method, data, code, details))
                elif code is grpc.StatusCode.OK and not is_whole(method, data, answers):
                    wrong.append((method, data, "not whole", len(answers)))

        async with asyncio.TaskGroup() as group:
            for _ in range(PIPELINE):
                group.create_task(worker())
    assert not wrong, wrong[:3]

    return seen


@pytest.mark.parametrize("engine", ["fake", "transformers"])
def test_mutated_requests_are_refused_rightly(
    start_generator: Any, model_folder: Any, engine: str
) -> None:
    """Nothing is INTERNAL or UNKNOWN, an OK answer is whole, and the server is idle after."""
    flags = ["--engine=fake"] if engine == "fake" else [f"--model={model_folder}", "--threads=1"]
    generator = start_generator(*flags, "--max-call-rollouts=300", "--log-level=error")
    count = REQUESTS if engine == "fake" else REQUESTS // 10
    seen = asyncio.run(fuzz(generator.addresses["listen"], 1, count))
    for method in ("Generate", "GenerateSession"):
        assert seen[method, "OK"] > count // 50
        assert seen[method, "INVALID_ARGUMENT"] > count // 50
    assert generator.process.poll() is None
    assert "Traceback" not in generator.log()
    with urllib.request.urlopen(f"http://{generator.addresses['admin']}/metrics") as answer:
        text = answer.read().decode()
    assert 'code="INVALID_ARGUMENT"' in text
    assert 'code="INTERNAL"' not in text

    async def idle() -> pb.GeneratorStatus:
        async with grpc.aio.insecure_channel(generator.addresses["listen"]) as channel:
            code, _, answers = await call(channel, "GetStatus", [b""])
            assert code is grpc.StatusCode.OK
            return pb.GeneratorStatus.FromString(answers[0])

    # Calls that the fuzzer has left are still being ended.
    end = time.monotonic() + 60
    while asyncio.run(idle()).waiting_rollouts:
        assert time.monotonic() < end

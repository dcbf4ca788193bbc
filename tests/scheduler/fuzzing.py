"""Requests to test the server with: right ones of every method, and mutations of them.

A mutation is one of three: a field set to what is never allowed, which must be refused as
INVALID_ARGUMENT; a field set to something odd, which may be right or wrong; or bytes changed
on the wire.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from knapsack_proto.v1 import scheduler_pb2 as pb

from mutations import changed_bytes, changed_values

SERVICE = pb.DESCRIPTOR.services_by_name["BudgetScheduler"]
REFUSALS = frozenset(
    {
        *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
        *(grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
INVALID = frozenset({grpc.StatusCode.INVALID_ARGUMENT})

_ODD_TEXT = ["", "x", "*", "\u202e\U0001f600", "../..", "' OR 1=1 --", "\x00", "a" * 300, "%s%n{}"]
_ODD_INTS = [0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31), 2**53, 2**63 - 1, -(2**63)]
_ODD_FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]


@dataclass(frozen=True)
class Fuzzed:
    """A call to make.

    Attributes:
        method: name of the RPC.
        data: its serialised messages, more than one for streams only.
        codes: statuses that are right.
        what: how it came about.
    """

    method: str
    data: tuple[bytes, ...]
    codes: frozenset[grpc.StatusCode]
    what: str


class Fuzzer:
    """Draws calls; the same seed draws the same calls."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.allocations: list[tuple[str, pb.Allocation]] = []
        self._numbers = 0

    def answered(self, call: Fuzzed, answer: bytes) -> None:
        """Learn the names of allocations, for the calls that need one."""
        if call.method == "Allocate":
            request = pb.AllocateRequest.FromString(call.data[0])
            self.allocations.append((request.run_id, pb.Allocation.FromString(answer)))
            del self.allocations[:-50]

    def next(self) -> Fuzzed:
        """Return the next call."""
        method = self.draw.choice(SERVICE.methods)
        message = self._right(method.name)
        kind = self.draw.randrange(8)
        if kind == 0:
            return self._call(method.name, message, REFUSALS, "right")
        if kind <= 2:
            what = self._break(message)
            codes = INVALID if what else REFUSALS
            return self._call(method.name, message, codes, what or "right")
        if kind <= 6:
            what = ", ".join(self._odd(message) for _ in range(self.draw.randrange(1, 4)))
            return self._call(method.name, message, REFUSALS, what)
        data = changed_bytes(self.draw, message.SerializeToString())
        try:
            type(message).FromString(data)
        except DecodeError:
            return Fuzzed(method.name, (data,), INVALID, "bytes that are no message")
        return Fuzzed(method.name, (data,), REFUSALS, "changed bytes")

    def _call(
        self, method: str, message: Message, codes: frozenset[grpc.StatusCode], what: str
    ) -> Fuzzed:
        data = (message.SerializeToString(),)
        if method == "ImportOutcomes" and self.draw.random() < 0.3:
            data *= 2
        return Fuzzed(method, data, codes, what)

    def _id(self) -> str:
        self._numbers += 1
        return f"id-{self.draw.randrange(2**40)}-{self._numbers}"

    def _right(self, method: str) -> Any:
        draw = self.draw
        run = f"run-{draw.randrange(4)}"
        prompts = [f"p{draw.randrange(300)}" for _ in range(draw.randrange(1, 6))]
        counts = [draw.randrange(3) for _ in prompts]
        rewards = [float(draw.randrange(2)) for _ in range(sum(counts))]
        name, positions = "none", len(prompts)
        if self.allocations:
            run_of, allocation = draw.choice(self.allocations)
            if method in ("Extend", "Report") and draw.random() < 0.7:
                run, name, positions = run_of, allocation.allocation_id, 1
        match method:
            case "CreateRun":
                return pb.CreateRunRequest(run_id=run, config=pb.RunConfig(max_rollouts=64))
            case "GetRun":
                return pb.GetRunRequest(run_id=run)
            case "ListRuns":
                return pb.ListRunsRequest(page_size=draw.randrange(5))
            case "DeleteRun":
                # Rarely one that is used: the others need runs that hold something.
                return pb.DeleteRunRequest(run_id=run if draw.random() < 0.02 else "gone")
            case "Allocate":
                fraction = draw.choice([0.0, 0.5])
                return pb.AllocateRequest(
                    run_id=run, step=draw.randrange(50), request_id=self._id(),
                    prompt_ids=prompts, total_rollouts=8 * len(prompts),
                    wave_fraction=fraction, waves=0 if fraction else draw.choice([0, 1, 2]),
                )  # fmt: skip
            case "Extend":
                return pb.ExtendRequest(run_id=run, allocation_id=name, request_id=self._id(),
                                        keep_outstanding=draw.random() < 0.5)  # fmt: skip
            case "Report":
                report = pb.ReportRequest(
                    run_id=run, report_id=self._id(), policy_version=draw.randrange(50),
                    prompt_indices=range(positions), num_rewards=counts[:positions],
                    rewards=rewards[: sum(counts[:positions])],
                )  # fmt: skip
                if name == "none":
                    report.step = draw.randrange(50)
                    report.prompt_ids.extend(prompts)
                else:
                    report.allocation_id = name
                return report
            case "RewindRun":
                return pb.RewindRunRequest(run_id=run, step=draw.randrange(20, 50),
                                           request_id=self._id())  # fmt: skip
            case "ListPromptStats":
                return pb.ListPromptStatsRequest(run_id=run, page_size=draw.randrange(100))
            case "ImportOutcomes":
                return pb.ImportOutcomesRequest(
                    run_id=run, request_id=self._id(), step=draw.randrange(9), prompt_ids=prompts,
                    num_rewards=counts, rewards=rewards,
                )  # fmt: skip
        raise AssertionError(method)

    def _break(self, message: Any) -> str:
        """Set a field to what is never allowed; returns which, or nothing if there is none."""
        fields = {field.name for field in message.DESCRIPTOR.fields}
        ways = [name for name, (needs, _) in _BREAKS.items() if needs <= fields]
        if not ways:
            return ""
        way = self.draw.choice(ways)
        _BREAKS[way][1](message)
        return way

    def _odd(self, message: Any) -> str:
        """Set a field to something odd; returns which."""
        draw = self.draw
        field = draw.choice(message.DESCRIPTOR.fields)
        if field.message_type is not None:
            if field.message_type.name == "RunConfig":
                return "config." + self._odd(getattr(message, field.name))
            return field.name
        odd = {"string": _ODD_TEXT, "bool": [False, True]}.get(_kind(field))
        if odd is None:
            odd = _ODD_FLOATS if _kind(field) in ("double", "float") else _ODD_INTS
        fitting = [value for value in odd if _fits(field, value)]
        if field.is_repeated:
            values = changed_values(draw, getattr(message, field.name), fitting)
            message.ClearField(field.name)
            getattr(message, field.name).extend(values)
        else:
            setattr(message, field.name, draw.choice(fitting))
        return field.name


def _kind(field: Any) -> str:
    return {9: "string", 8: "bool", 1: "double", 2: "float", 5: "int32"}.get(field.type, "int64")


def _fits(field: Any, value: Any) -> bool:
    if _kind(field) == "int32":
        return -(2**31) <= value < 2**31
    if _kind(field) == "float":
        return not math.isfinite(value) or abs(value) < 3e38
    return True


def _set(**values: Any) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list):
                message.ClearField(name)
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)

    return change


_BREAKS: dict[str, tuple[set[str], Callable[[Any], None]]] = {
    "no run_id": ({"run_id"}, _set(run_id="")),
    "control characters": ({"run_id"}, _set(run_id="a\nb")),
    "a long run_id": ({"run_id"}, _set(run_id="r" * 257)),
    "no request_id": ({"request_id", "prompt_ids"}, _set(request_id="")),
    "no report_id": ({"report_id"}, _set(report_id="")),
    "a negative step": ({"step", "prompt_ids"}, _set(step=-1)),
    "a step below -1": ({"step", "run_id", "request_id"}, _set(step=-2)),
    "no prompts": ({"prompt_ids", "request_id"}, _set(prompt_ids=[])),
    "an empty prompt": ({"prompt_ids", "request_id"}, _set(prompt_ids=["a", ""])),
    "a long prompt": ({"prompt_ids", "request_id"}, _set(prompt_ids=["a" * 1025])),
    "no budget": ({"total_rollouts"}, _set(total_rollouts=0)),
    "a negative budget": ({"total_rollouts"}, _set(total_rollouts=-5)),
    "too large a budget": ({"total_rollouts"}, _set(total_rollouts=2**62)),
    "a share above 1": ({"wave_fraction"}, _set(wave_fraction=1.5)),
    "a share that is no number": ({"wave_fraction"}, _set(wave_fraction=math.nan)),
    "rewards that are no numbers": (
        {"rewards", "num_rewards"},
        _set(rewards=[math.nan], num_rewards=[1]),
    ),
    "more counts than rewards": ({"rewards", "num_rewards"}, _set(num_rewards=[2**31 - 1] * 2)),
    "negative lengths": (
        {"completion_tokens", "prompt_indices"},
        _set(completion_tokens=[-1], prompt_indices=[0], num_rewards=[1], rewards=[1.0]),
    ),
    "a negative position": (
        {"prompt_indices"},
        _set(prompt_indices=[-1], num_rewards=[1], rewards=[1.0]),
    ),
    "a negative policy version": ({"policy_version"}, _set(policy_version=-1)),
    "a negative page": ({"page_size"}, _set(page_size=-1)),
    "a token of no page": ({"page_token"}, _set(page_token="\u00e9!")),
    "an unknown policy": ({"config"}, lambda message: setattr(message.config, "policy", "best")),
}

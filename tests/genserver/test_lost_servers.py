"""What a client says of a generation server that dies, is older than it, or is none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from knapsack_proto.v1 import generation_pb2 as pb
from knapsack_trainer_client.errors import GeneratorUnavailable
from knapsack_trainer_client.rollouts import Rollout, RolloutClient

from small_engines import small_model

ASKED = {"max_tokens": 60, "seed": 4}


def test_kill_9_amid_a_burst(start_generator: Any, model_folder: Path, tmp_path: Path) -> None:
    """No short group, nothing twice; what came is kept, and is made again by the next server."""
    flags = [f"--model={model_folder}", "--max-batch-rollouts=32", "--threads=1"]
    new = tmp_path / "new"
    small_model(seed=3).save_pretrained(new)
    generator = start_generator(*flags)
    prompts, sizes = [[1, 2], [3], [4]], [300, 2, 40_000]
    address = generator.addresses["listen"]
    with RolloutClient(address) as client:
        client.update_weights(new, 6)
        session = client.session(**ASKED)
        session.add(sizes, prompts)
        came: list[Rollout] = []

        def read() -> None:
            for rollout in session:
                came.append(rollout)
                if len(came) == 100:
                    generator.process.kill()

        with pytest.raises(GeneratorUnavailable, match="rollouts are missing") as lost:
            read()
        assert f" {sum(sizes) - len(came)} rollouts are missing" in str(lost.value)
        keys = [(r.prompt_index, r.rollout_index) for r in came]
        assert len(set(keys)) == len(keys) >= 100
        assert sum(map(len, session.groups)) == len(came)
        with pytest.raises(GeneratorUnavailable, match="session is over"):
            session.collect()
        generator.end()

        # The next server has the folder's weights until it is given others: nothing is asked
        # again of itself.
        started = start_generator(*flags, f"--listen={address}")
        assert client.status().weight_version == 0
        client.update_weights(new, 6)
        again = client.generate(prompts[:2], sizes[:2], **ASKED)
        assert [len(group) for group in again] == sizes[:2]
        for r in came:
            if r.prompt_index < 2:
                same = again[r.prompt_index][r.rollout_index]
                assert (same.token_ids, same.weight_version) == (r.token_ids, 6)
        assert started.end() == 0


def test_kill_9_while_generate_waits(start_generator: Any) -> None:
    """An error, and no group; each rollout was handed to on_rollout once."""
    generator = start_generator("--engine=fake")
    came: list[tuple[int, int]] = []

    def count(rollout: Rollout) -> None:
        came.append((rollout.prompt_index, rollout.rollout_index))
        if len(came) == 50:
            generator.process.kill()

    with (
        RolloutClient(generator.addresses["listen"]) as client,
        pytest.raises(GeneratorUnavailable, match="rollouts are missing"),
    ):
        client.generate([[1], [2]], [50_000, 50_000], max_tokens=200, on_rollout=count)
    assert 50 <= len(set(came)) == len(came) < 100_000


@pytest.fixture
def serve_some() -> Any:
    """A function that serves some methods of the generation service, and returns the address."""
    servers: list[grpc.Server] = []

    def serve(**methods: Callable[..., Any]) -> str:
        service = pb.DESCRIPTOR.services_by_name["RolloutGenerator"]
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=getattr(
                    pb, service.methods_by_name[name].input_type.name
                ).FromString,
                response_serializer=lambda answer: answer.SerializeToString(),
            )
            for name, method in methods.items()
        }
        server = grpc.server(futures.ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(None).wait()


def test_a_server_that_has_no_sessions(serve_some: Any) -> None:
    """One sentence: which address, and that what is there is older."""
    address = serve_some(GetStatus=lambda _request, _context: pb.GeneratorStatus(engine="old"))
    with RolloutClient(address) as client:
        assert client.status().engine == "old"
        sentence = rf"^{address}: .* it is no generation server, or one that is older than this"
        with pytest.raises(GeneratorUnavailable, match=sentence):
            client.generate([[1]], [3], max_tokens=2)
        with (
            pytest.raises(GeneratorUnavailable, match=sentence),
            client.session(max_tokens=2) as session,
        ):
            session.add([3], [[1]])


def test_a_server_of_something_else(serve_some: Any) -> None:
    """The same sentence, at once, from the first call."""
    with (
        RolloutClient(serve_some()) as client,
        pytest.raises(GeneratorUnavailable, match="it is no generation server"),
    ):
        client.generate([[1]], [3], max_tokens=2)

"""One vLLM engine for all tests, behind a whole server of ours, in this process.

Starting vLLM takes a minute where others compute as well, and two engines at once would
not fit, so the tests share one and leave it with the weights they found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from knapsack_genserver.engines.vllm.engine import VllmEngine, VllmOptions
from knapsack_genserver.server import Server, ServerOptions

from vllm_http import Http
from vllm_models import idle, tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends the shared engine comes last of all that use it."""
    for item in items:
        item.add_marker(pytest.mark.timeout(600))
    items.sort(key=lambda item: ("a_closed_engine" in item.name, "smol" in item.nodeid))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared engine's model on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(model_folder: Path) -> AsyncIterator[Server]:
    """The server that all tests share, on free ports of this machine."""
    engine = VllmEngine(
        VllmOptions(
            model_folder,
            # As Hugging Face computes, so that greedy tokens can be compared.
            ["--dtype=float32", "--max-num-seqs=256"],
            log_format="text",
            update_patience=5.0,
        )
    )
    made = Server(engine, ServerOptions(*["127.0.0.1:0"] * 3, http_listen="127.0.0.1:0"))
    await made.start()
    yield made
    await made.stop(0.0)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(server: Server, model_folder: Path) -> AsyncIterator[Any]:
    """The shared engine, with the weights of its folder as version 0 and nothing to do."""
    shared = server._engine
    yield shared
    if not shared._closing:
        if shared.status().weight_version != 0:
            await shared.load_weights(model_folder, 0)
        assert await idle(shared)


@pytest_asyncio.fixture(loop_scope="session")
async def http(server: Server, model_folder: Path) -> AsyncIterator[Http]:
    """The shared server's HTTP API."""
    # A connection that is kept may be closed by the server just when it is used again.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Http(session, f"http://{server.addresses['http']}", str(model_folder))

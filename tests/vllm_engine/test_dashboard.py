"""The Generation dashboard where vLLM runs: its own panels have data, too."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from knapsack_genserver.server import Server
from knapsack_trainer_client import RolloutClient

import dashboards
from programs import Prometheus, get_json, wait_until


@pytest.mark.asyncio(loop_scope="session")
async def test_every_query_has_data(server: Server, model_folder: Path, tmp_path: Path) -> None:
    """On a Prometheus that scrapes our metrics and vLLM's while groups and weights come."""
    if shutil.which("prometheus") is None:
        if os.environ.get("CI"):
            pytest.fail("prometheus is not installed; .ci/packages installs it")
        pytest.skip("prometheus is not installed")
    await asyncio.to_thread(_watch, server, model_folder, tmp_path)


def _watch(server: Server, model_folder: Path, folder: Path) -> None:
    scraped = {"knapsack-genserver": server.addresses["admin"], "vllm": server.addresses["http"]}
    prometheus = Prometheus(folder / "prometheus", scraped)
    prometheus.start()
    client = RolloutClient(server.addresses["listen"])
    step = 0

    def worked() -> bool:
        nonlocal step
        step += 1
        client.generate([[1, 2, 3, 4] * 8] * 4, [2, 4, 8, 16], max_tokens=16, seed=step)
        client.update_weights(model_folder, 0)
        scrapes = "count_over_time(up[1m]) > 8 and increase(up[1m]) == 0"
        seen = get_json(f"{prometheus.url}/api/v1/query", query=scrapes)["data"]["result"]
        return len(seen) == len(scraped)

    try:
        wait_until(worked, "both were scraped a while", 120)
        assert dashboards.problems(dashboards.load("generation"), prometheus.url) == []
    finally:
        prometheus.close()

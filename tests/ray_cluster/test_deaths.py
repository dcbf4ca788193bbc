"""Replicas and nodes that die in the middle of a burst, behind the real server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from knapsack_trainer_client.rollouts import RolloutClient

from bursts import burst, flags, wait_for
from small_engines import small_model


def test_bursts_with_deaths_are_bursts_without(
    nodes: Any, serve: Callable[..., str], model_folder: Path
) -> None:
    """A killed process and a killed node cost nothing that can be seen from outside."""
    with RolloutClient(serve(*flags(nodes, model_folder)), timeout=400) as client:
        wait_for(client, 2)
        calm = burst(client)
        before = set(nodes.replicas())
        assert burst(client, nodes.kill_replica) == calm
        wait_for(client, 2)
        assert len(before & set(nodes.replicas())) == 1
        assert burst(client, nodes.kill_node) == calm
        wait_for(client, 1)
        # Whoever has no room joins when there is some, in the middle of a burst too.
        assert burst(client, lambda: nodes.nodes.append(nodes.add())) == calm
        wait_for(client, 2)
        assert burst(client) == calm


@pytest.mark.parametrize("way", ["disk", "store"])
def test_whoever_comes_back_has_the_weights(
    nodes: Any, serve: Callable[..., str], model_folder: Path, tmp_path: Path, way: str
) -> None:
    """Through a disk that all see or through Ray, all that is made is of the new version."""
    address = serve(*flags(nodes, model_folder, f"--ray-weights={way}"))
    with RolloutClient(address, timeout=400) as client:
        wait_for(client, 2)
        old = burst(client)
        small_model(seed=1).save_pretrained(tmp_path / "new")
        first = client.update_weights(tmp_path / "new", 4)
        if way == "store":
            # What Ray holds is what was there when it was asked for.
            (tmp_path / "new" / "model.safetensors").unlink()
        new = burst(client)
        assert {version for group in new for _, version in group} == {4}
        assert new != old
        assert burst(client, nodes.kill_replica) == new
        wait_for(client, 2)
        assert burst(client) == new
        assert client.update_weights(model_folder, 5) != first
        assert {version for group in burst(client) for _, version in group} == {5}


def refused(*flags: str, before: Sequence[str] = ()) -> str:
    """Return what a server says that does not start."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "knapsack_genserver.cli", "serve", "--engine=ray", *flags]
        + [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_gcs_server_request_timeout_seconds": "5"},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_it_says_what_is_missing(nodes: Any, tmp_path: Path) -> None:
    """A cluster that is not there, and a model that no replica can load."""
    assert "--model DIR" in refused("--replica-engine=transformers")
    assert "ray start --head" in refused("--replica-engine=fake", "--ray-address=127.0.0.1:1")
    assert "no config.json" in refused(
        f"--ray-address={nodes.address}",
        "--replica-engine=transformers",
        f"--model={tmp_path}",
    )


def test_it_says_that_it_does_not_see_the_node(nodes: Any) -> None:
    """As in a container beside Ray's own that does not share its processes."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let processes be hidden from each other")
    said = refused("--replica-engine=fake", f"--ray-address={nodes.address}", before=apart)
    assert "shareProcessNamespace: true" in said

"""deploy/compose.yaml, by Docker Compose itself and by what it mounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_tools import DEPLOY, ROOT, VERSION, run

FILE = DEPLOY / "compose.yaml"
OURS = ("scheduler", "model", "genserver", "trainer")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file as Docker Compose reads it."""
    done = run("docker-compose", "--file", FILE, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compose_refuses_a_misspelt_key(tmp_path: Path) -> None:
    """The check of the file finds a key that does not exist."""
    text = FILE.read_text().replace("mem_limit:", "memory_limit:", 1)
    bad = tmp_path / "compose.yaml"
    bad.write_text(text)
    done = run("docker-compose", "--file", bad, "config", "--quiet")
    assert done.returncode != 0
    assert "memory_limit" in done.stderr


def test_everything_is_there(config: dict[str, Any]) -> None:
    """Scheduler, generation server, a trainer, Prometheus, alerts and Grafana."""
    assert config["services"].keys() == {*OURS, "prometheus", "alertmanager", "grafana"}


def test_what_is_mounted_exists(config: dict[str, Any]) -> None:
    """Folders of the repository are there, and volumes are declared."""
    for name, service in config["services"].items():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), (name, volume["source"])
                assert volume["read_only"], (name, volume["source"])
            else:
                assert volume["source"] in config["volumes"], (name, volume)


def test_what_is_built_exists(config: dict[str, Any]) -> None:
    """Dockerfiles and their stages are there, and images are of this version."""
    for name in OURS:
        service = config["services"][name]
        build = service["build"]
        dockerfile = Path(build["context"], build["dockerfile"])
        assert Path(build["context"]) == ROOT
        if "target" in build:
            assert f"AS {build['target']}\n" in dockerfile.read_text()
        assert service["image"].endswith(f":{VERSION}")


def test_scraped_services_serve_what_is_scraped(config: dict[str, Any]) -> None:
    """Targets of Prometheus are services with a metrics port there."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    targets = {
        target
        for scrape in prometheus["scrape_configs"]
        for static in scrape["static_configs"]
        for target in static["targets"]
    }
    served = set()
    for name in OURS:
        for argument in config["services"][name]["command"]:
            flag, _, address = argument.partition("=")
            if flag in ("--admin-listen", "--metrics"):
                served.add(f"{name}:{address.rpartition(':')[2]}")
    assert targets == served
    for manager in prometheus["alerting"]["alertmanagers"]:
        for static in manager["static_configs"]:
            for target in static["targets"]:
                assert target.partition(":")[0] in config["services"]


def test_grafana_finds_its_dashboards(config: dict[str, Any]) -> None:
    """The folder of the provider is where the dashboards are mounted."""
    folder = DEPLOY / "grafana/provisioning/dashboards"
    [provider] = yaml.safe_load(next(folder.iterdir()).read_text())["providers"]
    grafana = config["services"]["grafana"]
    mounts = {Path(v["target"]): Path(v["source"]) for v in grafana["volumes"]}
    dashboards = mounts[Path(provider["options"]["path"])]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (dashboards / home.name).exists()
    sources = DEPLOY / "grafana/provisioning/datasources"
    [source] = yaml.safe_load(next(sources.iterdir()).read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_nothing_is_published_beyond_this_machine(config: dict[str, Any]) -> None:
    """Ports are on loopback: nothing here asks who calls."""
    for name, service in config["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name


@pytest.mark.parametrize("name", OURS)
def test_ours_are_confined(config: dict[str, Any], name: str) -> None:
    """No rights and no writing but to volumes and /tmp."""
    service = config["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_images_of_others_are_pinned(config: dict[str, Any]) -> None:
    """Each has a version."""
    for name in ("prometheus", "alertmanager", "grafana"):
        assert config["services"][name]["image"].rpartition(":")[2].lstrip("v")[0].isdigit()

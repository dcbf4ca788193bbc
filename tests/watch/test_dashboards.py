"""Dashboards on a real Prometheus that scrapes a real scheduler and a real generation server."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from authority import Authority

from knapsack_trainer_client import TLS

import dashboards
from grafana_types import complaints
from programs import ROOT, Program, Prometheus, generator, get_json, scheduler, wait_until
from workload import generate_until, train_until

NAMES = ("run", "service", "generation")


@pytest.fixture(scope="module")
def prometheus(
    begin: Callable[[Program], Program], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of a Prometheus that has watched a training and its generation for a while."""
    folder = tmp_path_factory.mktemp("watched")
    authority, cert, key = Authority(folder, "ca"), folder / "server.pem", folder / "server.key"
    authority.issue_to(cert, key)
    served = begin(scheduler("scheduler", folder, f"--tls-cert={cert}", f"--tls-key={key}"))
    address = "localhost:" + served.addresses["listen"].rsplit(":", 1)[1]
    tls = TLS(str(authority.cert))
    generating = begin(generator("generator", folder, "--fail-every=20", "--lose-every=40"))
    watching = Prometheus(
        folder / "prometheus",
        {
            "knapsack-scheduler": served.addresses["admin"],
            "knapsack-genserver": generating.addresses["admin"],
        },
    )
    begin(watching)
    stop = threading.Event()
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=_kept, args=(work, failures, stop), daemon=True)
        for work in (
            lambda: train_until(address, folder, stop, tls),
            lambda: generate_until(generating.addresses["listen"], folder, stop),
        )
    ]
    for thread in threads:
        thread.start()
    url = watching.url

    def seen(query: str) -> bool:
        assert not failures, failures
        return bool(get_json(f"{url}/api/v1/query", query=query)["data"]["result"])

    wait_until(
        lambda: (
            seen("knapsack_scheduler_step > 25")
            and seen("increase(knapsack_genserver_wave_tail_ratio_count[1m]) > 3")
            and seen("count_over_time(knapsack_scheduler_judged_groups_total[1m]) > 5")
            and seen("increase(knapsack_genserver_weight_update_seconds_count[1m]) > 1")
            and seen("increase(knapsack_genserver_redone_rollouts_total[1m]) > 1")
        ),
        "the workload has been scraped",
        300,
    )
    yield url
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures, failures


def _kept(work: Callable[[], None], failures: list[BaseException], stop: threading.Event) -> None:
    try:
        work()
    except BaseException as error:
        if not stop.is_set():
            failures.append(error)


def test_the_committed_dashboards_are_what_their_source_makes() -> None:
    """Whoever edits one by hand is told."""
    command = [sys.executable, str(ROOT / "deploy/grafana/build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_dashboards_are_of_grafanas_types(tmp_path: Path) -> None:
    """TypeScript has nothing against them, and something against a wrong word or type."""
    good = {name: dashboards.load(name) for name in NAMES}
    bad = copy.deepcopy(good["run"])
    bad["panels"][0]["options"]["colorMode"] = "vlaue"
    lines = next(panel for panel in bad["panels"] if panel["type"] == "timeseries")
    lines["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 2
    lines["gridPos"]["x"] = "0"
    said = complaints({**good, "bad": bad}, tmp_path)
    assert [line for line in said.splitlines() if not line.startswith(("bad.ts", " "))] == []
    for mistake in ("vlaue", "lineWidht", "'string' is not assignable to type 'number'"):
        assert mistake in said


@pytest.mark.parametrize("name", NAMES)
def test_every_query_has_data(name: str, prometheus: str) -> None:
    """Every variable has values, every legend's labels are there; vLLM's panels are elsewhere."""
    found = dashboards.problems(
        dashboards.load(name), prometheus, only=lambda panel: not dashboards.is_vllm(panel)
    )
    assert found == []


def test_queries_of_vllm_can_be_read(prometheus: str) -> None:
    """Whether they have data is proven where vLLM runs, by the command of ``dashboards.py``."""
    generation = dashboards.load("generation")
    assert sum(map(dashboards.is_vllm, dashboards.panels(generation))) >= 6
    assert dashboards.unparsed(generation, prometheus, dashboards.is_vllm) == []


def test_processes_of_others_are_not_shown(prometheus: str) -> None:
    """Of what every program has, such as its memory, a dashboard shows that of its own."""
    service = dashboards.load("service")
    values = dashboards.chosen_first(service, prometheus)
    assert (values["job"], values["instance"].count(":")) == ("knapsack-scheduler", 1)
    everybody = get_json(f"{prometheus}/api/v1/query", query="process_resident_memory_bytes")
    assert len(everybody["data"]["result"]) == 2


def test_mistakes_are_found(prometheus: str) -> None:
    """A metric, a label, a function and a variable that are not there; a setting of no series."""
    run: Any = dashboards.load("run")

    def with_query(old: str, new: str) -> list[str]:
        assert old in json.dumps(run)
        return dashboards.problems(json.loads(json.dumps(run).replace(old, new)), prometheus)

    assert any("no data" in each for each in with_query("effective_groups_total", "effectve_total"))
    assert any("no data" in each for each in with_query('band=\\"hard\\"', 'band=\\"herd\\"'))
    assert any("parse error" in each for each in with_query("histogram_quantile(", "quantiles("))
    assert any("not there" in each for each in with_query("[$window]", "[$windows]"))
    assert any("settings for" in each for each in with_query('"options": "hard"', '"options": "x"'))
    legend = with_query('"legendFormat": "realised"', '"legendFormat": "{{team}}"')
    assert any("names team" in each for each in legend)


def test_the_command_proves_what_it_is_asked_to(prometheus: str) -> None:
    """As the tests of vLLM call it: exit code 1 and a line where there is no data."""
    command = [sys.executable, str(Path(__file__).with_name("dashboards.py"))]
    command += ["--prometheus", prometheus, "generation", "--only"]
    asked = {"capture_output": True, "text": True, "check": False, "timeout": 60}
    done = subprocess.run([*command, "Weight"], **asked)  # type: ignore[call-overload]
    assert (done.returncode, done.stdout) == (0, "every query has data\n"), done.stderr
    done = subprocess.run([*command, "vLLM"], **asked)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert "variable vllm_job: no values" in done.stdout

"""The client's metrics are those of METRICS.md, and say what happened."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from knapsack_trainer_client import BudgetClient, InvalidRequest
from knapsack_trainer_client.metrics import expose_metrics, register_metrics

from held_port import HeldPort
from metrics_table import documented, exposed
from real_scheduler import PATIENCE

TABLE = Path(__file__).resolve().parents[2] / "trainer_client/METRICS.md"


def read(url: str) -> str:
    """Return a page."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_a_client_without_a_scheduler_says_so(tmp_path: Path) -> None:
    """Its fallback and its waiting report are in the exposition, which is the table's."""
    outbox = tmp_path / "outbox.db"
    with (
        HeldPort() as nobody,
        HeldPort() as port,
        BudgetClient(nobody.address, "run", timeout=0.3, outbox=outbox) as client,
    ):
        allocation = client.allocate(["a", "b"], 8, step=0)
        client.report(allocation, [[1.0], [0.0]])
        end = expose_metrics(client, port.address)
        try:
            text = read(f"http://{port.address}/metrics")
        finally:
            end()
    assert exposed(text, "knapsack_") == documented(TABLE)
    assert 'knapsack_client_fallbacks_total{run_id="run"} 1.0' in text
    assert 'knapsack_client_pending_reports{run_id="run"} 1.0' in text
    assert 'knapsack_client_scheduler_down{run_id="run"} 1.0' in text


def test_metrics_end_with_their_client(tmp_path: Path) -> None:
    """A registry keeps no client alive."""
    registry = CollectorRegistry()
    client = BudgetClient.embedded(tmp_path / "stats.db", "run", outbox=False)
    register_metrics(client, registry)
    assert registry.get_sample_value("knapsack_client_allocations_total", {"run_id": "run"}) == 0
    client.close()
    del client
    assert registry.get_sample_value("knapsack_client_allocations_total", {"run_id": "run"}) is None


def test_an_address_without_a_port_is_refused() -> None:
    """By the name of the argument."""
    client = BudgetClient("localhost:1", "run", outbox=False)
    with client, pytest.raises(InvalidRequest, match="address = 'localhost'"):
        expose_metrics(client, "localhost")


def test_without_prometheus_the_client_says_what_to_install() -> None:
    """And imports, as everything but its metrics works without."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import knapsack_trainer_client as c\n"
        "import knapsack_trainer_client.metrics as m\n"
        "try: m.register_metrics(c.BudgetClient('localhost:1', 'run', outbox=False), None)\n"
        "except c.ExtraMissing as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'knapsack-rl[metrics]'" in done.stdout


def test_the_scheduler_hears_how_many_reports_wait(scheduler: Any, tmp_path: Path) -> None:
    """The reports of a queue say that there is one, the call after them that there is none."""
    outbox = tmp_path / "outbox.db"
    with BudgetClient(scheduler.address, "run", timeout=3.0, outbox=outbox) as client:
        allocation = client.allocate(["a", "b"], 8, step=0)
        scheduler.kill()
        for number in range(3):
            client.report(allocation, [[1.0], [0.0]], report_id=f"r{number}")
        scheduler.start()
        assert client.flush(PATIENCE)
        name = 'knapsack_scheduler_client_pending_reports{run_id="run"}'
        assert f"{name} 0.0" not in read(f"http://{scheduler.admin}/metrics")
        client.allocate(["a", "b"], 8, step=1)
        assert f"{name} 0.0" in read(f"http://{scheduler.admin}/metrics")

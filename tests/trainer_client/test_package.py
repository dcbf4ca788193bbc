"""What the package exports and loads."""

from __future__ import annotations

import subprocess
import sys
import types

import knapsack_trainer_client


def test_all_is_exact() -> None:
    """Every public name of the package is in __all__, sorted, and nothing else."""
    public = {
        name
        for name, value in vars(knapsack_trainer_client).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(knapsack_trainer_client.__all__) == public
    assert len(knapsack_trainer_client.__all__) == len(public)


def test_public_names_are_documented() -> None:
    """Everything exported says what it is."""
    for name in knapsack_trainer_client.__all__:
        assert getattr(knapsack_trainer_client, name).__doc__, name


def test_importing_the_client_loads_little() -> None:
    """The client needs the standard library, grpc and protobuf, and nothing heavy."""
    heavy = ["numpy", "torch", "sqlalchemy", "prometheus_client", "vllm", "aiohttp", "pydantic"]
    code = (
        "import sys, knapsack_trainer_client, knapsack_trainer_client.cli;"
        "knapsack_trainer_client.group_advantages([[1, 0]]);"
        f"print([m for m in {heavy!r} if m in sys.modules],"
        " sorted(m for m in sys.modules if m.startswith(('knapsack_scheduler', 'knapsack_gen'))))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout == "[] []\n"

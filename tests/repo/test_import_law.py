"""Who may import whom: proto below, three components beside each other, a pure core."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = {
    "knapsack_proto": ROOT / "proto/knapsack_proto",
    "knapsack_scheduler": ROOT / "scheduler/knapsack_scheduler",
    "knapsack_genserver": ROOT / "genserver/knapsack_genserver",
    "knapsack_trainer_client": ROOT / "trainer_client/knapsack_trainer_client",
}
CORE = COMPONENTS["knapsack_scheduler"] / "core"
# The client's in-process mode, the demo and the commands of the lab may import the
# scheduler, inside functions.
LAZY = {
    "trainer_client/knapsack_trainer_client/cli.py",
    "trainer_client/knapsack_trainer_client/embedded.py",
    "trainer_client/knapsack_trainer_client/demo",
}
# What a pure core has no use for.
IMPURE = {
    "asyncio", "concurrent", "datetime", "io", "logging", "multiprocessing", "os", "pathlib",
    "random", "secrets", "socket", "sqlite3", "subprocess", "threading", "time", "uuid",
}  # fmt: skip


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported module of a file and whether it is imported inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        and isinstance(block.test, ast.Name)
        and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        lazy = id(node) in inside or id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", lazy


def sources() -> list[Path]:
    """Return every hand-written source file."""
    files = [p for folder in COMPONENTS.values() for p in sorted(folder.rglob("*.py"))]
    return [p for p in files if "_pb2" not in p.name]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_components_import_downwards_only(path: Path) -> None:
    """Components know the wire contract and themselves, never each other."""
    relative = str(path.relative_to(ROOT))
    own = next(name for name, folder in COMPONENTS.items() if folder in path.parents)
    for module, lazy in imports(path):
        top = module.split(".")[0]
        if top not in COMPONENTS or top in (own, "knapsack_proto"):
            continue
        allowed = top == "knapsack_scheduler" and lazy and any(relative.startswith(p) for p in LAZY)
        assert allowed, f"{relative} imports {module}"


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda p: p.name)
def test_core_is_pure(path: Path) -> None:
    """The core imports NumPy, the core, and nothing with a clock, a disk or a socket."""
    for module, _ in imports(path):
        top = module.split(".")[0]
        assert top not in IMPURE, f"{path.name} imports {module}"
        assert top in ("numpy", *sys.stdlib_module_names) or module.startswith(
            "knapsack_scheduler.core"
        ), f"{path.name} imports {module}"
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), path.name
        if isinstance(node, ast.Attribute):
            assert node.attr != "random", f"{path.name} draws random numbers"


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after the statement."""
    code = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_client_loads_nothing_heavy() -> None:
    """Importing the client costs a trainer grpc and protobuf, and nothing else."""
    heavy = {"torch", "vllm", "sqlalchemy", "prometheus_client", "numpy", "aiohttp"}

    assert not loaded_by("import knapsack_trainer_client") & (
        heavy | {"knapsack_scheduler", "knapsack_genserver"}
    )


def test_solver_loads_numpy_only() -> None:
    """The solver as a library needs neither a service nor a store."""
    loaded = loaded_by("from knapsack_scheduler import solve, solve_posterior")

    assert "numpy" in loaded
    assert not loaded & {"grpc", "sqlalchemy", "prometheus_client", "aiohttp", "pydantic"}

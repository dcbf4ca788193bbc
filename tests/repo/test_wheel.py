"""The wheel, built from the checkout and tried outside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT],
        check=True,
        timeout=300,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_four_packages_and_nothing_else(wheel: Path) -> None:
    """Packages, type markers, stubs, protos and migrations are in; tests are not."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}

    packages = {
        "knapsack_proto",
        "knapsack_scheduler",
        "knapsack_genserver",
        "knapsack_trainer_client",
    }
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    for package in packages:
        assert f"{package}/py.typed" in names
    assert "knapsack_proto/v1/scheduler.proto" in names
    assert "knapsack_proto/v1/scheduler_pb2.pyi" in names
    assert "knapsack_scheduler/lab/scenarios/base.toml" in names
    assert "knapsack_scheduler/lab/report.html.j2" in names
    assert any("journal" in name and "versions" in name for name in names)


def test_base_install_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment with the wheel alone the client imports and the command answers."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=200)
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--constraint", ROOT / ".ci/constraints.txt", wheel,
        ],
        check=True,
        timeout=400,
    )  # fmt: skip

    code = (
        "import knapsack_trainer_client as c, importlib.util as u\n"
        "print(c.__file__)\n"
        "print([m for m in ('numpy', 'torch', 'sqlalchemy') if u.find_spec(m)])\n"
        "print(c.group_advantages([[1.0, 0.0], [1.0, 1.0]]))\n"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=60
    )
    where, heavy, advantages = done.stdout.splitlines()
    assert str(tmp_path) in where
    assert heavy == "[]"
    assert advantages.endswith("[0.0, 0.0]]")
    for script in ("knapsack-rl", "knapsack-scheduler", "knapsack-genserver"):
        answer = subprocess.run(
            [tmp_path / "venv/bin" / script, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
        )
        if script == "knapsack-rl":
            assert answer.returncode == 0
            assert "demo" in answer.stdout
        else:
            # Their extra is not installed: one line that says which to install.
            assert answer.returncode == 0 or "knapsack-rl[" in answer.stderr, answer.stderr
            assert "Traceback" not in answer.stderr

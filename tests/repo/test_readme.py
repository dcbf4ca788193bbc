"""The README says what is so: its code runs, its commands and files exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_integration_runs_as_it_is_written(tmp_path: Path) -> None:
    """Against a real scheduler on its documented command, with a trainer's own functions."""
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "knapsack_scheduler.cli", "serve"]
        + [f"--{name}=127.0.0.1:0" for name in ("listen", "admin-listen", "health-listen")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    assert scheduler.stdout is not None
    updates: list[Any] = []
    try:
        address = json.loads(scheduler.stdout.readline())["listen"]
        assert '"localhost:50051"' in code
        prompts = [SimpleNamespace(id=f"prompt-{i}") for i in range(6)]
        names = {
            "batches": [prompts, prompts[::-1], prompts],
            "generate": lambda batch, sizes: [list(range(n)) for n in sizes],
            "score": lambda prompt, completion: float(completion % 3 == 0),
            "update": lambda groups, advantages: updates.append((groups, advantages)),
        }
        exec(code.replace("localhost:50051", address), names)
    finally:
        scheduler.terminate()
        scheduler.wait(30)
        scheduler.stdout.close()
    assert len(updates) == 3
    for groups, advantages in updates:
        assert sum(map(len, groups)) == 48
        assert list(map(len, groups)) == list(map(len, advantages))
    assert (tmp_path / "stats.db").is_file()


def test_every_link_and_target_exists() -> None:
    """Files that are linked are there, make targets are targets, commands are commands."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named <= targets
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for command in re.findall(r"\bknapsack-(?:rl|scheduler|genserver)\b", README):
        assert command == "knapsack-rl" or f"{command} =" in pyproject


def test_readme_ends_are_not_placeholders() -> None:
    """What it shows was filled in."""
    for word in ("OUTPUT", "FINDING", "BENCH", "TODO"):
        assert word not in README

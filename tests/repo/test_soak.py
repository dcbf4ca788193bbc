"""The soak, which CI does not run, can be begun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "soak" / "soak.py"


def test_the_soak_finds_what_it_repeats() -> None:
    """It imports the tests whose long versions it runs."""
    done = subprocess.run(
        [sys.executable, str(SOAK), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--kills" in done.stdout

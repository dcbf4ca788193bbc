#!/usr/bin/env python3
"""Writes the dashboards of this folder from their source: ``build.py [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "source"))

import generation  # noqa: E402
import run  # noqa: E402
import service  # noqa: E402

DASHBOARDS = {"run": run.build, "service": service.build, "generation": generation.build}


def text_of(name: str) -> str:
    """Return a dashboard as it is written to its file."""
    return json.dumps(DASHBOARDS[name](), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the files, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    stale = []
    for name in DASHBOARDS:
        file = HERE / "dashboards" / f"{name}.json"
        if check:
            if not file.exists() or file.read_text() != text_of(name):
                stale.append(file)
        else:
            file.write_text(text_of(name))
    for file in stale:
        print(f"stale: {file} (run: make dashboards)", file=sys.stderr)  # noqa: T201
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

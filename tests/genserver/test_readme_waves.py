"""The README's step in waves runs as it is written, on a real scheduler and server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from real_scheduler import SchedulerProcess

README = Path(__file__).parents[2] / "genserver" / "README.md"


def test_a_step_in_waves(start_generator: Any, tmp_path: Path) -> None:
    """The budget is spent to the last rollout, and each prompt's group is whole and in order."""
    section = README.read_text().split("## A step in waves")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    with SchedulerProcess(tmp_path / "stats.db") as scheduler:
        generator = start_generator("--engine=fake")
        for address, real in (
            ("localhost:50051", scheduler.address),
            ("localhost:50061", generator.addresses["listen"]),
        ):
            assert f'"{address}"' in code
            code = code.replace(address, real)
        names: dict[str, Any] = {
            "step": 0,
            "prompts": [[k % 60 + 1, 2] for k in range(40)],
            "prompt_ids": [f"p{k}" for k in range(40)],
            # Even the easiest has rollouts that fail.
            "reward_of": lambda r: float(r.token_ids[0] % 40 > r.prompt_index),
        }
        exec(compile(code, str(README), "exec"), names)
        groups = names["groups"]
        assert sum(map(len, groups)) == 2048
        assert names["allocation"].wave == 2
        for group in groups:
            assert [rollout.rollout_index for rollout in group] == list(range(len(group)))
        names["rollouts"].close()
        names["budget"].close()

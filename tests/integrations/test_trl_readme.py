"""The page for TRL says what is so: its code trains as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from real_scheduler import PATIENCE
from tiny_trl import config, new_model, new_tokenizer, reward, rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "trainer_client/README.md").read_text(encoding="utf-8")


def test_the_training_runs_as_it_is_written(
    scheduler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a user's model, reward and dataset, against a real scheduler."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert '"localhost:50051"' in code
    assert "train_dataset=dataset," in code
    code = code.replace("localhost:50051", scheduler.address)
    # A tiny model has no tokenizer on the hub, and a test no GPU.
    code = code.replace("train_dataset=dataset,", "train_dataset=dataset, processing_class=words,")
    used = config(tmp_path, num_generations=8, max_steps=3)
    names = {
        "model": new_model(),
        "reward": reward,
        "dataset": Dataset.from_list(rows()),
        "words": new_tokenizer(),
        "settings": {
            name: getattr(used, name)
            for name in ("per_device_train_batch_size", "max_steps", "max_completion_length")
        }
        | {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
    }

    exec(code, names)

    trainer: Any = names["trainer"]
    assert trainer.state.global_step == 3
    # A step whose allocation came too late counts as well.
    assert trainer._budget.flush(PATIENCE)
    assert trainer._budget.run().total_rollouts == 3 * 8
    assert {s.prompt_id for s in trainer._budget.prompt_stats()} <= {r["id"] for r in rows()}


def test_the_scripts_of_the_comparison_differ_in_one_line() -> None:
    """And the page shows that line."""
    folder = ROOT / "trainer_client/examples/trl"
    texts = [(folder / name).read_text().splitlines() for name in ("grpo.py", "grpo_budgeted.py")]
    (pair,) = [(a, b) for a, b in zip(*texts, strict=True) if a != b]
    assert "-" + pair[0] in PAGE
    assert "+" + pair[1] in PAGE

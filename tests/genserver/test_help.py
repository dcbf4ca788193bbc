"""The help of the commands says what a flag is if it is not given, where that is something."""

from __future__ import annotations

import pytest

from knapsack_genserver.cli import main


@pytest.mark.parametrize(
    ("command", "shown"), [("serve", "(default: transformers)"), ("replicas", "(default: 0.0)")]
)
def test_only_defaults_that_say_something_are_shown(
    command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not those of switches that are off, and of flags that have no value."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert shown in text
    assert "default: None" not in text
    assert "default: False" not in text

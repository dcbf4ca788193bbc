"""Unit tests of the recording rules and alerts, by promtool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import rules
from programs import ROOT, tool

TESTS = Path(__file__).with_name("rules_test.yaml")


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_shipped_files_are_in_order() -> None:
    """As Prometheus and Alertmanager read them, with no rule twice."""
    done = promtool("check", "rules", "--lint-fatal", rules.FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("check", "config", ROOT / "deploy/prometheus/prometheus.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    amtool = [tool("amtool"), "check-config", str(ROOT / "deploy/alertmanager/alertmanager.yaml")]
    checked = subprocess.run(amtool, capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stderr


def test_the_unit_tests_pass_and_speak_of_every_alert() -> None:
    """Each alert has a case in which it fires and one, before it or beside it, in which not."""
    done = promtool("test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [
        case for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]  # fmt: skip
    for fires in (True, False):
        named = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires}
        assert named == set(rules.alerts())


@pytest.mark.parametrize("mistake", ["never", "always"])
def test_a_mistake_in_any_alert_is_found(mistake: str, tmp_path: Path) -> None:
    """One that never fires; one that fires without waiting, or always where it does not wait."""
    spoilt = yaml.safe_load(rules.FILE.read_text())
    for group in spoilt["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                if mistake == "never":
                    rule["expr"] = "vector(0) > 1"
                elif "for" in rule:
                    rule["for"] = "0s"
                else:
                    rule["expr"] = "vector(1)"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spoilt))
    tests = TESTS.read_text().replace(f"../../{rules.FILE.relative_to(ROOT)}", "rules.yaml")
    (tmp_path / "tests.yaml").write_text(tests)
    done = promtool("test", "rules", tmp_path / "tests.yaml")
    assert done.returncode != 0
    failed = set(re.findall(r"alertname: (\w+)", done.stderr + done.stdout))
    assert failed == set(rules.alerts())

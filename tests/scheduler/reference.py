"""The scheduler in plain lines: lists, dicts and floats, everything anew each time.

Keeps the calls that changed something and derives all the rest from them, prompt by prompt
and rollout by rollout. Shares no code with the scheduler.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import exp, floor, sqrt
from typing import Any

IMPORTED = -(10**18)
"""Added to the steps of imported outcomes: older than everything."""


@dataclass
class Call:
    """A call that changed something, or made what it did to be forgotten."""

    kind: str
    id: str
    content: bytes
    answer: Any
    step: float
    allocation: str = ""
    prompts: list[str] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    budget: int = 0
    version: int = 0
    rewards: list[tuple[int, float]] = field(default_factory=list)
    ignored: bool = False
    forgotten: bool = False


@dataclass
class ReferenceRun:
    """One run."""

    config: Any
    calls: list[Call] = field(default_factory=list)

    def kept(self, *kinds: str) -> list[Call]:
        """Return the calls that no rewind forgot."""
        return [c for c in self.calls if not c.forgotten and (not kinds or c.kind in kinds)]

    def same_id(self, kind: str, call_id: str) -> Call | None:
        """Return the call that has taken this id; one that is ignored takes none."""
        taken = (c for c in self.kept(kind) if c.id == call_id and not c.ignored)
        return next(taken, None)

    def allocation(self, name: str) -> tuple[Call, list[int], list[int]]:
        """Return a kept allocation, what it has given and what was reported, by position."""
        first = next(c for c in self.kept("allocate") if c.allocation == name)
        given, reported = [0] * len(first.prompts), [0] * len(first.prompts)
        for call in self.kept("allocate", "extend", "report"):
            if call.allocation == name and not call.ignored:
                given = [a + b for a, b in zip(given, call.given or [0] * len(given), strict=True)]
                for position, _ in call.rewards:
                    reported[position] += 1
        return first, given, reported

    def rewind(self, step: int) -> None:
        """Forget what came after a step; with all steps, what was ignored too."""
        for call in self.calls:
            anew = step < 0 and call.kind == "report"
            if call.kind != "rewind" and (call.step > step or anew):
                call.forgotten = True

    def outcomes(self) -> dict[str, list[tuple[float, int, bool]]]:
        """Return (step, policy version, success) of every counted rollout, by prompt."""
        by_prompt = defaultdict(list)
        for call in self.kept("report", "import"):
            if not call.ignored:
                at = call.step if call.kind == "report" else call.version + IMPORTED
                version = call.version if call.kind == "report" else 0
                for position, reward in call.rewards:
                    success = reward > self.config.success_threshold
                    by_prompt[call.prompts[position]].append((at, version, success))
        return dict(sorted(by_prompt.items()))

    def newest_version(self) -> int:
        """Return the newest policy version reported."""
        return max((c.version for c in self.kept("report") if not c.ignored), default=0)

    def summary(self) -> dict[str, int]:
        """Return what GetRun says."""
        all_outcomes = [o for outcomes in self.outcomes().values() for o in outcomes]
        steps = [c.step for c in self.kept("allocate", "report") if not c.ignored]
        return {
            "last_step": int(max(steps, default=-1)),
            "last_policy_version": self.newest_version(),
            "known_prompts": len(self.outcomes()),
            "total_rollouts": len(all_outcomes),
            "total_successes": sum(success for _, _, success in all_outcomes),
            "rewinds": len(self.kept("rewind")),
            "ignored_rollouts": sum(len(c.rewards) for c in self.kept("report") if c.ignored),
        }

    def statistics(self) -> dict[str, tuple[int, int, int, int, float, float]]:
        """Return what ListPromptStats says: rollouts, successes, step, version, posterior."""
        evidence = {prompt: self._evidence(_visits(o)) for prompt, o in self.outcomes().items()}
        spread = _spread(list(evidence.values()))
        rows = {}
        for prompt, outcomes in self.outcomes().items():
            newest = max(outcomes)
            rows[prompt] = (
                len(outcomes),
                sum(success for _, _, success in outcomes),
                int(newest[0]) if newest[0] >= 0 else -1,
                newest[1] if newest[0] >= 0 else 0,
                *_believed(spread, *evidence[prompt]),
            )
        return rows

    def _evidence(self, visits: list[tuple[float, int, int, int]]) -> tuple[float, float]:
        """Return the weighed successes and failures of a prompt's newest eight visits."""
        weights = [0.0, 0.0]
        steps = list(dict.fromkeys(step for step, _, _, _ in visits[:8]))
        for step, version, rollouts, successes in visits[:8]:
            weight = self.config.visit_discount ** steps.index(step)
            weight *= self.config.version_discount ** (self.newest_version() - version)
            weights[0] += weight * successes
            weights[1] += weight * (rollouts - successes)
        shrink = min(1.0, self.config.evidence_cap / sum(weights))
        return shrink * weights[0], shrink * weights[1]


def _visits(outcomes: list[tuple[float, int, bool]]) -> list[tuple[float, int, int, int]]:
    """Return (step, version, rollouts, successes) of each visit, newest first."""
    visits = {}
    for step, version, success in outcomes:
        rollouts, successes = visits.get((step, version), (0, 0))
        visits[step, version] = (rollouts + 1, successes + success)
    return [(*key, *visits[key]) for key in sorted(visits, reverse=True)]


POINTS = [1 / (1 + exp(-8 + 16 * k / 24)) for k in range(25)]
"""Success rates, evenly spaced in log-odds."""

START = [sqrt(p * (1 - p)) / sum(sqrt(r * (1 - r)) for r in POINTS) for p in POINTS]


def _held(successes: float, failures: float) -> tuple[float, float]:
    """Return at most 32 rollouts of the evidence."""
    factor = 32 / max(32, successes + failures)
    return factor * successes, factor * failures


def _shares(spread: list[float], successes: float, failures: float) -> list[float]:
    """Return what the evidence, in sixteenths of a rollout, leaves of each point."""
    k, m = (floor(16 * x + 0.5) / 16 for x in _held(successes, failures))
    shares = [w * p**k * (1 - p) ** m for w, p in zip(spread, POINTS, strict=True)]
    return [share / sum(shares) for share in shares]


def _spread(evidence: list[tuple[float, float]]) -> list[float]:
    """Return four rounds of expectation-maximisation, with eight prompts of the start."""
    spread = START
    for _ in range(4):
        rows = [[8 * w for w in START], *(_shares(spread, *each) for each in evidence)]
        spread = [sum(column) / (len(evidence) + 8) for column in zip(*rows, strict=True)]
    return spread


def _believed(spread: list[float], successes: float, failures: float) -> tuple[float, float]:
    """Return the Beta distribution with the moments of the points that are left."""
    shares = _shares(spread, successes, failures)
    mean = sum(s * p for s, p in zip(shares, POINTS, strict=True))
    variance = sum(s * (p - mean) ** 2 for s, p in zip(shares, POINTS, strict=True))
    strength = max(mean * (1 - mean) / max(variance, 1e-9) - 1, 0.05)
    k, m = _held(successes, failures)
    return mean * strength + successes - k, (1 - mean) * strength + failures - m

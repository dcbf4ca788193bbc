"""The scheduler in a hundred plain lines: lists, dicts and floats, everything anew each time.

Keeps the calls that changed something and derives all the rest from them, prompt by prompt
and rollout by rollout. Shares no code with the scheduler.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
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
        """Return the call that has taken this id."""
        return next((c for c in self.kept(kind) if c.id == call_id), None)

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
        """Forget what came after a step."""
        for call in self.calls:
            if call.kind != "rewind" and call.step > step:
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
        visits = {prompt: _visits(outcomes) for prompt, outcomes in self.outcomes().items()}
        prior = _prior([v[0] for v in visits.values()])
        rows = {}
        for prompt, outcomes in self.outcomes().items():
            weights, total = [0.0, 0.0], 0.0
            steps = list(dict.fromkeys(step for step, _, _, _ in visits[prompt][:8]))
            for step, version, rollouts, successes in visits[prompt][:8]:
                weight = self.config.visit_discount ** steps.index(step)
                weight *= self.config.version_discount ** (self.newest_version() - version)
                weights[0] += weight * successes
                weights[1] += weight * (rollouts - successes)
            total = sum(weights)
            shrink = min(1.0, self.config.evidence_cap / total)
            newest = max(outcomes)
            rows[prompt] = (
                len(outcomes),
                sum(success for _, _, success in outcomes),
                int(newest[0]) if newest[0] >= 0 else -1,
                newest[1] if newest[0] >= 0 else 0,
                prior[0] + shrink * weights[0],
                prior[1] + shrink * weights[1],
            )
        return rows


def _visits(outcomes: list[tuple[float, int, bool]]) -> list[tuple[float, int, int, int]]:
    """Return (step, version, rollouts, successes) of each visit, newest first."""
    visits = {}
    for step, version, success in outcomes:
        rollouts, successes = visits.get((step, version), (0, 0))
        visits[step, version] = (rollouts + 1, successes + success)
    return [(*key, *visits[key]) for key in sorted(visits, reverse=True)]


def _prior(newest: list[tuple[float, int, int, int]]) -> tuple[float, float]:
    """Return the Beta distribution with the moments of the newest visits."""
    pairs = [(k, n) for _, _, n, k in newest if n > 1]
    mean = (sum(Fraction(k, n) for _, _, n, k in newest) + 8) / (len(newest) + 16)
    square = (sum(Fraction(k * (k - 1), n * (n - 1)) for k, n in pairs) + 6) / (len(pairs) + 16)
    mean = min(max(float(mean), 0.02), 0.98)
    variance = float(square) - mean**2
    strength = min(max(mean * (1 - mean) / variance - 1, 0.3), 4.0) if variance > 0 else 4.0
    return mean * strength, (1 - mean) * strength

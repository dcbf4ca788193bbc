"""The page a person can read without Grafana: what each run spends and what comes of it."""

from __future__ import annotations

import html
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from knapsack_scheduler.events import BudgetDivided, Event, OutcomesCounted, RunRemoved, RunRewound

_RECENT = 10
_MOST_RUNS = 200
_STEPS = 60
"""Steps of a run that are shown, and that predictions are compared with outcomes over."""


@dataclass(slots=True)
class _Step:
    """What was given and came back in one step."""

    rollouts: int = 0
    predicted: float | None = None
    gain: float | None = None
    groups: int = 0
    effective_groups: int = 0
    reported: int = 0
    effective_rollouts: int = 0

    @property
    def realised(self) -> float | None:
        return self.effective_groups / self.groups if self.groups else None


@dataclass(slots=True)
class _Run:
    """A run as far as this process has seen it."""

    steps: OrderedDict[int, _Step] = field(default_factory=OrderedDict)
    known_prompts: int = 0
    policy_version: int = 0
    last: BudgetDivided | None = None

    def at(self, step: int) -> _Step:
        """Return a step; the oldest ones are forgotten."""
        found = self.steps.setdefault(step, _Step())
        while len(self.steps) > _STEPS:
            self.steps.popitem(last=False)
        return found


class LivePage:
    """Listens to events and shows the runs as they go."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._recent: deque[BudgetDivided] = deque(maxlen=_RECENT)

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        match event:
            case BudgetDivided():
                self._recent.appendleft(event)
                run = self._run(event.run_id)
                run.last = event
                step = run.at(event.step)
                step.rollouts += event.allocated
                # A later wave predicts whole groups, knowing more than the first did.
                step.predicted = event.reasons.effective_group_rate
                uniform = event.reasons.uniform_value
                step.gain = event.reasons.value / uniform if uniform > 0 else None
            case OutcomesCounted(imported=False):
                run = self._run(event.run_id)
                run.known_prompts = event.prompts.known
                run.policy_version = max(run.policy_version, event.policy_version)
                counted = event.counted
                if counted.accepted:
                    step = run.at(event.step)
                    step.groups += counted.groups
                    step.effective_groups += counted.effective_groups
                    step.reported += counted.accepted
                    step.effective_rollouts += counted.effective_rollouts
            case RunRewound():
                run = self._run(event.run_id)
                run.steps = OrderedDict(kv for kv in run.steps.items() if kv[0] <= event.step)
            case RunRemoved():
                self._runs.pop(event.run_id, None)

    def _run(self, run_id: str) -> _Run:
        run = self._runs.setdefault(run_id, _Run())
        self._runs.move_to_end(run_id)
        while len(self._runs) > _MOST_RUNS:
            self._runs.popitem(last=False)
        return run

    def render(self, ready: bool) -> str:
        """Return the page."""
        rows = "".join(_run_row(name, run) for name, run in reversed(self._runs.items()))
        recent = "".join(_allocation_row(event) for event in self._recent)
        return _PAGE.format(
            state="serving" if ready else "not ready",
            colour="good" if ready else "bad",
            steps=_STEPS,
            runs=rows or _NOTHING.format(10, "No allocation or report since the start."),
            recent=recent or _NOTHING.format(8, "None yet."),
        )


def _run_row(run_id: str, run: _Run) -> str:
    steps = run.steps.values()
    both = [s for s in steps if s.predicted is not None and s.groups]
    groups = sum(s.groups for s in both)
    predicted = sum((s.predicted or 0.0) * s.groups for s in both)
    effective = sum(s.effective_groups for s in both)
    reported = sum(s.reported for s in steps)
    gains = [s.gain for s in steps if s.gain is not None]
    last = run.last
    newest = run.steps.get(last.step) if last else None
    return _row(
        _name(run_id),
        _text(max(run.steps, default="–")),
        _text(run.policy_version),
        _text(f"{run.known_prompts:,}"),
        _text(f"{newest.rollouts:,}" if newest else "–"),
        _percent(predicted / groups if groups else None),
        _percent(effective / groups if groups else None),
        _percent(sum(s.effective_rollouts for s in steps) / reported if reported else None),
        _text(f"× {sum(gains) / len(gains):.2f}" if gains else "–"),
        _lines([s.predicted for s in steps], [s.realised for s in steps]),
    )


def _allocation_row(event: BudgetDivided) -> str:
    reasons = event.reasons
    cells = (
        event.step,
        event.wave,
        f"{event.prompts:,}",
        f"{event.allocated:,}",
        reasons.largest_group,
        f"{reasons.unseen_prompts:,}",
        f"{1e3 * event.seconds:.1f} ms",
    )
    return _row(_name(event.run_id), *map(_text, cells))


def _lines(predicted: list[float | None], realised: list[float | None]) -> str:
    """Return both series, 0 to 1, as a small drawing."""
    width, height = 180, 34

    def points(series: list[float | None]) -> str:
        gap = width / max(len(series) - 1, 1)
        return " ".join(
            f"{i * gap:.1f},{height - 2 - share * (height - 4):.1f}"
            for i, share in enumerate(series)
            if share is not None
        )

    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f'<line x1="0" x2="{width}" y1="{height - 2}" y2="{height - 2}" class="axis"/>'
        f'<polyline points="{points(predicted)}" class="predicted"/>'
        f'<polyline points="{points(realised)}" class="realised"/></svg>'
    )


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _name(run_id: str) -> str:
    """Return a run's name as it was given, whole where a column is too narrow for it."""
    shown = _text(run_id)
    return f'<bdi title="{shown}">{shown}</bdi>'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


_NOTHING = '<tr><td colspan="{}">{}</td></tr>'
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>knapsack-scheduler</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="5"><style>
:root {{ color-scheme: light dark; --text: #1d2433; --dim: #5b6579; --line: #dde2ea;
        --back: #fff; --good: #1c6b3a; --bad: #a3312a; --predicted: #8a94a8;
        --realised: #1f6feb; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e3e7ee; --dim: #9aa5b8;
        --line: #2c3443; --back: #141821; --good: #6fd295; --bad: #ff9b93; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem;
       padding: 0 1.2rem; color: var(--text); background: var(--back); }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .3rem; }}
p {{ color: var(--dim); margin: .2rem 0 .6rem; }} a {{ color: inherit; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
         white-space: nowrap; }}
th {{ font-weight: 600; color: var(--dim); vertical-align: bottom; white-space: normal; }}
th:first-child, td:first-child {{ text-align: left; max-width: 24rem; overflow: hidden;
                                 text-overflow: ellipsis; }}
.state {{ border: 1px solid; border-radius: 1rem; padding: .1rem .7rem; font-size: .8rem;
         vertical-align: middle; }}
.good {{ color: var(--good); }} .bad {{ color: var(--bad); }}
svg {{ vertical-align: middle; }} .axis {{ stroke: var(--line); }}
polyline {{ fill: none; stroke-width: 1.6; }}
.predicted {{ stroke: var(--predicted); stroke-dasharray: 4 3; }}
.realised {{ stroke: var(--realised); }}
.key {{ font-weight: 400; }}
</style></head><body>
<h1>knapsack-scheduler <span class="state {colour}">{state}</span></h1>
<h2>Runs</h2>
<p>Seen since the start, the newest first. Shares are of the last {steps} steps; predicted and
realised are of the same groups, so a run whose two figures differ is one whose success rates
the scheduler misjudges.</p>
<div class="scroll"><table><tr><th>run</th><th>step</th><th>policy version</th>
<th>known prompts</th><th>rollouts of the step</th><th>effective groups, predicted</th>
<th>effective groups, realised</th><th>rollouts in effective groups</th>
<th>value, against uniform</th><th>effective groups by step<br><span class="key">dashed:
predicted, solid: realised</span></th></tr>{runs}</table></div>
<h2>Newest allocations</h2>
<div class="scroll"><table><tr><th>run</th><th>step</th><th>wave</th><th>prompts</th>
<th>rollouts</th><th>largest group</th><th>unseen prompts</th><th>solved in</th></tr>{recent}
</table></div>
<p><a href="/metrics">metrics</a> · <a href="/readyz">readyz</a></p></body></html>"""

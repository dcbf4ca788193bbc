"""Is the budget of a run spent well: what its owner looks at every morning."""

from __future__ import annotations

from panels import (
    Json,
    choice_variable,
    dashboard,
    datasource_variable,
    heatmap,
    label_variable,
    query,
    row,
    stat,
    table,
    timeseries,
)

_S = "knapsack_scheduler_"
_RUN = 'job=~"$job", run_id="$run"'

GOOD, PLAIN, EXPECTED = "green", "text", "#8e9aaf"
BAND_COLOURS = {
    "unseen": "#9fa7b3",
    "unsolved": "#b3423a",
    "hard": "#e0823d",
    "medium": "#f2c744",
    "easy": "#7fb85c",
    "solved": "#2f7d4f",
}


def _sum(metric: str, over: str, more: str = "", by: str = "") -> str:
    """Return the increase of a counter of the run, over all replicas."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (increase({_S}{metric}{{{_RUN}{more}}}[{over}]))"


def _ratio(part: str, whole: str, over: str) -> str:
    return f"{_sum(part, over)} / {_sum(whole, over)}"


def _uniform_effective(kind: str, over: str) -> str:
    return _ratio(f"predicted_uniform_effective_{kind}_total", f"predicted_{kind}_total", over)


def _saved(got: str, uniform: str, generated: str) -> str:
    """Return the rollouts that uniform groups would have taken for as much, less those made."""
    over = "$window"
    return (
        f"{_sum(got, over)} * {_sum('predicted_rollouts_total', over)} / {_sum(uniform, over)}"
        f" - {_sum(generated, over)}"
    )


def _quantile(share: float, metric: str) -> str:
    inner = _sum(f"{metric}_bucket", "$window", by="le")
    return f"histogram_quantile({share}, {inner})"


def _three(kind: str) -> list[Json]:
    """Return what came, what was expected, and what uniform groups were expected to bring."""
    return [
        query(_ratio(f"effective_{kind}_total", f"reported_{kind}_total", "$window"), "realised"),
        query(
            _ratio(f"predicted_effective_{kind}_total", f"predicted_{kind}_total", "$window"),
            "predicted",
        ),
        query(_uniform_effective(kind, "$window"), "uniform, predicted"),
    ]


_LINES = {"realised": "blue", "predicted": "light-blue", "uniform, predicted": EXPECTED}
_DASHED = ("predicted", "uniform, predicted")

_TODAY = [
    stat(
        "Effective groups",
        """Share of the groups that came, over the time shown, whose rewards are not all equal.
        The others have advantage 0 and teach nothing.""",
        "percentunit",
        _ratio("effective_groups_total", "reported_groups_total", "$__range"),
        decimals=1,
        thresholds=((None, "red"), (0.05, PLAIN)),
    ),
    stat(
        "Uniform would have had",
        """Share of effective groups expected of the same budgets divided uniformly, under the
        same beliefs about the prompts.""",
        "percentunit",
        _uniform_effective("groups", "$__range"),
        decimals=1,
    ),
    stat(
        "Rollouts in effective groups",
        """Share of the rollouts that came, over the time shown, that lie in groups whose rewards
        are not all equal.""",
        "percentunit",
        _ratio("effective_rollouts_total", "reported_rollouts_total", "$__range"),
        decimals=1,
    ),
    stat(
        "Value against uniform",
        """Expected objective of the budgets given out, as a multiple of that of the same budgets
        divided uniformly. Predicted, and by a little too high: what is chosen for looking
        good looks a little better than it is.""",
        "suffix:×",
        _ratio("predicted_value_total", "predicted_uniform_value_total", "$__range"),
        decimals=2,
        thresholds=((None, PLAIN), (1.02, GOOD)),
    ),
    stat(
        "Rollouts",
        "Rollouts that came, over the time shown.",
        "short",
        _sum("reported_rollouts_total", "$__range"),
    ),
    stat(
        "Step",
        "The trainer's step of the newest allocation.",
        "none",
        f"max({_S}step{{{_RUN}}})",
    ),
    stat(
        "Divided by the client",
        """Share of the rollouts that came that the scheduler did not allocate: uniform fallbacks
        of a client that got no answer in time, or a trainer with a mind of its own.""",
        "percentunit",
        _ratio("reported_without_allocation_rollouts_total", "reported_rollouts_total", "$__range"),
        decimals=1,
        thresholds=((None, PLAIN), (0.01, "orange"), (0.05, "red")),
    ),
    stat(
        "Since the last report",
        "Time since rewards were last reported.",
        "s",
        f"time() - max({_S}newest_report_timestamp_seconds{{{_RUN}}})",
        decimals=0,
    ),
]

_WELL_SPENT = [
    timeseries(
        "Effective groups",
        """Share of groups whose rewards are not all equal. Solid: of the groups that came in the
        window. Dashed: what was predicted of them, and what uniform groups of the same budgets
        were predicted to bring.""",
        "percentunit",
        _three("groups"),
        colours=_LINES,
        dashed=_DASHED,
    ),
    timeseries(
        "Rollouts in effective groups",
        """Share of rollouts in groups whose rewards are not all equal. High where large groups are
        effective; alone it proves little, as one prompt given everything would have it near 1.""",
        "percentunit",
        _three("rollouts"),
        colours=_LINES,
        dashed=_DASHED,
    ),
    timeseries(
        "Value against uniform",
        """Expected objective of the budgets given out, as a multiple of that of the same budgets
        divided uniformly. 1 is no gain.""",
        "suffix:×",
        [
            query(
                _ratio("predicted_value_total", "predicted_uniform_value_total", "$window"),
                "value against uniform",
            )
        ],
        colours={"value against uniform": "green"},
        minimum=None,
        decimals=2,
    ),
]

_WHO = [
    timeseries(
        "Prompts by success rate",
        """Prompts of the run in each band: by their newest 16 or so rollouts nothing succeeded
        (unsolved), less than a quarter (hard), up to three quarters (medium), more (easy),
        everything (solved). Unseen ones were allocated rollouts that have not been reported.""",
        "short",
        [query(f'max({_S}prompts{{{_RUN}, band="{band}"}})', band) for band in BAND_COLOURS],
        stacked="normal",
        colours=BAND_COLOURS,
    ),
    timeseries(
        "Rollouts by success rate of their prompt",
        """Share of the rollouts allocated in the window to each band. Beside the panel to the
        left: whose share is larger here is given more than one of its size.""",
        "percentunit",
        [
            query(_sum("allocated_rollouts_total", "$window", f', band="{band}"'), band)
            for band in BAND_COLOURS
        ],
        stacked="percent",
        colours=BAND_COLOURS,
    ),
    heatmap(
        "Group sizes",
        """How many groups were given how many rollouts in one wave, in the window. A uniform
        budget is one line; a tall cloud has large groups, which generation has to bear.""",
        _sum("group_wave_rollouts_bucket", "$window", by="le"),
    ),
]

_BELIEVED = [
    timeseries(
        "Predictions of judged groups",
        """Of the groups whose rollouts have all come, what was predicted and what came. The same
        groups in both lines, so a gap is an error: success rates that have moved, or rewards
        that are not of the prompt they are reported for.""",
        "percentunit",
        [
            query(
                _ratio("judged_effective_groups_total", "judged_groups_total", "$window"),
                "realised",
            ),
            query(
                _ratio("judged_predicted_effective_groups_total", "judged_groups_total", "$window"),
                "predicted",
            ),
        ],
        colours={"realised": "blue", "predicted": "light-blue"},
        dashed=("predicted",),
    ),
    table(
        "Calibration",
        """The same, over all of the time shown, by what was predicted. Where the last two columns
        part, predictions of that kind are off; rows of few groups say little.""",
        [
            query(_sum("judged_groups_total", "$__range", by="chance"), table=True),
            query(
                f"{_sum('judged_predicted_effective_groups_total', '$__range', by='chance')}"
                f" / {_sum('judged_groups_total', '$__range', by='chance')}",
                table=True,
            ),
            query(
                f"{_sum('judged_effective_groups_total', '$__range', by='chance')}"
                f" / {_sum('judged_groups_total', '$__range', by='chance')}",
                table=True,
            ),
        ],
        "chance",
        {
            "A": ("groups", "short"),
            "B": ("predicted", "percentunit"),
            "C": ("realised", "percentunit"),
        },
    ),
    timeseries(
        "Age of what is known",
        """Steps since the newest outcome of the prompts that are allocated rollouts. About an
        epoch where every prompt comes once in each. Old evidence counts less.""",
        "none",
        [
            query(_quantile(0.5, "evidence_age_steps"), "median"),
            query(_quantile(0.9, "evidence_age_steps"), "90 %"),
        ],
    ),
]

_ARRIVED = [
    timeseries(
        "Rollouts in the window",
        """Rollouts allocated, reported, ignored because a rewind forgot their step, and budget
        that the bounds could not hold.""",
        "short",
        [
            query(_sum("allocated_rollouts_total", "$window"), "allocated"),
            query(_sum("reported_rollouts_total", "$window"), "reported"),
            query(_sum("ignored_rollouts_total", "$window"), "ignored"),
            query(_sum("unallocated_rollouts_total", "$window"), "not held by the bounds"),
        ],
        colours={
            "allocated": EXPECTED,
            "reported": "blue",
            "ignored": "red",
            "not held by the bounds": "orange",
        },
        dashed=("allocated",),
    ),
    timeseries(
        "Without the scheduler",
        """Rollouts reported that the scheduler did not allocate, and reports that wait in the
        outbox of the run's client, as it said in its last call.""",
        "short",
        [
            query(
                _sum("reported_without_allocation_rollouts_total", "$window"),
                "rollouts divided by the client",
            ),
            query(f"max({_S}client_pending_reports{{{_RUN}}})", "reports waiting"),
        ],
        colours={"rollouts divided by the client": "orange", "reports waiting": "red"},
    ),
    timeseries(
        "How late reports come",
        """For one report in ten or fewer, the steps that the run had gone on when it came, and how
        many policy versions its rollouts were behind the newest one.""",
        "none",
        [
            query(_quantile(0.9, "report_lag_steps"), "steps, 90 %"),
            query(_quantile(0.9, "report_lag_versions"), "policy versions, 90 %"),
        ],
    ),
    timeseries(
        "Rollouts saved in the window",
        """Rollouts that uniform groups would have taken for as much, less those that were
        generated: as many effective groups, as many rollouts in such groups (both counted,
        uniform's predicted), or as much expected value. The default objective gives up groups
        of easy prompts for groups of hard ones, so that the first may be below 0. See
        METRICS.md.""",
        "short",
        [
            query(
                _saved(
                    "effective_groups_total",
                    "predicted_uniform_effective_groups_total",
                    "reported_rollouts_total",
                ),
                "by groups",
            ),
            query(
                _saved(
                    "effective_rollouts_total",
                    "predicted_uniform_effective_rollouts_total",
                    "reported_rollouts_total",
                ),
                "by rollouts",
            ),
            query(
                _saved(
                    "predicted_value_total",
                    "predicted_uniform_value_total",
                    "predicted_rollouts_total",
                ),
                "by value, predicted",
            ),
        ],
        colours={"by groups": "purple", "by rollouts": "blue", "by value, predicted": "green"},
        dashed=("by value, predicted",),
        minimum=None,
    ),
    timeseries(
        "Step",
        "The trainer's step, and its policy version.",
        "none",
        [
            query(f"max({_S}step{{{_RUN}}})", "step"),
            query(f"max({_S}policy_version{{{_RUN}}})", "policy version"),
        ],
    ),
    timeseries(
        "Rewinds",
        "Times that the run was taken back to an earlier step, as by a resume.",
        "none",
        [query(_sum("rewinds_total", "$window"), "rewinds")],
    ),
]


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "knapsack-run",
        "knapsack-rl / Run",
        "Is the rollout budget of a run spent well?",
        [
            *_TODAY,
            row("Is the budget spent well?"),
            *_WELL_SPENT,
            row("Who gets it?"),
            *_WHO,
            row("Can it be believed?"),
            *_BELIEVED,
            row("Did it arrive?"),
            *_ARRIVED,
        ],
        [
            datasource_variable(),
            label_variable("job", "Job", f"{_S}build_info", "job"),
            label_variable("run", "Run", f'{_S}step{{job=~"$job"}}', "run_id", everything=False),
            choice_variable(
                "window", "Averaged over", ("5m", "10m", "30m", "1h", "3h", "12h"), "30m"
            ),
        ],
    )

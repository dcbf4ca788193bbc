"""Is the scheduler healthy: what whoever runs it looks at."""

from __future__ import annotations

from panels import (
    Json,
    dashboard,
    datasource_variable,
    label_variable,
    query,
    row,
    stat,
    table,
    timeseries,
)

_S = "knapsack_scheduler_"
_AT = 'job=~"$job", instance=~"$instance"'
_REFUSED = "INVALID_ARGUMENT|NOT_FOUND|ALREADY_EXISTS|FAILED_PRECONDITION"


def _rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({_S}{metric}{{{_AT}{more}}}[$__rate_interval]))"


def _quantile(share: float, metric: str, by: str = "", more: str = "") -> str:
    grouped = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {_rate(metric + '_bucket', grouped, more)})"


_NOW = [
    stat(
        "Serving",
        "Schedulers that serve calls, of those that answer Prometheus.",
        "none",
        f"sum({_S}ready{{{_AT}}})",
        thresholds=((None, "red"), (1, "green")),
    ),
    stat(
        "Answered",
        "Share of the calls that ended as OK, over the time shown.",
        "percentunit",
        f'sum(increase({_S}calls_total{{{_AT}, code="OK"}}[$__range]))'
        f" / sum(increase({_S}calls_total{{{_AT}}}[$__range]))",
        decimals=2,
        thresholds=((None, "red"), (0.95, "orange"), (0.99, "green")),
    ),
    stat(
        "Calls per second",
        "Over the time shown.",
        "reqps",
        f"sum(rate({_S}calls_total{{{_AT}}}[$__range]))",
        decimals=2,
    ),
    stat(
        "Allocate, 99 %",
        "Within this time 99 in 100 Allocate calls were answered. Trainers give up after 2 s.",
        "s",
        f"histogram_quantile(0.99, sum by (le) (rate({_S}call_seconds_bucket"
        f'{{{_AT}, method="Allocate"}}[$__range])))',
        thresholds=((None, "green"), (0.5, "orange"), (1, "red")),
    ),
    stat(
        "Store failures",
        "Transactions of the store that failed, over the time shown.",
        "short",
        f"sum(increase({_S}store_failures_total{{{_AT}}}[$__range]))",
        decimals=0,
        thresholds=((None, "green"), (0.5, "red")),
    ),
    stat(
        "Runs",
        "Runs that have series here: at most 100 a scheduler, others share the name other.",
        "none",
        f"count(count by (run_id) ({_S}step{{{_AT}}}))",
    ),
    stat(
        "Known prompts",
        "Prompts with an outcome, of all these runs.",
        "short",
        f"sum(max by (run_id) ({_S}known_prompts{{{_AT}}}))",
    ),
    stat(
        "Up for",
        "Time since the start of the scheduler that began last.",
        "s",
        f"time() - max(process_start_time_seconds{{{_AT}}})",
        decimals=0,
    ),
]

_CALLS = [
    timeseries(
        "Calls",
        "Calls per second, by method.",
        "reqps",
        [query(_rate("calls_total", "method") + " > 0", "{{method}}")],
    ),
    timeseries(
        "Calls without an answer",
        """Calls per second that did not end as OK. Refusals are the caller's fault, INTERNAL and
        UNAVAILABLE ours.""",
        "reqps",
        [query(_rate("calls_total", "code", ', code!="OK"') + " > 0 or "
               + _rate("calls_total", "code", f', code=~"{_REFUSED}|INTERNAL|UNAVAILABLE"'),
               "{{code}}")],
    ),
    timeseries(
        "Time to an answer, 99 %",
        "Within this time 99 in 100 calls were answered. Trainers give up after 2 s.",
        "s",
        [query(_quantile(0.99, "call_seconds", "method", ', method=~"Allocate|Extend|Report"'),
               "{{method}}")],
    ),
    timeseries(
        "Time to an answer, median",
        "Within this time half of the calls were answered.",
        "s",
        [query(_quantile(0.5, "call_seconds", "method", ', method=~"Allocate|Extend|Report"'),
               "{{method}}")],
    ),
    timeseries(
        "Time to divide a budget",
        "Of which this is the part of the solver.",
        "s",
        [
            query(_quantile(0.5, "solve_seconds"), "median"),
            query(_quantile(0.99, "solve_seconds"), "99 %"),
        ],
    ),
    timeseries(
        "Calls under way",
        "By method, at the moment of the scrape.",
        "none",
        [query(f"sum by (method) ({_S}calls_in_progress{{{_AT}}}) > 0 or "
               f'sum by (method) ({_S}calls_in_progress{{{_AT}, method=~"Allocate|Report"}})',
               "{{method}}")],
    ),
]  # fmt: skip

_STORE = [
    timeseries(
        "Transactions",
        """Time of a transaction of the store, from the wait for its thread to the commit, the
        decision on a small batch included.""",
        "s",
        [
            query(_quantile(0.5, "store_transaction_seconds"), "median"),
            query(_quantile(0.99, "store_transaction_seconds"), "99 %"),
        ],
    ),
    timeseries(
        "Transactions per second",
        """All, those that failed (the disk is full, the database away), and those that were not
        begun as no thread came free in time.""",
        "ops",
        [
            query(_rate("store_transaction_seconds_count", "job"), "all"),
            query(_rate("store_failures_total", "job"), "failed"),
            query(_rate("store_busy_total", "job"), "busy"),
        ],
        colours={"all": "blue", "failed": "red", "busy": "orange"},
    ),
    timeseries(
        "Snapshots in an hour",
        "Written, and failed. Without snapshots starts grow slower and the store larger.",
        "none",
        [query(f"sum by (result) (increase({_S}snapshots_total{{{_AT}}}[1h]))", "{{result}}")],
        colours={"written": "blue", "failed": "red"},
    ),
    timeseries(
        "Size of the store",
        "A SQLite store's files, its log included. PostgreSQL has metrics of its own.",
        "bytes",
        [query(f"sum by (instance) ({_S}store_bytes{{{_AT}}})", "{{instance}}")],
    ),
    timeseries(
        "Free on the disk of the store",
        "Share of the disk that a SQLite store lies on.",
        "percentunit",
        [query(f"{_S}store_free_bytes{{{_AT}}} / {_S}store_disk_bytes{{{_AT}}}", "{{instance}}")],
        maximum=1,
    ),
]

_PROCESS = [
    timeseries(
        "Memory",
        "Resident. OPERATIONS.md has the bound.",
        "bytes",
        [query(f"process_resident_memory_bytes{{{_AT}}}", "{{instance}}")],
    ),
    timeseries(
        "Processor",
        "Cores used. One event loop and a few threads: more than two is rare.",
        "none",
        [query(f"rate(process_cpu_seconds_total{{{_AT}}}[$__rate_interval])", "{{instance}}")],
    ),
    timeseries(
        "Event loop",
        """How much later than it was due the event loop came to a timer, 99 %. Every call waits for
        it.""",
        "s",
        [query(_quantile(0.99, "event_loop_lag_seconds", "instance"), "{{instance}}")],
    ),
    timeseries(
        "Requests and answers in memory",
        "Share of the room that calls may take. At 100 % they wait, then are refused.",
        "percentunit",
        [query(f"{_S}inflight_bytes{{{_AT}}} / {_S}inflight_limit_bytes{{{_AT}}}", "{{instance}}")],
        maximum=1,
    ),
    timeseries(
        "Runs in memory",
        "Share of the room that runs may take; the one used last stays whatever its size.",
        "percentunit",
        [query(f"{_S}loaded_bytes{{{_AT}}} / {_S}loaded_limit_bytes{{{_AT}}}", "{{instance}}")],
    ),
    timeseries(
        "Runs read from the store",
        """Calls per second that had to read their run first. Again and again: the runs in use do
        not fit into memory.""",
        "ops",
        [query(_rate("run_reads_total", "instance"), "{{instance}}")],
    ),
    timeseries(
        "Open files",
        "Connections and files, as a share of what the process may open.",
        "percentunit",
        [
            query(
                f"process_open_fds{{{_AT}}} / process_max_fds{{{_AT}}}",
                "{{instance}}",
            )
        ],
        maximum=1,
    ),
    timeseries(
        "Certificates are good for",
        """Time until the first certificate of a file that the API serves with ends. New files are
        taken without a restart; a line that does not jump up in time was not renewed. Empty
        without TLS.""",
        "s",
        [
            query(
                f"{_S}certificate_expiration_timestamp_seconds{{{_AT}}} - time()",
                "{{instance}} {{file}}",
            )
        ],
        minimum=None,
    ),
    table(
        "Schedulers",
        "Those that answer Prometheus.",
        [
            query(f"max by (instance, version, store) ({_S}build_info{{{_AT}}})", table=True),
            query(f"max by (instance) ({_S}ready{{{_AT}}})", table=True),
            query(f"max by (instance) (time() - process_start_time_seconds{{{_AT}}})", table=True),
        ],
        "instance",
        {"A": ("up", "none"), "B": ("ready", "none"), "C": ("up for", "s")},
    ),
]


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "knapsack-service",
        "knapsack-rl / Service",
        "Is the scheduler healthy?",
        [
            *_NOW,
            row("Calls"),
            *_CALLS,
            row("Store"),
            *_STORE,
            row("Process"),
            *_PROCESS,
        ],
        [
            datasource_variable(),
            label_variable("job", "Job", f"{_S}build_info", "job"),
            label_variable("instance", "Instance", f'{_S}build_info{{job=~"$job"}}', "instance"),
        ],
        since="now-6h",
    )

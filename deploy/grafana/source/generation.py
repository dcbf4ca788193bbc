"""Does generation keep up, and what do unequal groups cost: for whoever runs the GPUs."""

from __future__ import annotations

from panels import (
    Json,
    dashboard,
    datasource_variable,
    heatmap,
    label_variable,
    query,
    row,
    stat,
    timeseries,
)

_G = "knapsack_genserver_"
_AT = 'job=~"$job", instance=~"$instance"'
_VLLM = 'job=~"$vllm_job"'


def _rate(metric: str, by: str = "", more: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate({_G}{metric}{{{_AT}{more}}}[$__rate_interval]))"


def _quantile(share: float, metric: str, over: str = "$__rate_interval") -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({_G}{metric}_bucket{{{_AT}}}[{over}])))"


def _vllm_rate(metric: str, by: str = "", more: str = "") -> str:
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} (rate(vllm:{metric}{{{_VLLM}{more}}}[$__rate_interval]))"


def _vllm_quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, {_vllm_rate(metric + '_bucket', 'le')})"


_NOW = [
    stat(
        "Replicas",
        "Copies of the model that generate.",
        "none",
        f"sum({_G}replicas{{{_AT}}})",
    ),
    stat(
        "Tokens per second",
        "Completion tokens of finished rollouts, over the time shown.",
        "short",
        f"sum(rate({_G}completion_tokens_total{{{_AT}}}[$__range]))",
    ),
    stat(
        "Rollouts under way",
        "Being generated.",
        "short",
        f"sum({_G}running_rollouts{{{_AT}}})",
    ),
    stat(
        "Waiting",
        "Rollouts that wait for a place.",
        "short",
        f"sum({_G}waiting_rollouts{{{_AT}}})",
    ),
    stat(
        "Failed",
        "Share of the rollouts that ended in an error, over the time shown.",
        "percentunit",
        f'sum(increase({_G}rollouts_total{{{_AT}, finish_reason="error"}}[$__range]))'
        f" / sum(increase({_G}rollouts_total{{{_AT}}}[$__range]))",
        decimals=2,
        thresholds=((None, "green"), (0.001, "orange"), (0.01, "red")),
    ),
    stat(
        "Tail of a wave",
        """Time to the last rollout of a wave over the time to 95 % of them, median over the time
        shown. 1 is no tail.""",
        "suffix:×",
        _quantile(0.5, "wave_tail_ratio", "$__range"),
        decimals=2,
        thresholds=((None, "green"), (1.5, "orange"), (3, "red")),
    ),
    stat(
        "Weights",
        "Version of the weights that serve: of several servers the oldest.",
        "none",
        f"min({_G}weight_version{{{_AT}}})",
    ),
    stat(
        "Weights are old",
        "Time since the weights that serve began to: of several servers the longest.",
        "s",
        f"time() - min({_G}weights_loaded_timestamp_seconds{{{_AT}}})",
        decimals=0,
    ),
]

_FLOW = [
    timeseries(
        "Rollouts per second",
        "Finished rollouts, by why they ended: stop, length (cut short), abort, error.",
        "ops",
        [query(_rate("rollouts_total", "finish_reason"), "{{finish_reason}}")],
        colours={"stop": "green", "length": "blue", "abort": "orange", "error": "red"},
    ),
    timeseries(
        "Tokens per second",
        """Completion tokens of finished rollouts, and prompt tokens, which a group of any size
        needs once.""",
        "short",
        [
            query(_rate("completion_tokens_total"), "completions"),
            query(_rate("prompt_tokens_total"), "prompts"),
        ],
    ),
    timeseries(
        "Rollouts",
        """Being generated, waiting for a place, finished and not read by their caller yet, and how
        many the engine is given at once.""",
        "short",
        [
            query(f"sum({_G}running_rollouts{{{_AT}}})", "running"),
            query(f"sum({_G}waiting_rollouts{{{_AT}}})", "waiting"),
            query(f"sum({_G}unread_rollouts{{{_AT}}})", "unread"),
            query(f"sum({_G}capacity_rollouts{{{_AT}}})", "capacity"),
        ],
        dashed=("capacity",),
        colours={"capacity": "#8e9aaf"},
    ),
    timeseries(
        "Calls that did not end well",
        "Calls per second that did not end as OK.",
        "reqps",
        [query(_rate("calls_total", "method, code", ', code!="OK"') + " or label_replace("
               + _rate("calls_total", "method") + ' * 0, "code", "other than OK", "", "")',
               "{{method}} {{code}}")],
    ),
]  # fmt: skip

_TAIL = [
    heatmap(
        "Group sizes",
        """How many groups were asked for how many rollouts. Large groups make the tail of a
        wave.""",
        f"sum by (le) (increase({_G}group_size_rollouts_bucket{{{_AT}}}[$__rate_interval]))",
    ),
    timeseries(
        "Time of a wave and of a group",
        """From a wave's arrival to its last rollout, and to the last one of each of its prompts.
        The nearer the two, the less a few large groups hold up the step.""",
        "s",
        [
            query(_quantile(0.5, "wave_seconds"), "wave, median"),
            query(_quantile(0.9, "wave_seconds"), "wave, 90 %"),
            query(_quantile(0.5, "group_seconds"), "group, median"),
            query(_quantile(0.9, "group_seconds"), "group, 90 %"),
        ],
    ),
    timeseries(
        "Tail of waves",
        """Time to the last rollout of a wave over the time to 95 % of them: what the last 5 % of
        rollouts cost. Waves of fewer than 20 rollouts are left out.""",
        "suffix:×",
        [
            query(_quantile(0.5, "wave_tail_ratio"), "median"),
            query(_quantile(0.9, "wave_tail_ratio"), "90 %"),
        ],
        minimum=1,
    ),
]

_WEIGHTS = [
    timeseries(
        "Weight updates",
        "In an hour, by how they ended. After a failed one the old weights serve.",
        "none",
        [query(f"sum by (result) (increase({_G}weight_updates_total{{{_AT}}}[1h]))", "{{result}}")],
        colours={"served": "blue", "failed": "red"},
    ),
    timeseries(
        "Time of a weight update",
        "From its arrival to its end. How long no token was made meanwhile vLLM knows, see below.",
        "s",
        [
            query(_quantile(0.5, "weight_update_seconds", "1h"), "median"),
            query(_quantile(0.9, "weight_update_seconds", "1h"), "90 %"),
        ],
    ),
    timeseries(
        "Weight version",
        "By server. They should move together.",
        "none",
        [query(f"{_G}weight_version{{{_AT}}}", "{{instance}}")],
        minimum=None,
    ),
]

_REPLICAS = [
    timeseries(
        "Replicas",
        """Copies of the model that generate, and that there should be. Those that are lost are
        started again; `knapsack-genserver replicas` says why one does not serve.""",
        "none",
        [
            query(f"sum({_G}replicas{{{_AT}}})", "serve"),
            query(f"sum({_G}wanted_replicas{{{_AT}}})", "wanted"),
        ],
        dashed=("wanted",),
        colours={"wanted": "#8e9aaf"},
    ),
    timeseries(
        "Rollouts by replica",
        "That each holds. One that stays full while others are empty is what a step waits for.",
        "short",
        [query(f"{_G}replica_running_rollouts{{{_AT}}}", "{{instance}} {{replica}}")],
    ),
    timeseries(
        "Lost, and made anew",
        """Replicas lost in an hour, and rollouts per second asked for anew because a replica was
        lost or failed with them. They are paid for twice, and arrive once.""",
        "short",
        [
            query(f"sum(increase({_G}replica_losses_total{{{_AT}}}[1h]))", "replicas in an hour"),
            query(_rate("redone_rollouts_total"), "rollouts per second"),
        ],
    ),
]

_ENGINE = [
    timeseries(
        "vLLM: requests",
        "Running and waiting, by vLLM's own count, with those it set back for want of memory.",
        "short",
        [
            query(f"sum(vllm:num_requests_running{{{_VLLM}}})", "running"),
            query(f"sum(vllm:num_requests_waiting{{{_VLLM}}})", "waiting"),
            query(_vllm_rate("num_preemptions_total"), "preempted per second"),
        ],
    ),
    timeseries(
        "vLLM: key-value cache",
        "Share in use, by engine. Near 100 % requests wait or are set back.",
        "percentunit",
        [query(f"max by (instance, engine) (vllm:kv_cache_usage_perc{{{_VLLM}}})",
               "{{instance}} engine {{engine}}")],
        maximum=1,
    ),
    timeseries(
        "vLLM: prefix cache",
        """Share of prompt tokens found in the prefix cache. A group needs its prompt once, so this
        should grow with the size of the groups.""",
        "percentunit",
        [
            query(
                f"{_vllm_rate('prefix_cache_hits_total')}"
                f" / ({_vllm_rate('prefix_cache_queries_total')} > 0)",
                "found",
            )
        ],
        maximum=1,
    ),
    timeseries(
        "vLLM: tokens per second",
        "Generated, and of prompts.",
        "short",
        [
            query(_vllm_rate("generation_tokens_total"), "generated"),
            query(_vllm_rate("prompt_tokens_total"), "prompts"),
        ],
    ),
    timeseries(
        "vLLM: pause of a weight update",
        "Time in which no token was made, 90 % of the updates of an hour.",
        "s",
        [query(_quantile(0.9, "weight_pause_seconds", "1h"), "pause, 90 %")],
    ),
    timeseries(
        "vLLM: time between tokens",
        "Of one request.",
        "s",
        [
            query(_vllm_quantile(0.5, "inter_token_latency_seconds"), "median"),
            query(_vllm_quantile(0.99, "inter_token_latency_seconds"), "99 %"),
        ],
    ),
    timeseries(
        "vLLM: time of a request",
        "Waiting for its turn, to its first token, and whole.",
        "s",
        [
            query(_vllm_quantile(0.9, "request_queue_time_seconds"), "queue, 90 %"),
            query(_vllm_quantile(0.9, "time_to_first_token_seconds"), "first token, 90 %"),
            query(_vllm_quantile(0.9, "e2e_request_latency_seconds"), "whole, 90 %"),
        ],
    ),
]  # fmt: skip


def build() -> Json:
    """Return the dashboard."""
    return dashboard(
        "knapsack-generation",
        "knapsack-rl / Generation",
        "Does generation keep up, and what do unequal groups cost?",
        [
            *_NOW,
            row("Flow"),
            *_FLOW,
            row("The tail of unequal groups"),
            *_TAIL,
            row("Weights"),
            *_WEIGHTS,
            row("Replicas"),
            *_REPLICAS,
            row("vLLM"),
            *_ENGINE,
        ],
        [
            datasource_variable(),
            label_variable("job", "Job", f"{_G}replicas", "job"),
            label_variable("instance", "Instance", f'{_G}replicas{{job=~"$job"}}', "instance"),
            label_variable("vllm_job", "vLLM job", "vllm:num_requests_running", "job"),
        ],
        since="now-6h",
    )

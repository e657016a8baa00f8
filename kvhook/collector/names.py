"""The collector's tables: every value by vLLM's current name, where each vLLM keeps it, and the names that scripts
already use."""

from __future__ import annotations

from typing import NamedTuple

from kvhook.adapters.config import FACTS as ENGINE_FACTS

#: The sources, in the order in which they are tried.
HOOK, INTERNAL, REGISTRY = "hook", "internal_engine_stats", "prometheus_registry"
SOURCES = (HOOK, INTERNAL, REGISTRY)
UNAVAILABLE = "unavailable"

STATE, TOTAL = "state", "total"


class Value(NamedTuple):
    """A number that every source may know, under its name in `kvhook.schema`.

    ``metrics``: names in vLLM's Prometheus registry, newest first.
    """

    name: str
    kind: str
    metrics: tuple[str, ...]


V0_RATE = "v0_prefix_cache_hit_rate"

VALUES: tuple[Value, ...] = (
    Value("kv_cache_usage", STATE, ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")),
    Value("num_running_reqs", STATE, ("vllm:num_requests_running",)),
    Value("num_waiting_reqs", STATE, ("vllm:num_requests_waiting",)),
    Value("prefix_cache_queries", TOTAL, ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries")),
    Value("prefix_cache_hits", TOTAL, ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits")),
    Value("num_prompt_tokens", TOTAL, ("vllm:prompt_tokens",)),
    Value("num_generation_tokens", TOTAL, ("vllm:generation_tokens",)),
    Value("num_preempted_reqs", TOTAL, ("vllm:num_preemptions",)),
    Value("num_finished_reqs", TOTAL, ("vllm:request_success",)),
    # V0 alone: a running rate over blocks; below 0 where prefix caching is off
    Value(V0_RATE, STATE, ("vllm:gpu_prefix_cache_hit_rate",)),
)

#: V0 on a CPU keeps some values in other metrics from 0.9 on.
V0_ON_CPU = {
    "kv_cache_usage": "vllm:cpu_cache_usage_perc",
    V0_RATE: "vllm:cpu_prefix_cache_hit_rate",
}

#: The gauge whose labels are the cache's configuration.
CACHE_CONFIG = "vllm:cache_config_info"


class Key(NamedTuple):
    """A name under which scripts expect a value, and what to multiply the value with."""

    key: str
    value: str
    factor: int = 1


#: Beside vLLM's current names, which are all there as well.
KEYS: tuple[Key, ...] = (
    Key("gpu_cache_usage_sys", "kv_cache_usage"),
    Key("gpu_cache_usage_percent", "kv_cache_usage", 100),
    Key("gpu_prefix_cache_hit_rate", "prefix_cache_hit_rate"),
    Key("gpu_prefix_cache_hit_rate_percent", "prefix_cache_hit_rate", 100),
    Key("gpu_prefix_cache_hits", "prefix_cache_hits"),
    Key("gpu_prefix_cache_queries", "prefix_cache_queries"),
    Key("num_running_sys", "num_running_reqs"),
    Key("num_waiting_sys", "num_waiting_reqs"),
    Key("requests_running", "num_running_reqs"),
    Key("requests_waiting", "num_waiting_reqs"),
    Key("prompt_tokens_total", "num_prompt_tokens"),
    Key("generation_tokens_total", "num_generation_tokens"),
)

#: The names of vLLM's Prometheus metrics, of every release, whichever of them runs: a script looks for those that it
#: was written with. A counter is found both by its own name and by that of its sample.
METRIC_KEYS: tuple[Key, ...] = tuple(
    Key(metric + ending, "prefix_cache_hit_rate" if value.name == V0_RATE else value.name)
    for value in VALUES
    for metric in value.metrics
    for ending in (("", "_total") if value.kind == TOTAL else ("",))
)

#: vLLM's default buckets, in seconds.
_TTFT_BOUNDS: tuple[float, ...] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
_ITL_BOUNDS: tuple[float, ...] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_E2E_BOUNDS: tuple[float, ...] = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)


class Times(NamedTuple):
    """A histogram of times in seconds, under its current name in the registry less ``vllm:``.

    ``series`` (single latencies) or ``column`` say where kvhook has it: of a series the steps' column that counts its
    values, else the column of the finished requests itself. ``bounds`` are vLLM's default buckets. ``also``: another
    name for it; ``average`` and ``total``: its names in ``histogram_analysis``.
    """

    name: str
    metrics: tuple[str, ...]
    bounds: tuple[float, ...]
    series: str = ""
    column: str = ""
    also: str = ""
    average: str = ""
    total: str = ""


TIMES: tuple[Times, ...] = (
    Times(
        "time_to_first_token_seconds",
        ("vllm:time_to_first_token_seconds",),
        _TTFT_BOUNDS,
        series="time_to_first_token",
        column="ttft_count",
        average="avg_time_to_first_token_seconds",
        total="total_ttft_requests",
    ),
    Times(
        "inter_token_latency_seconds",
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        _ITL_BOUNDS,
        series="inter_token_latency",
        column="itl_count",
        also="time_per_output_token_seconds",
        average="avg_time_per_output_token_seconds",
        total="total_tpot_samples",
    ),
    Times(
        "request_time_per_output_token_seconds",
        ("vllm:request_time_per_output_token_seconds",),
        _ITL_BOUNDS,
        column="mean_time_per_output_token",
    ),
    Times(
        "e2e_request_latency_seconds",
        ("vllm:e2e_request_latency_seconds",),
        _E2E_BOUNDS,
        column="e2e_latency",
        average="avg_e2e_latency_seconds",
        total="total_e2e_requests",
    ),
)

#: Where an engine keeps its stat loggers: a list, a dictionary or a single one, in one release or another.
LOGGERS = (
    "logger_manager.stat_loggers",
    "logger_manager.prometheus_logger",
    "logger_manager.per_engine_logger_dict",
    "stat_logger",
    "stat_loggers",
)
#: V1's scheduler, where the engine core lives in the engine's process.
SCHEDULER = "engine_core.engine_core.scheduler"
#: The last step's scheduler stats, in V1's logging logger.
LAST_STATS = "last_scheduler_stats"

#: Facts about the environment, and where an engine has them: below its VllmConfig, as the adapters say.
FACTS = {
    name: f"vllm_config.{ENGINE_FACTS[name]}"
    for name in ("model", "device", "block_size", "num_gpu_blocks", "enable_prefix_caching")
}

"""Checks as people's own scripts make them: of a collector that was written elsewhere, and that kvhook's replaces.

Such a script looks before it asks (``in``, ``get``), goes by parts of names, formats what it finds as numbers, and
takes any exception for a failed check. Each function here is one check and says whether it passes; what it saw is kept
in ``seen``, so that a test can hold it against the truth. Nothing in here knows more of kvhook than the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Collected = dict[str, Any]

METHODS = (
    *("collect_internal_stats", "_collect_prometheus_registry_only", "collect_prometheus_metrics"),
    *("get_comprehensive_stats", "start_monitoring", "stop_monitoring"),
)


def with_part(found: dict[str, Any], *parts: str) -> dict[str, Any]:
    """What is found under names that have one of these parts."""
    return {name: value for name, value in found.items() if any(part in name.lower() for part in parts)}


def shown(found: Iterable[float]) -> list[str]:
    """Every value as such a script prints it."""
    return [f"{value:.3f}" for value in found]


class Structure:
    """Seven checks without an engine."""

    def __init__(self, collector_class: Callable[..., Any]) -> None:
        self.make = collector_class

    def is_made(self) -> bool:
        made = [self.make(), self.make(llm=None, collection_interval=1.0), self.make(llm_instance=None)]
        return made[1].collection_interval == 1.0 and len(made) == 3

    def has_methods(self) -> bool:
        return all(hasattr(self.make(llm=None), name) for name in METHODS)

    def internal_stats_without_engine(self) -> bool:
        found = self.make(llm=None).collect_internal_stats()
        f"{found.get('collection_method', 'unknown')} {found.get('stats_available', False)} {list(found['debug_info'])}"
        return isinstance(found, dict) and not found["stats_available"] and isinstance(found["error"], str)

    def registry_without_engine(self) -> bool:
        found = self.make(llm=None)._collect_prometheus_registry_only()
        keys = {"collection_method", "stats_available", "metrics_found", "debug_info", "total_metrics_found"}
        f"{found.get('total_metrics_found', 0):d} {found.get('total_histograms_found', 0):d}"
        return isinstance(found, dict) and keys <= set(found)

    def comprehensive_stats(self) -> bool:
        found = self.make(llm=None, collection_interval=2.0).get_comprehensive_stats()
        keys = ("latest_stats", "monitoring_active", "total_collections", "collection_interval", "collection_method")
        f"{found.get('collection_interval', 0)} {found.get('modern_metrics_enabled', False)}"
        return all(key in found for key in keys) and found["collection_interval"] == 2.0

    def key_metrics(self) -> bool:
        found = self.make(llm=None).get_comprehensive_stats()
        key, times = found.get("key_metrics", {}), found.get("histogram_analysis", {})
        shown(key.values())
        shown(times.values())
        if "gpu_cache_usage_percent" in key:
            f"{key['gpu_cache_usage_percent']:.1f}"
        # nothing is known here, and a script must be able to tell
        return not key and not times and key.get("requests_running", 0) == 0

    def lifecycle(self) -> bool:
        collector = self.make(llm=None, collection_interval=0.1)
        states = [collector.monitoring]
        collector.start_monitoring()
        states.append(collector.monitoring)
        collector.stop_monitoring()
        states.append(collector.monitoring)
        return states == [False, True, False]

    def checks(self) -> list[Callable[[], bool]]:
        return [
            *(self.is_made, self.has_methods, self.internal_stats_without_engine, self.registry_without_engine),
            *(self.comprehensive_stats, self.key_metrics, self.lifecycle),
        ]


class Inference:
    """Four checks around ``generate``.

    Args:
        collector_class: the collector.
        llm: given to it as ``llm_instance``.
        generate: sends prompts to that engine, gives the answers.
    """

    def __init__(self, collector_class: Callable[..., Any], llm: Any, generate: Callable[[list[str]], list[Any]]):
        self.collector = collector_class(llm_instance=llm)
        self.generate = generate
        self.seen: dict[str, Any] = {}

    def basic_collection(self) -> bool:
        self.collector.start_monitoring()
        before = self.collector.collect_internal_stats()
        answers = self.generate(["Explain in simple terms what machine learning is about."])
        after = self.collector.collect_internal_stats()
        registry = self.collector._collect_prometheus_registry_only()
        self.seen["basic"] = before, after, registry
        for found in (before, after, registry):
            if found.get("stats_available"):
                f"{found.get('total_metrics_found', 0):d}"
                shown(with_part(found.get("metrics_found", {}), "cache", "prefix").values())
                shown(with_part(found.get("metrics_found", {}), "running", "waiting", "token", "request").values())
            else:
                f"not available: {found.get('error', 'unknown error')}"
        if self.collector.get_comprehensive_stats().get("key_metrics"):
            shown(self.collector.get_comprehensive_stats()["key_metrics"].values())
        self.collector.stop_monitoring()
        return len(answers) == 1 and any(found.get("stats_available") for found in (before, after, registry))

    def hit_rate_progression(self) -> bool:
        base = "Tell me about the good sides of energy from the sun and from the wind, as plainly as you can"
        self.collector.start_monitoring()
        progression: list[float | None] = []
        for end in (".", " in detail.", " for the world.", " against coal.", " in warm countries."):
            self.generate([base + end])
            found = self.collector.collect_internal_stats()
            hits = queries = None
            for name, value in found.get("metrics_found", {}).items():
                if "cache_hits" in name.lower():
                    hits = value
                elif "cache_queries" in name.lower():
                    queries = value
            progression.append(100 * hits / queries if hits is not None and queries else None)
        final = None
        for name, value in self.collector.get_comprehensive_stats().get("key_metrics", {}).items():
            if "hit_rate" in name.lower() and "percent" in name.lower():
                f"{value:.1f} %"
                final = value
                break
        self.collector.stop_monitoring()
        self.seen["hit rates"] = progression, final
        return len(progression) == 5 and (final is None or final > 0)

    def usage_progression(self) -> bool:
        self.collector.start_monitoring()
        self.collector.collect_internal_stats()
        answers = self.generate([f"Write a story about a robot that learns to {what}." for what in ("paint", "sing")])
        found = [self.collector.collect_internal_stats() for _ in range(3)]
        peak = None
        for one in found:
            for name, value in one.get("metrics_found", {}).items():
                if "usage" in name.lower() and "percent" in name.lower() and (peak is None or value > peak):
                    peak = value
        self.collector.get_comprehensive_stats()
        self.collector.stop_monitoring()
        self.seen["usage"] = found, peak
        return len(answers) == 2 and any(one.get("stats_available", False) for one in found)

    def every_method(self) -> bool:
        c = self.collector
        collected = {
            "internal": c.collect_internal_stats(),
            "registry": c._collect_prometheus_registry_only(),
            "main": c.collect_prometheus_metrics(),
        }
        working = [(one["total_metrics_found"], name) for name, one in collected.items() if one["stats_available"]]
        stats = c.get_comprehensive_stats()
        if stats.get("key_metrics"):
            working.append((0, "comprehensive"))
        f"{stats.get('monitoring_active', False)} {stats.get('total_collections', 0):d}"
        self.seen["methods"] = collected, stats, max(working, default=None)
        return bool(working)

    def checks(self) -> list[Callable[[], bool]]:
        return [self.basic_collection, self.hit_rate_progression, self.usage_progression, self.every_method]


def as_an_experiment_reads(collector: Any) -> dict[str, float]:
    """The numbers that an experiment takes from a collection by the names of vLLM's metrics."""
    found = collector.collect_prometheus_metrics()
    if not found.get("stats_available", False):
        return {}
    metrics, times = found.get("metrics_found", {}), found.get("histogram_data", {})
    out: dict[str, float] = {}
    for name in (
        *("vllm:gpu_cache_usage_perc", "vllm:gpu_prefix_cache_hit_rate", "vllm:gpu_prefix_cache_hits"),
        *("vllm:gpu_prefix_cache_queries", "vllm:num_requests_running", "vllm:num_requests_waiting"),
        *("vllm:num_requests_swapped", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    ):
        if name in metrics:
            out[name] = float(f"{metrics[name]:.6f}")
    for name in (
        *("vllm:time_to_first_token_seconds", "vllm:time_per_output_token_seconds"),
        *("vllm:e2e_request_latency_seconds",),
    ):
        if name in times and times[name].get("count", 0) > 0:
            out[name] = times[name]["sum"] / times[name]["count"]
    return out

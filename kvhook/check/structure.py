"""What can be checked without a vLLM: that everything is there, answers, and fails as it should."""

from __future__ import annotations

import contextlib
import json
import logging
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvhook.check import Check, Failed, expect
from kvhook.collector import VLLMMetricsCollector, names
from kvhook.collector.prometheus import from_collectors, numbers
from kvhook.collector.reading import Reading

_METHODS = (
    *("start_monitoring", "stop_monitoring", "collect_current_stats", "collect_internal_stats"),
    *("collect_prometheus_metrics", "get_comprehensive_stats", "get_metrics_history", "get_prometheus_metrics"),
    *("save_metrics", "plot_kv_cache_metrics", "debug_info", "close"),
)


class _Stats(NamedTuple):
    """V0's Stats, as far as the collector reads them."""

    num_running_sys: int = 2
    num_waiting_sys: int = 1
    gpu_cache_usage_sys: float = 0.5
    gpu_prefix_cache_hit_rate: float = 0.25


class _Engine:
    """Stands in for an engine that makes its stats on request."""

    broken = False

    def _get_stats(self, scheduler_outputs: Any) -> _Stats:
        if self.broken:
            raise OSError("the device is gone")
        return _Stats()


def imports() -> str:
    """Import."""
    import kvhook

    for name in kvhook.__all__:
        getattr(kvhook, name)
    return f"kvhook {kvhook.__version__}, {len(kvhook.__all__)} public names"


def methods() -> str:
    """Methods."""
    collector = VLLMMetricsCollector(llm_instance=None, collection_interval=1.0, enable_monitoring=True)
    missing = [name for name in _METHODS if not callable(getattr(collector, name, None))]
    if missing or collector.monitoring:
        raise Failed(f"missing: {', '.join(missing)}" if missing else "monitoring is on before it was started")
    return f"{len(_METHODS)} methods and `monitoring`"


def unavailable() -> str:
    """Without an engine."""
    with _silence():
        stats = VLLMMetricsCollector(object()).get_comprehensive_stats()
    json.dumps(stats, allow_nan=False)
    expect("collection_method", stats["collection_method"], names.UNAVAILABLE)
    reasons = stats["latest_stats"]["debug_info"]["not_available"]
    expect("sources with a reason", sorted(reasons), sorted((names.HOOK, names.INTERNAL, names.REGISTRY)))
    return "answers `unavailable`, with a reason for each source, as JSON"


def errors() -> str:
    """Error handling."""
    engine = _Engine()
    engine.broken = True
    collector = VLLMMetricsCollector(engine, source=names.INTERNAL)
    with _silence():
        expect("stats_available", collector.collect_current_stats()["stats_available"], False)
    engine.broken = False
    expect("stats_available afterwards", collector.collect_current_stats()["stats_available"], True)
    (error,) = collector.get_comprehensive_stats()["errors"]
    return f"contained, counted ({error['times']}) and named: {error['error']}"


def fallback() -> str:
    """Fallback."""
    engine = _Engine()
    with _silence():
        found = VLLMMetricsCollector(engine).collect_current_stats()
    expect("collection_method", found["collection_method"], names.INTERNAL)
    expect("sources that were tried before", list(found["debug_info"]["not_available"]), [names.HOOK])
    return f"{names.HOOK} -> {names.INTERNAL}, with the reason"


def key_metrics() -> str:
    """Key-metric extraction."""
    created = 1795477950.68
    metrics = []
    for name, total in (("vllm:prefix_cache_queries", 400), ("vllm:prefix_cache_hits", 100)):
        samples = [(f"{name}_total", total), (f"{name}_created", created)]
        metrics.append(_metric(name, "counter", samples))
    metrics.append(_metric("vllm:kv_cache_usage_perc", "gauge", [("vllm:kv_cache_usage_perc", 0.5)]))
    values = numbers(from_collectors(metrics))
    reading = Reading("check", dict(values), {}, {}, {}, True, "")
    expect("hit rate of 100 in 400", reading.values.get("prefix_cache_hit_rate"), 0.25)
    expect("usage", reading.values.get("kv_cache_usage"), 0.5)
    off = Reading("check", dict(values), {}, {}, {}, False, "")
    expect("hit rate with prefix caching off", off.values.get("prefix_cache_hit_rate"), None)
    gauges = [
        _metric(f"vllm:prefix_cache_{w}", "gauge", [(f"vllm:prefix_cache_{w}", 1e-4)]) for w in ("hits", "queries")
    ]
    expect("hit rate of two equal gauges", numbers(from_collectors(gauges)), {})
    only_created = [_metric(m.name, "counter", [(f"{m.name}_created", created)]) for m in metrics[:2]]
    expect("hit rate of creation timestamps", numbers(from_collectors(only_created)), {})
    return "counters make the hit rate; timestamps, gauges and a cache that is off make none"


def lifecycle() -> str:
    """Monitoring lifecycle."""
    engine = _Engine()
    collector = VLLMMetricsCollector(engine, 0.001, source=names.INTERNAL)
    collector.stop_monitoring()
    for _ in range(2):
        collector.start_monitoring()
        collector.start_monitoring()
        thread = collector._thread
        expect("monitoring", collector.monitoring, True)
        collector.stop_monitoring()
        collector.stop_monitoring()
        expect("monitoring after the stop", collector.monitoring, False)
        if thread is None or thread.is_alive():
            raise Failed("the sampling thread did not end")
    with collector:
        pass
    rows = len(collector.history())
    if rows < 6:
        raise Failed(f"{rows} samples of three monitored times with two each at least")
    return f"start, twice, stop, twice, again, with; {rows} samples"


CHECKS: tuple[Check, ...] = (imports, methods, unavailable, errors, fallback, key_metrics, lifecycle)


def _metric(name: str, kind: str, samples: list[tuple[str, float]]) -> Any:
    """A metric as prometheus_client gives it."""
    return types.SimpleNamespace(
        name=name, type=kind, samples=[types.SimpleNamespace(name=n, labels={}, value=v) for n, v in samples]
    )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without kvhook's warnings: they are what is being provoked."""
    log = logging.getLogger("kvhook")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before

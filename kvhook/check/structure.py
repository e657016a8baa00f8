"""What can be checked without a vLLM: that everything is there, answers, and fails as it should.

Nothing here depends on what else the process has done. In particular the Prometheus registry, of which a process has
one, may hold the numbers of an engine that was here before: every stand-in engine brings metrics of its own.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kvhook
from kvhook.check import Check, Failed, Skipped, expect
from kvhook.collector import VLLMMetricsCollector, names, prometheus
from kvhook.collector.reading import PREFIX_CACHING_OFF, Reading

#: What scripts call, and what they look up in the answers.
METHODS = (
    *("start_monitoring", "stop_monitoring", "close", "collect_current_stats", "collect_internal_stats"),
    *("collect_prometheus_metrics", "get_comprehensive_stats", "get_metrics_history", "get_prometheus_metrics"),
    *("save_metrics", "plot_kv_cache_metrics", "history", "environment", "debug_info"),
    *("_collect_prometheus_registry_only", "initialize_logging", "simulate_metrics_for_testing"),
)
COLLECTION = (
    *("collection_method", "stats_available", "metrics_found", "histogram_data", "total_metrics_found"),
    *("total_histograms_found", "debug_info", "timestamp", "collection_time"),
)
COMPREHENSIVE = (
    *("latest_stats", "monitoring_active", "total_collections", "collection_interval", "collection_method"),
    *("key_metrics", "histogram_analysis", "raw_metrics", "trend", "summary", "environment", "errors"),
)
ANALYSIS = (
    *("avg_time_to_first_token_seconds", "total_ttft_requests", "avg_time_per_output_token_seconds"),
    *("total_tpot_samples", "avg_e2e_latency_seconds", "total_e2e_requests"),
)

#: Of a counter's ``_created`` sample: Unix seconds, as prometheus_client writes them.
_CREATED = 1795477950.68

_REINSTALL = "reinstall kvhook into this Python: pip install --force-reinstall kvhook"


class StandIn:
    """Stands in for an engine. It makes V0's stats on request, and has metrics of its own; both can fail."""

    def __init__(self, *, stats: bool = True, metrics: Sequence[Any] = ()) -> None:
        self.stats = stats
        self.metrics = metrics
        self.broken = False

    def _get_stats(self, scheduler_outputs: Any) -> Any:
        if self.broken:
            raise OSError("the device is gone")
        if not self.stats:
            return types.SimpleNamespace()
        return types.SimpleNamespace(
            num_running_sys=2, num_waiting_sys=1, gpu_cache_usage_sys=0.5, gpu_prefix_cache_hit_rate=0.25
        )

    def get_metrics(self) -> Sequence[Any]:
        """In the place of ``LLM.get_metrics()``."""
        return self.metrics


class Counter:
    """As ``LLM.get_metrics()`` gives it."""

    def __init__(self, name: str, value: int) -> None:
        self.name, self.value, self.labels = name, value, {"engine": "0"}


class Strange:
    """A configuration that raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def imports() -> str:
    """Import."""
    for name in kvhook.__all__:
        if not hasattr(kvhook, name):
            raise Failed(f"kvhook.{name}", "to be there", "nothing of that name", _REINSTALL)
    if not sys.executable:
        raise Skipped("this Python does not know its own program, so no fresh one can be started")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import kvhook; "
        "print(*sorted({'vllm', 'torch', 'numpy', 'wrapt'} & set(sys.modules)))"
    )
    package = Path(kvhook.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "nothing said").splitlines()[-1]
        raise Failed("`import kvhook` in a fresh Python", "exit code 0", last, _REINSTALL)
    expect("other packages that `import kvhook` imports", done.stdout.split(), [])
    return f"kvhook {kvhook.__version__}, {len(kvhook.__all__)} public names; imports neither vLLM nor torch nor numpy"


def methods() -> str:
    """Methods and answers."""
    engine = StandIn()
    for collector in (
        VLLMMetricsCollector(engine),
        VLLMMetricsCollector(llm=engine, collection_interval=1.0, enable_monitoring=True),
        VLLMMetricsCollector(llm_instance=types.SimpleNamespace(llm_engine=engine)),
    ):
        expect("methods that are missing", [n for n in METHODS if not callable(getattr(collector, n, None))], [])
        expect("monitoring before it was started", collector.monitoring, False)
        with _silence():
            collected, stats = collector.collect_current_stats(), collector.get_comprehensive_stats()
        for what, answer, wanted in (
            ("a collection", collected, COLLECTION),
            ("the comprehensive stats", stats, COMPREHENSIVE),
            ("key_metrics", stats["key_metrics"] | stats["absent"], [k.key for k in names.KEYS]),
            ("histogram_analysis", stats["histogram_analysis"] | stats["absent"], ANALYSIS),
        ):
            expect(f"names that {what} lacks", sorted(set(wanted) - set(answer)), [])
        expect("the engine that was given is read from", collected["collection_method"], names.INTERNAL)
    return f"{len(METHODS)} methods, {len(names.KEYS)} key metrics, three ways to give the engine"


def unavailable() -> str:
    """Without anything to read."""
    engine = StandIn(stats=False)
    with _silence(), VLLMMetricsCollector(engine) as collector:
        stats, debug = collector.get_comprehensive_stats(), collector.debug_info()
    json.dumps([stats, debug], allow_nan=False)
    expect("collection_method", stats["collection_method"], names.UNAVAILABLE)
    expect("key metrics that have a value", list(stats["key_metrics"]), [])
    reasons = stats["latest_stats"]["debug_info"]["not_available"]
    expect("sources with a reason", [s for s, why in reasons.items() if why], list(names.SOURCES))
    expect("key metrics without a reason", [k.key for k in names.KEYS if not stats["absent"].get(k.key)], [])
    return "answers `unavailable`, with a reason for each source and each metric, as JSON"


def strange_objects() -> str:
    """Unknown objects and configurations."""
    odd = StandIn()
    odd.vllm_config = Strange()  # type: ignore[attr-defined]
    for engine in (object(), Strange(), 7, odd):
        with _silence(), VLLMMetricsCollector(engine) as collector:
            json.dumps([collector.get_comprehensive_stats(), collector.debug_info()], allow_nan=False)
    return "whatever is given as engine, nothing raises"


def errors() -> str:
    """Error handling."""
    engine = StandIn()
    engine.broken = True
    collector = VLLMMetricsCollector(engine, source=names.INTERNAL)
    with _silence():
        expect("stats_available while the engine fails", collector.collect_current_stats()["stats_available"], False)
    engine.broken = False
    expect("stats_available afterwards", collector.collect_current_stats()["stats_available"], True)
    found = collector.get_comprehensive_stats()["errors"]
    expect("errors", [(e["error"], e["times"]) for e in found], [("OSError: the device is gone", 1)])
    try:
        VLLMMetricsCollector(collection_interval=0)
    except kvhook.KvhookError:
        return "an error in the engine is contained, counted and named; a wrong argument is refused"
    raise Failed("collection_interval=0", "KvhookError", "nothing")


def fallback() -> str:
    """Fallback."""
    engine = StandIn(metrics=[Counter("vllm:prompt_tokens", 7)])
    said: list[str] = []
    with _listening(said):
        collector = VLLMMetricsCollector(engine)
        first, again = collector.collect_current_stats(), collector.collect_current_stats()
        engine.broken = True
        second = collector.collect_current_stats()
        engine.metrics = []
        third = collector.collect_current_stats()
    answers = [a["collection_method"] for a in (first, again, second, third)]
    expect("sources one after the other", answers, [names.INTERNAL, *names.SOURCES[1:], names.UNAVAILABLE])
    tried = [list(a["debug_info"]["not_available"]) for a in (first, second, third)]
    expect("sources that could not be read", tried, [[*names.SOURCES[:n]] for n in (1, 2, 3)])
    expect("prompt tokens of the registry", second["metrics_found"].get("prompt_tokens_total"), 7)
    expect("how often it was said", len([line for line in said if "the collector's source is" in line]), 3)
    return f"{' -> '.join((*names.SOURCES, names.UNAVAILABLE))}, each step said once"


def key_metrics() -> str:
    """Key-metric extraction."""
    counted = {"vllm:prefix_cache_queries": 400, "vllm:prefix_cache_hits": 100, "vllm:prompt_tokens": 400}
    metrics = [_metric(n, "counter", {f"{n}_total": v, f"{n}_created": _CREATED}) for n, v in counted.items()]
    metrics.append(_metric("vllm:kv_cache_usage_perc", "gauge", {"vllm:kv_cache_usage_perc": 0.5}))
    found = _read(metrics)
    expect("hit rate of 100 hits in 400 queries", found.get("gpu_prefix_cache_hit_rate"), 0.25)
    expect("hit rate in percent", found.get("gpu_prefix_cache_hit_rate_percent"), 25)
    expect("usage in percent", found.get("gpu_cache_usage_percent"), 50)
    expect("prompt tokens", found.get("prompt_tokens_total"), 400)
    expect("waiting requests, which were not there", found.get("num_waiting_sys"), None)
    return "counters, gauges and shares, under the names that scripts use"


def no_false_hit_rate() -> str:
    """No hit rate where there is none."""
    pair = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    created = [_metric(n, "counter", {f"{n}_created": _CREATED}) for n in pair]
    expect("hit rate of creation timestamps", _read(created).get("gpu_prefix_cache_hit_rate"), None)
    gauges = [_metric(n, "gauge", {n: 1e-4}) for n in pair]
    expect("hit rate of two small equal gauges", _read(gauges).get("gpu_prefix_cache_hit_rate"), None)
    zeros = [_metric(n, "counter", {f"{n}_total": 0.0, f"{n}_created": _CREATED}) for n in pair]
    expect("hit rate of nothing looked up", _read(zeros).get("gpu_prefix_cache_hit_rate"), None)
    off = Reading("check", dict(prometheus.numbers(prometheus.from_collectors(zeros))), {}, {}, {}, False, "")
    expect("hit rate with prefix caching off", off.values.get("prefix_cache_hit_rate"), None)
    expect("its reason", off.absent.get("prefix_cache_hit_rate"), PREFIX_CACHING_OFF)
    return "none of timestamps, gauges, no look-ups; none, with the reason, where prefix caching is off"


def lifecycle() -> str:
    """Monitoring lifecycle."""
    engine = StandIn()
    collector = VLLMMetricsCollector(engine, 0.001, source=names.INTERNAL)
    collector.stop_monitoring()
    for _ in range(2):
        collector.start_monitoring()
        thread = collector.sampling_thread
        collector.start_monitoring()
        expect("monitoring after the start", collector.monitoring, True)
        if thread is None or thread is not collector.sampling_thread or not thread.daemon:
            raise Failed("the sampling thread", "one daemon thread, also after a second start", repr(thread))
        collector.stop_monitoring()
        collector.stop_monitoring()
        expect("monitoring after the stop", collector.monitoring, False)
        expect("the sampling thread runs on", thread.is_alive(), False)
    with collector:
        expect("monitoring inside `with`", collector.monitoring, True)
    expect("monitoring after `with`", collector.monitoring, False)
    rows = len(collector.history())
    if rows < 6:
        raise Failed("samples", "6 at least: the first and the last of three monitored times", str(rows))
    return f"stop, start, twice, stop, twice, start again, with; {rows} samples"


def saving() -> str:
    """History and saving."""
    engine = StandIn()
    collector = VLLMMetricsCollector(engine, source=names.INTERNAL)
    for _ in range(3):
        collector.collect_current_stats()
    expect("entries of the history", len(collector.get_metrics_history()), 3)
    with tempfile.TemporaryDirectory(prefix="kvhook-check-") as folder:
        path = collector.save_metrics(Path(folder, "metrics.csv"))
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    expect("usage in the file", [row["kv_cache_usage"] for row in rows], ["0.5"] * 3)
    return "three collections, as a list and as a file"


CHECKS: tuple[Check, ...] = (
    *(imports, methods, unavailable, strange_objects, errors, fallback),
    *(key_metrics, no_false_hit_rate, lifecycle, saving),
)


def _metric(name: str, kind: str, samples: dict[str, float]) -> Any:
    """A metric as prometheus_client gives it."""
    return types.SimpleNamespace(
        name=name, type=kind, samples=[types.SimpleNamespace(name=n, labels={}, value=v) for n, v in samples.items()]
    )


def _read(metrics: list[Any]) -> dict[str, float]:
    """What the collector finds in a Prometheus registry with these metrics."""
    from kvhook.collector.answer import metrics_of

    values = prometheus.numbers(prometheus.from_collectors(metrics))
    return metrics_of(Reading("check", dict(values), {}, {}, {}, True, ""))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without kvhook's warnings: they are what is being provoked."""
    with _listening([]):
        yield


@contextlib.contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """Take kvhook's warnings into a list, and nowhere else."""
    log = logging.getLogger("kvhook")

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return False

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)

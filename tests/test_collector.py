"""The collector without a vLLM, and with stand-ins for one: lifecycle, sources, names, and what it must never say."""

from __future__ import annotations

import csv
import gc
import json
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.analysis.history import cut, even_edges, from_samples, monitored
from kvhook.collector import names, prometheus
from kvhook.collector.reading import Reading, histogram, hit_rate
from tests.conftest import Python
from tests.standin import fake_vllm, step_stats

COLLECTION = (
    *("collection_method", "stats_available", "metrics_found", "histogram_data", "total_metrics_found"),
    *("total_histograms_found", "debug_info", "timestamp", "collection_time"),
)
COMPREHENSIVE = (
    *("latest_stats", "monitoring_active", "total_collections", "collection_interval", "collection_method"),
    *("modern_metrics_enabled", "last_successful_collection"),
    *("key_metrics", "histogram_analysis", "raw_metrics", "trend", "summary", "environment", "errors"),
)
KEY_METRICS = (
    *("gpu_cache_usage_sys", "gpu_prefix_cache_hit_rate", "num_running_sys", "num_waiting_sys", "prompt_tokens_total"),
    *("generation_tokens_total", "gpu_cache_usage_percent", "gpu_prefix_cache_hit_rate_percent"),
    *("gpu_prefix_cache_hits", "gpu_prefix_cache_queries", "requests_running", "requests_waiting"),
)
ANALYSIS = (
    *("avg_time_to_first_token_seconds", "total_ttft_requests", "avg_time_per_output_token_seconds"),
    *("total_tpot_samples", "avg_e2e_latency_seconds", "total_e2e_requests"),
)


@pytest.fixture(autouse=True)
def _fresh(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed, and no Prometheus of another test is looked at."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "prometheus_client")


def strict(answer: Any) -> str:
    return json.dumps(answer, allow_nan=False)


# Without vLLM


def test_without_vllm_every_method_answers():
    collector = VLLMMetricsCollector()
    collector.start_monitoring()
    answers = [
        collector.collect_current_stats(),
        collector.collect_hook_stats(),
        collector.collect_internal_stats(),
        collector.collect_prometheus_metrics(),
    ]
    stats = collector.get_comprehensive_stats()
    assert collector.get_prometheus_metrics() == {}
    assert collector.get_metrics_history() == []
    collector.stop_monitoring()
    for answer in (*answers, stats["latest_stats"]):
        assert answer["collection_method"] == "unavailable"
        assert (answer["stats_available"], answer["metrics_found"], answer["total_metrics_found"]) == (False, {}, 0)
        assert all(answer["debug_info"]["not_available"].values())
    assert set(answers[0]["debug_info"]["not_available"]) == {names.HOOK, names.INTERNAL, names.REGISTRY}
    assert stats["key_metrics"] == stats["histogram_analysis"] == {}
    assert set(KEY_METRICS) <= set(stats["absent"])
    strict([answers, stats, collector.debug_info()])


def test_the_names_that_scripts_use_are_there():
    collector = VLLMMetricsCollector()
    assert set(COLLECTION) <= set(collector.collect_current_stats())
    assert set(COMPREHENSIVE) <= set(collector.get_comprehensive_stats())


@pytest.mark.parametrize(("part", "wanted"), [("key_metrics", KEY_METRICS), ("histogram_analysis", ANALYSIS)])
def test_what_is_not_known_gives_none_when_asked_and_is_not_in_the_answer(part: str, wanted: tuple[str, ...]):
    stats = VLLMMetricsCollector().get_comprehensive_stats()
    found = stats[part]
    for name in wanted:
        assert found[name] is None
        assert name not in found
        assert found.get(name, "none") == "none"
        assert stats["absent"][name]
    assert not found, "asking puts nothing in"
    with pytest.raises(KeyError):
        found["no_such_metric"]


def test_the_engine_is_taken_in_each_of_the_ways_that_scripts_use():
    engine = V0Engine()
    for collector in (
        VLLMMetricsCollector(engine),
        VLLMMetricsCollector(llm=engine),
        VLLMMetricsCollector(llm_instance=engine),
        VLLMMetricsCollector(types.SimpleNamespace(llm_engine=engine)),
    ):
        assert collector.collect_current_stats()["collection_method"] == names.INTERNAL


@pytest.mark.parametrize("interval", [0, -1, "soon", None, float("nan"), float("inf")])
def test_an_interval_that_is_none_is_refused(interval: Any):
    with pytest.raises(kvhook.KvhookError, match="collection_interval"):
        VLLMMetricsCollector(collection_interval=interval)


def test_an_unknown_source_is_refused_and_the_known_ones_named():
    with pytest.raises(kvhook.KvhookError, match="hook, internal_engine_stats, prometheus_registry"):
        VLLMMetricsCollector(source="log")


class Hostile:
    """Every attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileConfig:
    """An engine whose configuration is of no use."""

    vllm_config = Hostile()


@pytest.mark.parametrize("llm", [object(), Hostile(), HostileConfig(), 7, "text"], ids=lambda o: type(o).__name__)
def test_whatever_is_given_as_engine_nothing_raises(llm: Any):
    with VLLMMetricsCollector(llm) as collector:
        stats = collector.get_comprehensive_stats()
        assert stats["collection_method"] == "unavailable"
        strict([stats, collector.debug_info()])


class Colour:
    """An enum-like thing that cannot even be shown."""

    @property
    def value(self) -> str:
        raise ValueError

    def __str__(self) -> str:
        raise ValueError


def test_configuration_of_any_type_never_raises():
    engine = V0Engine()
    engine.vllm_config = types.SimpleNamespace(
        device_config=types.SimpleNamespace(device_type=Colour()),
        model_config=types.SimpleNamespace(model=Path("m")),
        cache_config=types.SimpleNamespace(block_size=16, enable_prefix_caching=1),
    )
    e = VLLMMetricsCollector(engine).environment()
    assert (e["device"], e["model"], e["block_size"], e["num_gpu_blocks"]) == (None, "m", 16, None)


# The engine's own objects


@dataclass
class V0Stats:
    num_running_sys: int = 3
    num_waiting_sys: int = 4
    gpu_cache_usage_sys: float = 0.25
    cpu_cache_usage_sys: float = 0.0
    gpu_prefix_cache_hit_rate: float = 0.5
    cpu_prefix_cache_hit_rate: float = -1.0


@dataclass(eq=False)
class V0Engine:
    """Makes V0's Stats on request; `asked` is released each time."""

    stats: V0Stats = field(default_factory=V0Stats)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    vllm_config: Any = None

    def _get_stats(self, scheduler_outputs: Any) -> V0Stats:
        assert scheduler_outputs is None
        self.asked.release()
        return self.stats

    def wait_until_asked(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.asked.acquire(timeout=60)


def collect(engine: Any) -> dict[str, Any]:
    """One collection; the engine lives until it is done, which a collector does not see to."""
    return VLLMMetricsCollector(engine).collect_current_stats()


def test_v0_gives_its_states_and_no_totals():
    found = collect(V0Engine())
    m = found["metrics_found"]
    assert (m["num_running_sys"], m["num_waiting_sys"], m["gpu_cache_usage_percent"]) == (3, 4, 25)
    assert (m["gpu_prefix_cache_hit_rate"], m["gpu_prefix_cache_hit_rate_percent"]) == (0.5, 50)
    assert "prompt_tokens_total" not in m
    assert "disable_log_stats=False" in found["absent"]["prompt_tokens_total"]


def test_v0_with_prefix_caching_off_says_so():
    found = collect(V0Engine(V0Stats(gpu_prefix_cache_hit_rate=-1.0)))
    assert "gpu_prefix_cache_hit_rate" not in found["metrics_found"]
    assert "prefix caching is off" in found["absent"]["gpu_prefix_cache_hit_rate_percent"]


ON_CPU = types.SimpleNamespace(device_config=types.SimpleNamespace(device_type="cpu"))


def test_v0_on_a_cpu_has_its_usage_and_hit_rate_elsewhere():
    engine = V0Engine(V0Stats(0, 0, 0.0, 0.75, 0.0, 0.25), vllm_config=ON_CPU)
    m = collect(engine)["metrics_found"]
    assert (m["gpu_cache_usage_sys"], m["gpu_prefix_cache_hit_rate"]) == (0.75, 0.25)
    # before 0.9 they are where they are on a GPU
    engine.stats = V0Stats(0, 0, 0.5, 0.0, 0.125, -1.0)
    m = collect(engine)["metrics_found"]
    assert (m["gpu_cache_usage_sys"], m["gpu_prefix_cache_hit_rate"]) == (0.5, 0.125)


def test_v0_on_a_gpu_is_not_confused_by_what_it_swaps_to_the_cpu():
    m = collect(V0Engine(V0Stats(0, 0, 0.25, 0.75, 0.125, 0.5)))["metrics_found"]
    assert (m["gpu_cache_usage_sys"], m["gpu_prefix_cache_hit_rate"]) == (0.25, 0.125)


@pytest.mark.parametrize(("config", "usage", "rate"), [(ON_CPU, 0.75, 0.25), (None, 0.0, 0.0)], ids=["cpu", "gpu"])
def test_v0s_metrics_on_a_cpu(config: Any, usage: float, rate: float, monkeypatch: pytest.MonkeyPatch):
    client: Any = types.ModuleType("prometheus_client")
    metrics = [gauge(f"vllm:{where}_cache_usage_perc", value) for where, value in (("gpu", 0.0), ("cpu", 0.75))]
    metrics += [gauge(f"vllm:{where}_prefix_cache_hit_rate", value) for where, value in (("gpu", 0.0), ("cpu", 0.25))]
    client.REGISTRY = types.SimpleNamespace(collect=lambda: metrics)
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    engine = V0Engine(vllm_config=config)
    m = VLLMMetricsCollector(engine).collect_prometheus_metrics()["metrics_found"]
    assert (m["gpu_cache_usage_sys"], m["gpu_prefix_cache_hit_rate"]) == (usage, rate)


def v1_engine(*, in_process: bool = True, loggers: tuple[Any, ...] = ()) -> Any:
    engine = type("LLMEngine", (), {})()
    engine.logger_manager = types.SimpleNamespace(stat_loggers=list(loggers))
    scheduler = types.SimpleNamespace(
        running=[1], waiting=[1, 2], kv_cache_manager=types.SimpleNamespace(usage=0.5, prefix_cache_stats=None)
    )
    engine.engine_core = types.SimpleNamespace()
    if in_process:
        engine.engine_core.engine_core = types.SimpleNamespace(scheduler=scheduler)
    return engine


def test_v1_in_process_gives_the_schedulers_queues_and_the_usage_of_the_blocks():
    m = collect(v1_engine())["metrics_found"]
    assert (m["num_running_sys"], m["num_waiting_sys"], m["gpu_cache_usage_sys"]) == (1, 2, 0.5)


def test_v1_in_another_process_gives_what_its_logger_was_last_told():
    last = types.SimpleNamespace(
        kv_cache_usage=0.75, num_running_reqs=5, num_waiting_reqs=1, num_skipped_waiting_reqs=2
    )
    adapter = types.SimpleNamespace(per_engine_stat_loggers={0: types.SimpleNamespace(last_scheduler_stats=last)})
    found = collect(v1_engine(in_process=False, loggers=(adapter,)))
    m = found["metrics_found"]
    assert (m["num_running_sys"], m["num_waiting_sys"], m["gpu_cache_usage_sys"]) == (5, 3, 0.75)


def test_v1_in_another_process_with_stats_off_holds_nothing_and_says_so():
    found = collect(v1_engine(in_process=False))
    assert found["collection_method"] == "unavailable"
    assert "another process" in found["debug_info"]["not_available"][names.INTERNAL]


# The registry


@dataclass
class Sample:
    name: str
    labels: dict[str, str]
    value: float


@dataclass
class Metric:
    name: str
    type: str
    samples: list[Sample]


def counter(name: str, *totals: float, created: float = 1795477950.68) -> Metric:
    """A counter as prometheus_client gives it: for each label set a total, and the time at which it was made."""
    samples = []
    for i, total in enumerate(totals):
        labels = {"engine": str(i)}
        samples += [Sample(f"{name}_total", labels, total), Sample(f"{name}_created", labels, created)]
    return Metric(name, "counter", samples)


def gauge(name: str, *values: float, **labels: str) -> Metric:
    return Metric(name, "gauge", [Sample(name, {"engine": str(i), **labels}, v) for i, v in enumerate(values)])


def from_registry(monkeypatch: pytest.MonkeyPatch, *metrics: Metric) -> dict[str, Any]:
    client: Any = types.ModuleType("prometheus_client")
    client.REGISTRY = types.SimpleNamespace(collect=lambda: list(metrics))
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    found = VLLMMetricsCollector(source=names.REGISTRY).get_comprehensive_stats()
    strict(found)
    return found


def test_creation_timestamps_are_never_counts(monkeypatch: pytest.MonkeyPatch):
    metrics = [counter("vllm:prefix_cache_queries", 0), counter("vllm:prefix_cache_hits", 0)]
    k = from_registry(monkeypatch, *metrics)["key_metrics"]
    assert (k["gpu_prefix_cache_queries"], k["gpu_prefix_cache_hits"], k["gpu_prefix_cache_hit_rate"]) == (0, 0, None)


def test_creation_timestamps_alone_are_no_counters(monkeypatch: pytest.MonkeyPatch):
    made = [
        Metric(f"vllm:prefix_cache_{what}", "counter", [Sample(f"vllm:prefix_cache_{what}_created", {}, 1795477950.68)])
        for what in ("hits", "queries")
    ]
    stats = from_registry(monkeypatch, *made, gauge("vllm:num_requests_running", 0))
    assert stats["key_metrics"]["gpu_prefix_cache_hits"] is None
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate_percent"] is None


def test_two_equal_gauges_are_no_hit_rate(monkeypatch: pytest.MonkeyPatch):
    metrics = [gauge("vllm:prefix_cache_hits", 0.0001), gauge("vllm:prefix_cache_queries", 0.0001)]
    stats = from_registry(monkeypatch, *metrics)
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate"] is None
    assert "gpu_prefix_cache_hit_rate" in stats["absent"]


def test_names_that_only_contain_the_words_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    metrics = [
        counter("vllm:external_prefix_cache_queries", 10),
        counter("vllm:external_prefix_cache_hits", 10),
        counter("vllm:mm_cache_hits", 10),
        gauge("vllm:num_requests_waiting_by_reason", 9),
    ]
    k = from_registry(monkeypatch, *metrics)["key_metrics"]
    assert {k["gpu_prefix_cache_hit_rate"], k["gpu_prefix_cache_hits"], k["num_waiting_sys"]} == {None}


def test_more_hits_than_queries_are_refused():
    assert hit_rate({"prefix_cache_queries": 5, "prefix_cache_hits": 6}, {}, True)[0] is None


def test_no_queries_yet_is_no_rate_and_says_why(monkeypatch: pytest.MonkeyPatch):
    stats = from_registry(monkeypatch, counter("vllm:prefix_cache_queries", 0), counter("vllm:prefix_cache_hits", 0))
    assert "no prompt token has been looked up yet" in stats["absent"]["gpu_prefix_cache_hit_rate_percent"]


def test_prefix_caching_off_is_read_from_the_registry_itself(monkeypatch: pytest.MonkeyPatch):
    config = gauge("vllm:cache_config_info", 1.0, enable_prefix_caching="False")
    stats = from_registry(
        monkeypatch, counter("vllm:prefix_cache_queries", 0), counter("vllm:prefix_cache_hits", 0), config
    )
    assert stats["key_metrics"]["gpu_prefix_cache_hit_rate"] is None
    assert "enable_prefix_caching=False" in stats["absent"]["gpu_prefix_cache_hit_rate"]


def test_engines_are_added_up_and_their_usage_averaged(monkeypatch: pytest.MonkeyPatch):
    k = from_registry(
        monkeypatch,
        counter("vllm:prompt_tokens", 10, 20),
        counter("vllm:prefix_cache_queries", 10, 30),
        counter("vllm:prefix_cache_hits", 0, 10),
        gauge("vllm:kv_cache_usage_perc", 0.25, 0.75),
        gauge("vllm:num_requests_running", 1, 2),
    )["key_metrics"]
    assert (k["prompt_tokens_total"], k["gpu_cache_usage_percent"], k["num_running_sys"]) == (30, 50, 3)
    assert k["gpu_prefix_cache_hit_rate"] == 0.25


def test_older_names_serve_where_the_newer_are_not(monkeypatch: pytest.MonkeyPatch):
    old = [
        gauge("vllm:gpu_cache_usage_perc", 0.5),
        counter("vllm:gpu_prefix_cache_queries", 8),
        counter("vllm:gpu_prefix_cache_hits", 4),
    ]
    k = from_registry(monkeypatch, *old)["key_metrics"]
    assert (k["gpu_cache_usage_percent"], k["gpu_prefix_cache_hit_rate_percent"]) == (50, 50)
    # 0.9 and 0.10 have both
    new = [
        gauge("vllm:kv_cache_usage_perc", 0.5),
        counter("vllm:prefix_cache_queries", 8),
        counter("vllm:prefix_cache_hits", 4),
    ]
    assert from_registry(monkeypatch, *old, *new)["key_metrics"] == k


def test_a_histogram_in_the_registry(monkeypatch: pytest.MonkeyPatch):
    name = "vllm:time_to_first_token_seconds"
    samples = [Sample(f"{name}_bucket", {"le": le}, n) for le, n in (("0.1", 1), ("1.0", 3), ("+Inf", 4))]
    samples += [Sample(f"{name}_count", {}, 4), Sample(f"{name}_sum", {}, 6.0), Sample(f"{name}_created", {}, 1.7e9)]
    stats = from_registry(monkeypatch, Metric(name, "histogram", samples))
    h = stats["latest_stats"]["histogram_data"]["time_to_first_token_seconds"]
    assert h == {"count": 4, "sum": 6.0, "buckets": {"0.1": 1, "1.0": 3, "+Inf": 4}, "mean": 1.5}
    assert stats["histogram_analysis"]["avg_time_to_first_token_seconds"] == 1.5
    assert stats["histogram_analysis"]["total_ttft_requests"] == 4


def test_values_that_are_no_numbers_are_left_out(monkeypatch: pytest.MonkeyPatch):
    stats = from_registry(
        monkeypatch, gauge("vllm:kv_cache_usage_perc", float("nan")), gauge("vllm:num_requests_running", 1)
    )
    assert stats["key_metrics"]["gpu_cache_usage_sys"] is None


def test_without_metrics_the_registry_says_why():
    found = VLLMMetricsCollector(source=names.REGISTRY).collect_current_stats()
    assert "prometheus_client is not loaded" in found["debug_info"]["not_available"][names.REGISTRY]


def test_get_metrics_is_asked_where_the_engine_has_it():
    class Counter:
        name, labels, value = "vllm:prompt_tokens", {"engine": "0"}, 7

    class Engine:
        def get_metrics(self) -> list[Any]:
            return [Counter()]

    engine = Engine()
    collector = VLLMMetricsCollector(engine)
    assert collector.collect_prometheus_metrics()["metrics_found"]["prompt_tokens_total"] == 7
    assert collector.get_prometheus_metrics() == {"vllm:prompt_tokens": 7}


def test_get_metrics_that_refuses_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    class Engine:
        def get_metrics(self) -> list[Any]:
            raise AssertionError("Stat logging disabled")

    engine = Engine()
    found = VLLMMetricsCollector(engine).collect_prometheus_metrics()
    assert "Stat logging disabled" in found["debug_info"]["not_available"][names.REGISTRY]


# The hook

USAGE = (0.0, 0.25, 1.0, 0.0)


@pytest.fixture
def recorded() -> Iterator[tuple[Any, VLLMMetricsCollector]]:
    """Four steps of a stand-in engine, the collector started after the second."""
    with fake_vllm() as vllm:
        kvhook.install()
        engine = vllm.engine(log_stats=False)
        engine.plan += [
            step_stats(kv_cache_usage=u, prefix={"queries": 100, "hits": 25 * i}, generated=2, itl=[0.02, 0.03])
            for i, u in enumerate(USAGE)
        ]
        collector = VLLMMetricsCollector(engine)
        for i in range(4):
            if i == 2:
                collector.start_monitoring()
            engine.step()
        yield engine, collector


def test_the_hook_is_the_source_where_kvhook_records(recorded: tuple[Any, VLLMMetricsCollector]):
    _, collector = recorded
    stats = collector.get_comprehensive_stats()
    k = stats["key_metrics"]
    assert stats["collection_method"] == names.HOOK
    assert (k["gpu_prefix_cache_queries"], k["gpu_prefix_cache_hits"], k["generation_tokens_total"]) == (400, 150, 8)
    assert (k["gpu_cache_usage_percent"], k["gpu_cache_usage_peak_percent"]) == (0, 100)
    assert collector.sampling_thread is None, "what records every step need not be polled"


def test_an_entry_of_the_history_is_a_collection(recorded: tuple[Any, VLLMMetricsCollector]):
    first, second = recorded[1].get_metrics_history()
    assert set(COLLECTION) <= set(first)
    assert (first["collection_method"], first["stats_available"]) == (names.HOOK, True)
    assert first["timestamp"] < second["timestamp"]
    strict(recorded[1].get_metrics_history())


def test_the_environment_is_known_when_the_engine_is_gone():
    with fake_vllm() as vllm:
        kvhook.install()
        engine = vllm.engine(log_stats=False)
        collector = VLLMMetricsCollector(engine)
        before = collector.get_comprehensive_stats()["environment"]
        del engine
        gc.collect()
        kvhook.uninstall()
        after = collector.get_comprehensive_stats()["environment"]
    assert before["adapter"] == "v1"
    assert (before["engine_class"], before["block_size"], before["model"]) == ("LLMEngine", 32, "stand-in")
    del before["engine_core_in_this_process"], after["engine_core_in_this_process"]
    assert after == before


def test_the_monitored_time_is_told_apart_from_the_run(recorded: tuple[Any, VLLMMetricsCollector]):
    _, collector = recorded
    collector.stop_monitoring()
    stats = collector.get_comprehensive_stats()
    assert (stats["summary"]["prefix_cache_queries"], stats["summary"]["prefix_cache_hits"]) == (200, 125)
    assert stats["summary"]["prefix_cache_hit_rate"] == 125 / 200
    assert [p["kv_cache_usage"] for p in stats["trend"]["usage_progression"]] == [1.0, 0.0]
    assert [p["prefix_cache_hits"] for p in stats["trend"]["hit_rate_progression"]] == [50, 75]
    assert [row["metrics_found"]["gpu_cache_usage_sys"] for row in collector.get_metrics_history()] == [1.0, 0.0]


def test_histograms_of_the_hook_have_exact_percentiles(recorded: tuple[Any, VLLMMetricsCollector]):
    h = recorded[1].collect_current_stats()["histogram_data"]["time_per_output_token_seconds"]
    assert (h["count"], h["buckets"]["0.025"], h["buckets"]["+Inf"]) == (8, 4, 8)
    assert (h["p50"], h["max"]) == (pytest.approx(0.025), 0.03)


def test_what_was_recorded_can_be_asked_after_kvhook_is_uninstalled(recorded: tuple[Any, VLLMMetricsCollector]):
    before = recorded[1].get_comprehensive_stats()["key_metrics"]
    kvhook.uninstall()
    assert recorded[1].get_comprehensive_stats()["key_metrics"] == before


def test_started_before_the_engine_is_made_everything_is_recorded():
    with fake_vllm() as vllm, VLLMMetricsCollector() as collector:
        engine = vllm.engine(log_stats=False)
        engine.plan.append(step_stats(kv_cache_usage=0.5, num_running_reqs=1))
        engine.step()
        stats = collector.get_comprehensive_stats()
    assert (stats["collection_method"], stats["key_metrics"]["gpu_cache_usage_sys"]) == (names.HOOK, 0.5)


def test_an_engine_with_its_stats_off_is_not_attached_and_nothing_is_left_installed():
    with fake_vllm() as vllm:
        engine = vllm.engine(log_stats=False)
        collector = VLLMMetricsCollector(engine)
        collector.start_monitoring()
        found = collector.collect_current_stats()
        collector.stop_monitoring()
        assert "before LLM(...)" in found["debug_info"]["not_available"][names.HOOK]
        assert kvhook.recording.installation.current_session() is None


def test_a_session_of_somebody_else_is_not_uninstalled():
    with fake_vllm() as vllm:
        session = kvhook.install()
        engine = vllm.engine(log_stats=False)
        with VLLMMetricsCollector(engine):
            pass
        assert kvhook.recording.installation.current_session() is session


# Monitoring


def polled(interval: float = 3600.0) -> tuple[V0Engine, VLLMMetricsCollector]:
    engine = V0Engine()
    return engine, VLLMMetricsCollector(engine, interval, source=names.INTERNAL)


def is_on(collector: VLLMMetricsCollector) -> bool:
    return collector.monitoring


def test_start_stop_start_and_twice():
    engine, collector = polled()
    assert not is_on(collector)
    collector.stop_monitoring()
    assert not is_on(collector)
    collector.start_monitoring()
    thread = collector.sampling_thread
    collector.start_monitoring()
    assert is_on(collector)
    assert collector.sampling_thread is thread
    collector.stop_monitoring()
    collector.stop_monitoring()
    assert not is_on(collector)
    assert thread is not None
    assert not thread.is_alive()
    assert len(collector.history()) == 2, "a sample at the start and one at the end"
    engine.stats.num_running_sys = 7
    collector.collect_current_stats()
    assert len(collector.history()) == 2, "between two monitored times"
    collector.start_monitoring()
    collector.stop_monitoring()
    assert collector.history()["num_running_reqs"].tolist() == [3, 3, 7, 7]


def test_the_thread_samples_at_the_interval():
    engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    assert thread.daemon
    engine.wait_until_asked(20)
    collector.stop_monitoring()
    assert not thread.is_alive()
    rows = collector.history()
    assert len(rows) >= 20
    assert (np.diff(rows["t"]) > 0).all()
    stats = collector.get_comprehensive_stats()
    assert (stats["total_collections"], stats["collection_method"]) == (len(rows), names.INTERNAL)
    assert stats["summary"]["of"] == "samples 0.001 s apart"


def test_with_statement():
    _engine, collector = polled()
    with collector:
        thread = collector.sampling_thread
        assert is_on(collector)
    assert not is_on(collector)
    assert thread is not None
    assert not thread.is_alive()


def test_disabled_monitoring_still_collects_by_hand():
    engine = V0Engine()
    collector = VLLMMetricsCollector(engine, 0.001, False)
    collector.start_monitoring()
    assert not is_on(collector)
    assert collector.sampling_thread is None
    assert collector.collect_current_stats()["metrics_found"]["num_running_sys"] == 3
    assert len(collector.history()) == 1


def test_a_collector_that_is_dropped_takes_its_thread_along():
    _engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    del collector
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_ends_when_the_engine_goes_first():
    engine, collector = polled(0.001)
    collector.start_monitoring()
    thread = collector.sampling_thread
    assert thread is not None
    del engine
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert collector.get_comprehensive_stats()["collection_method"] == "unavailable"
    collector.stop_monitoring()


def test_the_registry_is_not_asked_for_an_engine_that_is_gone(monkeypatch: pytest.MonkeyPatch):
    """Another engine's numbers may be in there by then."""
    client: Any = types.ModuleType("prometheus_client")
    client.REGISTRY = types.SimpleNamespace(collect=lambda: [counter("vllm:prompt_tokens", 7)])
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    engine = V0Engine()
    collector = VLLMMetricsCollector(engine, source=names.REGISTRY)
    collector.start_monitoring()
    collector.stop_monitoring()
    del engine
    gc.collect()
    found = collector.collect_current_stats()
    assert found["collection_method"] == names.UNAVAILABLE
    assert "deleted" in found["debug_info"]["not_available"][names.REGISTRY]
    assert collector.history()["num_prompt_tokens"].tolist() == [7, 7], "what was seen of it stays"


def test_an_engine_that_fails_while_it_is_sampled_ends_nothing():
    engine, collector = polled(0.001)

    class Broken:
        @property
        def num_running_sys(self) -> int:
            engine.asked.release()
            raise OSError("the device is gone")

    collector.start_monitoring()
    engine.stats = Broken()  # type: ignore[assignment]
    engine.wait_until_asked(20)
    engine.stats = V0Stats()
    stats = collector.get_comprehensive_stats()
    collector.stop_monitoring()
    assert stats["key_metrics"]["num_running_sys"] == 3
    (error,) = stats["errors"]
    assert (error["where"], error["error"]) == ("reading internal_engine_stats", "OSError: the device is gone")
    assert error["times"] >= 1


def test_the_interpreter_exits_while_monitoring_is_on(python: Python):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_collector import polled\n"
        "engine, collector = polled(0.001)\n"
        "collector.start_monitoring()\n"
        "engine.wait_until_asked(5)\n"
        "print('end')"
    )
    done = python(code, Path(__file__).parents[1])
    assert done.stdout == "end\n"
    assert "Traceback" not in done.stderr


def test_falling_back_is_said_once(caplog: pytest.LogCaptureFixture):
    collector = VLLMMetricsCollector(V0Engine(), 3600)
    with caplog.at_level(logging.WARNING, "kvhook"):
        collector.start_monitoring()
        for _ in range(3):
            collector.collect_current_stats()
        collector.stop_monitoring()
    (line,) = [r.getMessage() for r in caplog.records if "source" in r.getMessage()]
    assert names.INTERNAL in line
    assert f"{names.HOOK}: " in line


def test_a_forced_source_is_no_falling_back(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "kvhook"):
        _engine, collector = polled()
        collector.collect_current_stats()
    assert not caplog.records


# History


def test_parts_hold_differences_and_peaks():
    history = from_samples(
        [
            (1.0, {"prefix_cache_queries": 10, "prefix_cache_hits": 0, "kv_cache_usage": 0.5, "num_waiting_reqs": 1}),
            (2.0, {"prefix_cache_queries": 30, "prefix_cache_hits": 15, "kv_cache_usage": 0.9, "num_waiting_reqs": 4}),
            (3.0, {"prefix_cache_queries": 40, "prefix_cache_hits": 25, "kv_cache_usage": 0.1}),
        ],
        1000.0,
    )
    first, second = cut(history, [1.0, 2.0, 3.0])
    assert (first["prefix_cache_queries"], first["prefix_cache_hits"], first["prefix_cache_hit_rate"]) == (20, 15, 0.75)
    assert (second["prefix_cache_queries"], second["prefix_cache_hit_rate"]) == (10, 1.0)
    assert second["prefix_cache_hit_rate_so_far"] == 25 / 30
    assert (first["kv_cache_usage_peak"], first["num_waiting_reqs_peak"]) == (0.9, 4)
    assert (second["num_waiting_reqs_peak"], second["num_prompt_tokens"]) == (None, None)
    assert (first["begin"], first["end"]) == (1001.0, 1002.0)
    (whole,) = cut(history, [-np.inf, np.inf])
    assert (whole["prefix_cache_queries"], whole["kv_cache_usage"]) == (40, 0.1)


def lookups(t: float, queries: int, hits: int) -> tuple[float, dict[str, float]]:
    return t, {"prefix_cache_queries": queries, "prefix_cache_hits": hits}


def test_the_hit_rate_of_monitored_times_leaves_out_what_was_looked_up_outside_of_them():
    history = from_samples(
        [lookups(1, 100, 0), lookups(2, 100, 0), lookups(3, 110, 10), lookups(4, 500, 10), lookups(5, 510, 15)], 0.0
    )
    first, second = monitored(history, [(1.5, 3.0), (4.0, 9.0)])
    assert first.rows["t"].tolist() == [2, 3]
    assert (np.isnan(first.hit_rate[0]), first.hit_rate[1]) == (True, 1.0)
    # the sample at the beginning of a monitored time tells what was there before it
    assert second.rows["t"].tolist() == [4, 5]
    assert second.hit_rate.tolist() == [1.0, 0.75]
    (whole,) = monitored(history, [(-np.inf, np.inf)])
    assert whole.hit_rate[-1] == 15 / 510


def test_a_hit_rate_that_is_not_known_is_not_drawn_as_0():
    unknown = from_samples([(1.0, {}), (2.0, {})], 0.0)
    falls = from_samples([lookups(1, 100, 50), lookups(2, 10, 5)], 0.0)
    for history in (unknown, falls):
        (part,) = monitored(history, [(1.0, 3.0)])
        assert np.isnan(part.hit_rate).all()


def test_a_total_that_falls_is_not_known():
    history = from_samples([(1.0, {"num_prompt_tokens": 10}), (2.0, {"num_prompt_tokens": 4})], 0.0)
    assert cut(history, [1.0, 2.0])[0]["num_prompt_tokens"] is None


def test_parts_of_nothing_hold_nothing():
    (part,) = cut(from_samples([], 0.0), [-np.inf, np.inf])
    assert {value for name, value in part.items() if name != "rows"} == {None}


@pytest.mark.parametrize(("rows", "parts", "expected"), [(5, 10, 5), (10, 5, 5), (1, 3, 1), (0, 3, 0)])
def test_even_edges_cut_all_rows(rows: int, parts: int, expected: int):
    history = from_samples([(float(i + 1), {}) for i in range(rows)], 0.0)
    found = cut(history, even_edges(history, -np.inf, np.inf, parts))
    assert len(found) == expected
    assert sum(part["rows"] for part in found) == rows


def test_a_histogram_counts_values_up_to_and_with_each_bound():
    h = histogram(np.array([0.1, 0.2, 1.0, 5.0, np.nan]), np.array([1, 2, 1, 1, 9]), (0.2, 1.0))
    assert (h.count, h.buckets) == (5, {"0.2": 3, "1.0": 4, "+Inf": 5})
    assert h.sum == pytest.approx(6.5)


def test_vectors_and_unknown_metrics_are_kept_as_they_are():
    class Vector:
        name, labels, values = "vllm:accepted_per_pos", {"engine": "0"}, (3, 2, 1)

    families = prometheus.from_snapshot([Vector()])
    assert prometheus.as_json(families) == {"vllm:accepted_per_pos": [3, 2, 1]}
    assert prometheus.numbers(families) == {}


def test_save_as_csv_and_json(tmp_path: Path):
    engine, collector = polled()
    for usage in (0.5, 0.75):
        engine.stats.gpu_cache_usage_sys = usage
        collector.collect_current_stats()
    with open(collector.save_metrics(tmp_path / "x.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kv_cache_usage"] for row in rows] == ["0.5", "0.75"]
    assert {row["num_prompt_tokens"] for row in rows} == {""}
    assert {row["num_running_reqs"] for row in rows} == {"3"}, "counts are whole numbers"
    assert {row["collection_method"] for row in rows} == {names.INTERNAL}
    saved = json.loads(collector.save_metrics(str(tmp_path / "x.json")).read_text())
    assert saved["key_metrics"]["gpu_cache_usage_sys"] == 0.75
    assert len(saved["history"]) == 3
    with pytest.raises(kvhook.KvhookError, match=r"\.csv .* or \.json"):
        collector.save_metrics(tmp_path / "x.xls")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["x.csv", "x.json"]


NEEDS: list[tuple[str, str, Callable[[VLLMMetricsCollector], Any]]] = [
    ("pandas", "pandas", lambda c: c.history_frame()),
    ("matplotlib", "plot", lambda c: c.plot_kv_cache_metrics()),
]


@pytest.mark.parametrize(("package", "extra", "call"), NEEDS, ids=[n[0] for n in NEEDS])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, extra: str, call: Callable[[VLLMMetricsCollector], Any], tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    _engine, collector = polled()
    collector.collect_current_stats()
    with pytest.raises(kvhook.KvhookError, match=rf"{package}.*kvhook\[{extra}\]"):
        call(collector)


def test_history_as_a_data_frame():
    pytest.importorskip("pandas")
    _engine, collector = polled()
    collector.collect_current_stats()
    frame = collector.history_frame()
    assert frame["kv_cache_usage"].tolist() == [0.25]
    assert str(frame.index.tz) == "UTC"


def test_plot(tmp_path: Path, recorded: tuple[Any, VLLMMetricsCollector]):
    pytest.importorskip("matplotlib")
    (picture,) = recorded[1].plot_kv_cache_metrics(tmp_path / "new")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def drawn(monkeypatch: pytest.MonkeyPatch, collector: VLLMMetricsCollector, folder: Path) -> Any:
    """The figure, as it is handed to be printed."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    figures = []
    monkeypatch.setattr(agg.FigureCanvasAgg, "print_figure", lambda canvas, *_, **__: figures.append(canvas.figure))
    collector.plot_kv_cache_metrics(folder)
    return figures[0]


def test_the_plot_shows_the_monitored_time_alone(
    tmp_path: Path, recorded: tuple[Any, VLLMMetricsCollector], monkeypatch: pytest.MonkeyPatch
):
    engine, collector = recorded
    collector.stop_monitoring()
    engine.plan.append(step_stats(kv_cache_usage=0.5, prefix={"queries": 100, "hits": 100}))
    engine.step()
    collector.start_monitoring()
    engine.plan.append(step_stats(kv_cache_usage=0.75, prefix={"queries": 100, "hits": 0}))
    engine.step()
    figure = drawn(monkeypatch, collector, tmp_path)
    assert figure.get_suptitle() == "hook: every engine step (3)"
    usage, _requests, rate = figure.axes
    np.testing.assert_array_equal(usage.lines[0].get_ydata(), [100, 0, np.nan, 75])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [50, 62.5, np.nan, 100 * 125 / 300], rtol=1e-12)
    assert usage.get_title(loc="right") == "peak 100.0 %"


def test_a_plot_without_a_hit_rate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = V0Engine(V0Stats(gpu_prefix_cache_hit_rate=-1.0))
    collector = VLLMMetricsCollector(engine)
    collector.collect_current_stats()
    figure = drawn(monkeypatch, collector, tmp_path)
    assert figure.get_suptitle() == "internal_engine_stats: a single sample"
    rate = figure.axes[2]
    assert not rate.lines
    assert "prefix caching is off" in rate.texts[0].get_text()


def test_the_plot_of_v0_has_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine, collector = polled()
    collector.collect_current_stats()
    rate = drawn(monkeypatch, collector, tmp_path).axes[2]
    assert rate.lines[0].get_ydata().tolist() == [50]
    assert "of blocks" in rate.get_ylabel()
    assert engine.stats.gpu_prefix_cache_hit_rate == 0.5


def test_nothing_to_draw_is_said(tmp_path: Path):
    with pytest.raises(kvhook.KvhookError, match="nothing to draw"):
        VLLMMetricsCollector().plot_kv_cache_metrics(tmp_path)


def test_a_reading_explains_every_value_and_histogram_that_it_lacks():
    reading = Reading("x", {}, {}, {}, {}, None, "")
    lacks = {v.name for v in names.VALUES} | {t.name for t in names.TIMES} | {"prefix_cache_hit_rate"}
    assert lacks == set(reading.absent)


def test_what_has_no_value_in_the_answers_has_a_reason():
    for engine in (V0Engine(), v1_engine(), v1_engine(in_process=False)):
        stats = VLLMMetricsCollector(engine).get_comprehensive_stats()
        for part, wanted in (("key_metrics", KEY_METRICS), ("histogram_analysis", ANALYSIS)):
            none = [name for name in wanted if name not in stats[part]]
            assert none
            assert all(stats["absent"][name] for name in none)


def test_a_mean_of_nothing_has_a_reason(monkeypatch: pytest.MonkeyPatch):
    name = "vllm:time_to_first_token_seconds"
    samples = [
        Sample(f"{name}_bucket", {"le": "+Inf"}, 0),
        Sample(f"{name}_count", {}, 0),
        Sample(f"{name}_sum", {}, 0),
    ]
    stats = from_registry(monkeypatch, Metric(name, "histogram", samples))
    found = stats["histogram_analysis"]
    assert found == {"total_ttft_requests": 0}
    assert "no value" in stats["absent"]["avg_time_to_first_token_seconds"]
    assert "total_ttft_requests" not in stats["absent"]

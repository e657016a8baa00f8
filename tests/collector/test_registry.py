"""What a collector finds in Prometheus's registry, and what it must never take for a number."""

from __future__ import annotations

from typing import Any

import pytest

from kvhook import VLLMMetricsCollector
from kvhook.collector import names, prometheus
from kvhook.collector.reading import hit_rate
from tests.collector.sources import Metric, Sample, counter, from_registry, gauge


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


def test_vectors_and_unknown_metrics_are_kept_as_they_are():
    class Vector:
        name, labels, values = "vllm:accepted_per_pos", {"engine": "0"}, (3, 2, 1)

    families = prometheus.from_snapshot([Vector()])
    assert prometheus.as_json(families) == {"vllm:accepted_per_pos": [3, 2, 1]}
    assert prometheus.numbers(families) == {}


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

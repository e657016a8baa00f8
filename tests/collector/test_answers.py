"""What a collector answers, whatever it is given: every name is there, and what has no value has a reason."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.collector import names
from kvhook.collector.reading import Reading
from tests.collector.sources import COLLECTION, V0Engine, strict, v1_engine

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

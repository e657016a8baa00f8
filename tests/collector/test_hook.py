"""What a collector answers where kvhook records the engine: every step, and nothing is left installed."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.collector import names
from kvhook.collector.reading import histogram
from tests.collector.sources import COLLECTION, strict
from tests.standin import fake_vllm, step_stats


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


def test_a_histogram_counts_values_up_to_and_with_each_bound():
    h = histogram(np.array([0.1, 0.2, 1.0, 5.0, np.nan]), np.array([1, 2, 1, 1, 9]), (0.2, 1.0))
    assert (h.count, h.buckets) == (5, {"0.2": 3, "1.0": 4, "+Inf": 5})
    assert h.sum == pytest.approx(6.5)

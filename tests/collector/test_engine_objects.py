"""What a collector finds in the engine's own objects, of V0 and of V1."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from kvhook import VLLMMetricsCollector
from kvhook.collector import names
from tests.collector.sources import V0Engine, V0Stats, gauge, v1_engine


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

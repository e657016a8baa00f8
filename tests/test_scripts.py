"""Scripts that were written for another collector of the same name run on kvhook's. On an engine: `tests/engine`."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvhook
from kvhook import VLLMMetricsCollector
from kvhook.recording.installation import current_session
from tests.conftest import Python
from tests.script_checks import Inference, Structure, as_an_experiment_reads
from tests.standin import FakeVllm, fake_vllm, step_stats


@pytest.fixture(autouse=True)
def _fresh(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed, and no Prometheus of another test is looked at."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "prometheus_client")


SEVEN = [check.__name__ for check in Structure(VLLMMetricsCollector).checks()]


@pytest.mark.parametrize("check", SEVEN)
def test_a_scripts_check_of_the_structure_passes(check: str):
    assert getattr(Structure(VLLMMetricsCollector), check)()


WITHOUT = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "torch", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from kvhook import VLLMMetricsCollector
from tests.script_checks import Structure
print([check() for check in Structure(VLLMMetricsCollector).checks()])
print(VLLMMetricsCollector()._collect_prometheus_registry_only()["error"])
"""


def test_it_passes_where_neither_vllm_nor_prometheus_is_installed(python: Python):
    passed, why = python(WITHOUT).stdout.splitlines()
    assert passed == str([True] * 7)
    assert "prometheus_client is not loaded" in why


# An engine that has no numbers, or fails


class Engine:
    """An engine that answers, and about which nothing can be found out."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def get_metrics(self) -> list[Any]:
        if self.error:
            raise self.error
        return []


@pytest.mark.parametrize("error", [None, AssertionError("Stat logging disabled"), OSError("gone"), KeyError("x")])
def test_without_numbers_a_script_gets_to_its_end_and_is_told_why(error: Exception | None):
    engine = Engine(error)
    script = Inference(VLLMMetricsCollector, engine, lambda prompts: prompts)
    # those that must have numbers do not pass, and not because of an exception
    assert [check() for check in script.checks()] == [False, True, False, False]
    assert script.seen["hit rates"] == ([None] * 5, None)
    assert all(found["error"] for found in script.seen["basic"])
    collected, stats, best = script.seen["methods"]
    assert (stats["key_metrics"], best) == ({}, None)
    assert collected["registry"]["debug_info"]["methods_attempted"] == ["prometheus_registry"]
    assert as_an_experiment_reads(script.collector) == {}
    json.dumps(script.seen, allow_nan=False)


# The registry's reading


class Metric:
    """As ``LLM.get_metrics()`` gives it."""

    def __init__(self, value: float, name: str) -> None:
        self.name, self.value, self.labels = name, value, {"engine": "0"}


class Counter(Metric):
    pass


class Gauge(Metric):
    pass


def test_the_registrys_reading_has_the_names_that_any_release_has_for_its_metrics():
    engine = types.SimpleNamespace(
        get_metrics=lambda: [
            *(Gauge(0.25, "vllm:kv_cache_usage_perc"), Gauge(3, "vllm:num_requests_running")),
            *(Counter(40, "vllm:prefix_cache_queries"), Counter(30, "vllm:prefix_cache_hits")),
            *(Counter(77, "vllm:prompt_tokens"), Counter(1, "vllm:external_prefix_cache_hits")),
        ]
    )
    collector = VLLMMetricsCollector(engine)
    found = collector._collect_prometheus_registry_only()
    assert found == found | {"collection_method": "prometheus_registry", "stats_available": True}
    metrics = found["metrics_found"]
    for names, value in (
        (("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "gpu_cache_usage_sys"), 0.25),
        (("vllm:prefix_cache_hits", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits"), 30),
        (("vllm:prompt_tokens", "vllm:prompt_tokens_total", "prompt_tokens_total"), 77),
        (("vllm:gpu_prefix_cache_hit_rate", "gpu_prefix_cache_hit_rate"), 0.75),
    ):
        assert {metrics[name] for name in names} == {value}
    assert {value for name, value in metrics.items() if "cache_hits" in name} == {30}, "whichever a script takes"
    assert found["total_metrics_found"] == len(metrics)
    assert "error" not in found
    assert as_an_experiment_reads(collector) == {
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:gpu_prefix_cache_hit_rate": 0.75,
        "vllm:gpu_prefix_cache_hits": 30,
        "vllm:gpu_prefix_cache_queries": 40,
        "vllm:num_requests_running": 3,
        "vllm:prompt_tokens_total": 77,
    }


# The engine that is given later


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_vllm() as one:
        yield one


def steps(engine: Any, *generated: int) -> None:
    engine.plan += [step_stats(generated=n) for n in generated]
    for _ in generated:
        engine.step()


@pytest.mark.parametrize("started_before", [True, False])
def test_an_engine_that_is_given_later_is_recorded(vllm: FakeVllm, started_before: bool):
    collector = VLLMMetricsCollector()
    assert not collector.initialize_logging()
    if started_before:
        collector.start_monitoring()
    engine = vllm.engine(log_stats=True)
    llm = types.SimpleNamespace(llm_engine=engine)
    collector.llm = llm
    assert collector.llm is llm
    assert collector.initialize_logging()
    collector.start_monitoring()
    steps(engine, 3, 4)
    assert collector.get_comprehensive_stats()["key_metrics"]["generation_tokens_total"] == 7
    assert [one["metrics_found"]["num_generation_tokens"] for one in collector.stats_history] == [3, 7]
    assert collector.last_stats["metrics_found"]["num_generation_tokens"] == 7
    assert (collector.monitoring, collector.monitor_thread) == (True, None), "every step is recorded: no thread is"
    collector.close()
    assert current_session() is None, "what the collector installed is gone with it"


def test_another_engine_is_another_source(vllm: FakeVllm):
    kvhook.install()
    engines = [vllm.engine(log_stats=True) for _ in range(2)]
    collector = VLLMMetricsCollector(engines[0])
    for n, engine in enumerate(engines):
        steps(engine, n + 1)
    assert collector.collect_current_stats()["metrics_found"]["num_generation_tokens"] == 1
    collector.llm = engines[1]
    assert collector.collect_current_stats()["metrics_found"]["num_generation_tokens"] == 2
    collector.llm = None
    assert collector.collect_current_stats()["metrics_found"]["num_generation_tokens"] == 3, "all engines"
    assert collector.last_stats["stats_available"]


def test_the_engine_that_was_given_is_not_kept_alive(vllm: FakeVllm):
    collector = VLLMMetricsCollector()
    collector.llm = vllm.engine()
    assert collector.llm is None
    assert not collector.modern_logging_available


# Made-up numbers


def test_made_up_numbers_are_named_so_wherever_they_stand(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "kvhook"):
        collector = VLLMMetricsCollector()
        stats = collector.simulate_metrics_for_testing(duration_seconds=5, interval=0.5)
    assert "made-up numbers" in caplog.text
    assert stats["collection_method"] == stats["latest_stats"]["collection_method"] == "simulated_for_testing"
    assert {one["collection_method"] for one in collector.stats_history} == {"simulated_for_testing"}
    assert len(collector.stats_history) == 10
    assert 0 < stats["key_metrics"]["gpu_prefix_cache_hit_rate"] < 1
    assert collector.collect_internal_stats()["collection_method"] == "unavailable", "what is asked by name is real"
    assert VLLMMetricsCollector().collect_current_stats()["collection_method"] == "unavailable"


def test_made_up_numbers_are_the_same_every_time_and_can_be_saved(tmp_path: Path):
    one, other = VLLMMetricsCollector(), VLLMMetricsCollector()
    for collector in (one, other):
        collector.enable_testing_mode()
    assert [r["metrics_found"] for r in one.stats_history] == [r["metrics_found"] for r in other.stats_history]
    text = one.save_metrics(tmp_path / "metrics.csv").read_text(encoding="utf-8")
    assert text.count("simulated_for_testing") == len(one.stats_history) == 30
